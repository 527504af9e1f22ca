// Row movement on the GPU, torch-free: the twin of cpu/rows_kernel.cpp, with the same order of sums and roundings
// (products and sums are rounded one by one, never fused), so results are the CPU's bit for bit, except the dot
// products of grad_weights, which are added in another fixed order. No floating-point atomics anywhere.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <climits>

#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace {

using namespace moetrain_cuda;

constexpr int kThreads = 256;
// ---------------------------------------------------------------------------------------------- plan

// block_counts[block][e] = slots of the block's chunk that go to expert e.
__global__ void count_kernel(const int64_t* expert_ids, int64_t slots, int experts, int32_t* block_counts,
                             unsigned long long* first_bad) {
  extern __shared__ int32_t count[];
  for (int e = threadIdx.x; e < experts; e += blockDim.x) count[e] = 0;
  __syncthreads();
  const int64_t begin = blockIdx.x * kMoetrainPlanChunk;
  const int64_t end = min(begin + kMoetrainPlanChunk, slots);
  for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
    const int64_t expert = expert_ids[i];
    if (expert < -1 || expert >= experts) {
      atomicMin(first_bad, static_cast<unsigned long long>(i));
    } else if (expert >= 0) {
      atomicAdd(&count[expert], 1);  // integers: the order does not matter
    }
  }
  __syncthreads();
  for (int e = threadIdx.x; e < experts; e += blockDim.x) {
    block_counts[static_cast<int64_t>(blockIdx.x) * experts + e] = count[e];
  }
}

// Turns the counts of each expert into exclusive prefixes over the blocks; one thread an expert.
__global__ void prefix_over_blocks_kernel(int32_t* block_counts, int64_t blocks, int experts,
                                          int64_t* tokens_per_expert) {
  const int e = blockIdx.x * blockDim.x + threadIdx.x;
  if (e >= experts) return;
  int32_t total = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const int32_t count = block_counts[b * experts + e];
    block_counts[b * experts + e] = total;
    total += count;
  }
  tokens_per_expert[e] = total;
}

// One warp: first_row = exclusive prefix of tokens_per_expert; status[0] = their sum.
__global__ void first_row_kernel(const int64_t* tokens_per_expert, int experts, int64_t* first_row,
                                 int64_t* status) {
  const int lane = threadIdx.x;
  int64_t before = 0;
  for (int base = 0; base < experts; base += 32) {
    const int e = base + lane;
    const int64_t count = e < experts ? tokens_per_expert[e] : 0;
    const int64_t upto = warp_inclusive_scan(count, lane);
    if (e < experts) first_row[e] = before + upto - count;
    before += __shfl_sync(kAllLanes, upto, 31);
  }
  if (lane == 0) status[0] = before;
}

// One warp a chunk walks it in order, 32 slots at a time: a stable sort. Lanes with the same expert number
// themselves by their mask.
__global__ void place_kernel(const int64_t* expert_ids, int64_t slots, int64_t slots_per_token, int experts,
                             const int32_t* block_counts, const int64_t* first_row, int64_t* row_token,
                             int64_t* row_slot, int64_t* slot_row) {
  extern __shared__ int32_t next[];
  const int lane = threadIdx.x;
  for (int e = lane; e < experts; e += 32) next[e] = block_counts[static_cast<int64_t>(blockIdx.x) * experts + e];
  __syncwarp();
  const int64_t begin = blockIdx.x * kMoetrainPlanChunk;
  for (int64_t base = begin; base < min(begin + kMoetrainPlanChunk, slots); base += 32) {
    const int64_t slot = base + lane;
    const int expert = slot < slots ? static_cast<int>(expert_ids[slot]) : -1;
    const unsigned same = __match_any_sync(kAllLanes, expert);
    const int rank = __popc(same & ((1u << lane) - 1));
    const int start = expert >= 0 ? next[expert] : 0;
    __syncwarp();
    if (expert >= 0 && rank == 0) next[expert] = start + __popc(same);
    __syncwarp();
    if (slot < slots) {
      const int64_t row = expert >= 0 ? first_row[expert] + start + rank : -1;
      slot_row[slot] = row;
      if (row >= 0) {
        row_slot[row] = slot;
        row_token[row] = slot / slots_per_token;
      }
    }
  }
}

// ---------------------------------------------------------------------------------------------- gather

template <class Unit>
__global__ void gather_kernel(const Unit* x, int64_t x_rows, const int64_t* index, int64_t units, Unit* out) {
  const int64_t row = blockIdx.x, from = index[row];
  require(from >= 0 && from < x_rows);
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) out[row * units + i] = x[from * units + i];
}

template <class Unit>
int launch_gather(const void* x, int64_t x_rows, const int64_t* index, int64_t count, size_t row_bytes, void* out,
                  cudaStream_t stream) {
  gather_kernel<Unit><<<static_cast<unsigned>(count), kThreads, 0, stream>>>(
      static_cast<const Unit*>(x), x_rows, index, static_cast<int64_t>(row_bytes / sizeof(Unit)),
      static_cast<Unit*>(out));
  return cudaGetLastError();
}

// ---------------------------------------------------------------------------------------------- combine

template <class T, int kPack>
__global__ void combine_kernel(const Pack<T, kPack>* rows, int64_t num_rows, const float* weights,
                               const int64_t* slot_row, int64_t slots_per_token, int64_t packs,
                               Pack<T, kPack>* out) {
  const int64_t token = blockIdx.x;
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    float acc[kPack] = {};
    for (int64_t slot = token * slots_per_token; slot < (token + 1) * slots_per_token; ++slot) {
      const int64_t row = slot_row[slot];
      if (row < 0) continue;
      require(row < num_rows);
      const float weight = weights ? weights[slot] : 1.0f;
      const Pack<T, kPack> from = rows[row * packs + i];
#pragma unroll
      for (int p = 0; p < kPack; ++p) acc[p] = __fadd_rn(acc[p], __fmul_rn(weight, widen(from.value[p])));
    }
    Pack<T, kPack> to;
#pragma unroll
    for (int p = 0; p < kPack; ++p) to.value[p] = narrow<T>(acc[p]);
    out[token * packs + i] = to;
  }
}

template <class T, int kPack>
__global__ void combine_backward_kernel(const Pack<T, kPack>* grad, const Pack<T, kPack>* rows, int64_t num_rows,
                                        const float* weights, const int64_t* slot_row, int64_t slots_per_token,
                                        int64_t packs, Pack<T, kPack>* grad_rows, float* grad_weights) {
  __shared__ float partial[kThreads / 32];
  const int64_t token = blockIdx.x;
  for (int64_t slot = token * slots_per_token; slot < (token + 1) * slots_per_token; ++slot) {
    const int64_t row = slot_row[slot];
    if (row < 0) {  // the same for the whole block
      if (threadIdx.x == 0) grad_weights[slot] = 0;
      continue;
    }
    require(row < num_rows);
    const float weight = weights[slot];
    float dot = 0;
    for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
      const Pack<T, kPack> g = grad[token * packs + i], x = rows[row * packs + i];
      Pack<T, kPack> to;
#pragma unroll
      for (int p = 0; p < kPack; ++p) {
        to.value[p] = narrow<T>(__fmul_rn(weight, widen(g.value[p])));
        dot += widen(g.value[p]) * widen(x.value[p]);
      }
      grad_rows[row * packs + i] = to;
    }
    const float total = block_sum(dot, partial);
    if (threadIdx.x == 0) grad_weights[slot] = total;
  }
}

template <class T, int kPack>
int launch_combine(const void* rows, int64_t num_rows, const float* weights, const int64_t* slot_row,
                   int64_t tokens, int64_t slots_per_token, int64_t width, void* out, cudaStream_t stream) {
  using P = Pack<T, kPack>;
  combine_kernel<T, kPack><<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(
      static_cast<const P*>(rows), num_rows, weights, slot_row, slots_per_token, width / kPack,
      static_cast<P*>(out));
  return cudaGetLastError();
}

template <class T, int kPack>
int launch_combine_backward(const void* grad, const void* rows, int64_t num_rows, const float* weights,
                            const int64_t* slot_row, int64_t tokens, int64_t slots_per_token, int64_t width,
                            void* grad_rows, float* grad_weights, cudaStream_t stream) {
  using P = Pack<T, kPack>;
  combine_backward_kernel<T, kPack><<<static_cast<unsigned>(tokens), kThreads, 0, stream>>>(
      static_cast<const P*>(grad), static_cast<const P*>(rows), num_rows, weights, slot_row, slots_per_token,
      width / kPack, static_cast<P*>(grad_rows), grad_weights);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

int moetrain_cuda_plan_count(const int64_t* expert_ids, int64_t slots, int64_t experts, int32_t* block_counts,
                             int64_t* tokens_per_expert, int64_t* first_row, int64_t* status,
                             CUstream_st* stream) {
  const int64_t blocks = (slots + kMoetrainPlanChunk - 1) / kMoetrainPlanChunk;
  const int num_experts = static_cast<int>(experts);
  // All bytes 0x7f: larger than any slot, and what "no illegal slot" looks like.
  if (const cudaError_t error = cudaMemsetAsync(status, 0x7f, 2 * sizeof(int64_t), stream)) return error;
  if (blocks > 0) {
    count_kernel<<<static_cast<unsigned>(blocks), kThreads, experts * sizeof(int32_t), stream>>>(
        expert_ids, slots, num_experts, block_counts, reinterpret_cast<unsigned long long*>(status + 1));
  }
  prefix_over_blocks_kernel<<<(num_experts + kThreads - 1) / kThreads, kThreads, 0, stream>>>(
      block_counts, blocks, num_experts, tokens_per_expert);
  first_row_kernel<<<1, 32, 0, stream>>>(tokens_per_expert, num_experts, first_row, status);
  return cudaGetLastError();
}

int moetrain_cuda_plan_place(const int64_t* expert_ids, int64_t slots, int64_t slots_per_token, int64_t experts,
                             const int32_t* block_counts, const int64_t* first_row, int64_t* row_token,
                             int64_t* row_slot, int64_t* slot_row, CUstream_st* stream) {
  const int64_t blocks = (slots + kMoetrainPlanChunk - 1) / kMoetrainPlanChunk;
  if (blocks == 0) return cudaSuccess;
  place_kernel<<<static_cast<unsigned>(blocks), 32, experts * sizeof(int32_t), stream>>>(
      expert_ids, slots, slots_per_token, static_cast<int>(experts), block_counts, first_row, row_token, row_slot,
      slot_row);
  return cudaGetLastError();
}

int moetrain_cuda_gather_rows(const void* x, int64_t x_rows, const int64_t* index, int64_t count, size_t row_bytes,
                              void* out, CUstream_st* stream) {
  if (count == 0 || row_bytes == 0) return cudaSuccess;
  if (fits<uint4>(x, row_bytes) && fits<uint4>(out, row_bytes)) {
    return launch_gather<uint4>(x, x_rows, index, count, row_bytes, out, stream);
  }
  if (fits<uint32_t>(x, row_bytes) && fits<uint32_t>(out, row_bytes)) {
    return launch_gather<uint32_t>(x, x_rows, index, count, row_bytes, out, stream);
  }
  if (fits<uint16_t>(x, row_bytes) && fits<uint16_t>(out, row_bytes)) {
    return launch_gather<uint16_t>(x, x_rows, index, count, row_bytes, out, stream);
  }
  return launch_gather<uint8_t>(x, x_rows, index, count, row_bytes, out, stream);
}

int moetrain_cuda_combine_rows(const void* rows, int64_t num_rows, const float* weights, const int64_t* slot_row,
                               int64_t tokens, int64_t slots_per_token, int64_t width, int dtype, void* out,
                               CUstream_st* stream) {
  if (tokens == 0 || width == 0) return cudaSuccess;
  const size_t row_bytes = width * (dtype == 0 ? 4 : 2);
  const bool wide = fits<uint4>(rows, row_bytes) && fits<uint4>(out, row_bytes);
  const auto run = dtype == 0 ? (wide ? &launch_combine<float, 4> : &launch_combine<float, 1>)
                              : (wide ? &launch_combine<__nv_bfloat16, 8> : &launch_combine<__nv_bfloat16, 1>);
  return run(rows, num_rows, weights, slot_row, tokens, slots_per_token, width, out, stream);
}

int moetrain_cuda_combine_rows_backward(const void* grad, const void* rows, int64_t num_rows, const float* weights,
                                        const int64_t* slot_row, int64_t tokens, int64_t slots_per_token,
                                        int64_t width, int dtype, void* grad_rows, float* grad_weights,
                                        CUstream_st* stream) {
  if (tokens == 0) return cudaSuccess;
  const size_t row_bytes = width * (dtype == 0 ? 4 : 2);
  const bool wide =
      fits<uint4>(rows, row_bytes) && fits<uint4>(grad, row_bytes) && fits<uint4>(grad_rows, row_bytes);
  const auto run =
      dtype == 0 ? (wide ? &launch_combine_backward<float, 4> : &launch_combine_backward<float, 1>)
                 : (wide ? &launch_combine_backward<__nv_bfloat16, 8> : &launch_combine_backward<__nv_bfloat16, 1>);
  return run(grad, rows, num_rows, weights, slot_row, tokens, slots_per_token, width, grad_rows, grad_weights,
             stream);
}

const char* moetrain_cuda_error_string(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

}  // extern "C"
