// The activation between the two products of an expert, torch-free: forward for products that do not compute it
// themselves, and backward together with the routing weights. Memory-bound: one pass over everything, 16 bytes an access.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace {

using namespace moetrain_cuda;

// Whole warps, as many as a row keeps busy. Depends on the width alone, and so does the order of the sum over a row.
unsigned threads_for(int64_t packs) {
  constexpr int64_t kMost = 256;
  return static_cast<unsigned>(packs >= kMost ? kMost : packs <= 32 ? 32 : (packs + 31) / 32 * 32);
}

template <class T, int kPack>
__global__ void swiglu_kernel(const Pack<T, kPack>* z, int64_t packs, Pack<T, kPack>* h) {
  const int64_t row = blockIdx.x;
  for (int64_t i = threadIdx.x; i < packs; i += blockDim.x) {
    const Pack<T, kPack> gate = z[row * 2 * packs + i], up = z[(row * 2 + 1) * packs + i];
    Pack<T, kPack> to;
#pragma unroll
    for (int p = 0; p < kPack; ++p) to.value[p] = narrow<T>(silu(widen(gate.value[p])) * widen(up.value[p]));
    h[row * packs + i] = to;
  }
}

template <class T, int kPack>
struct Backward {
  using P = Pack<T, kPack>;
  const P* z;
  const P* dh;
  const float* weights;
  const int64_t* slot_row;
  int64_t num_rows, packs;
  P* hw;  // may be dh: a thread reads its elements before it writes them
  P* dz;
  float* grad_weights;
};

// One block a slot. A row belongs to one slot, so every row is written once.
template <class T, int kPack>
__global__ void swiglu_backward_kernel(const Backward<T, kPack> b) {
  __shared__ float partial[32];
  const int64_t slot = blockIdx.x, row = b.slot_row[slot];
  if (row < 0) {  // the same for the whole block
    if (b.grad_weights && threadIdx.x == 0) b.grad_weights[slot] = 0;
    return;
  }
  require(row < b.num_rows);
  const float weight = b.weights ? b.weights[slot] : 1.0f;
  float dot = 0;
  for (int64_t i = threadIdx.x; i < b.packs; i += blockDim.x) {
    const Pack<T, kPack> gate = b.z[row * 2 * b.packs + i], up = b.z[(row * 2 + 1) * b.packs + i];
    Pack<T, kPack> grad = {}, weighted, d_gate, d_up;
    if (b.dh) grad = b.dh[row * b.packs + i];
#pragma unroll
    for (int p = 0; p < kPack; ++p) {
      const float g = widen(gate.value[p]), u = widen(up.value[p]), d = widen(grad.value[p]);
      const float sigmoid = 1.0f / (1.0f + expf(-g));
      const float h = widen(narrow<T>(silu(g) * u));  // as fc2 saw it
      weighted.value[p] = narrow<T>(weight * h);
      dot += d * h;
      d_gate.value[p] = narrow<T>(weight * d * u * sigmoid * (1.0f + g * (1.0f - sigmoid)));
      d_up.value[p] = narrow<T>(weight * d * (g * sigmoid));
    }
    if (b.hw) b.hw[row * b.packs + i] = weighted;
    if (b.dz) {
      b.dz[row * 2 * b.packs + i] = d_gate;
      b.dz[(row * 2 + 1) * b.packs + i] = d_up;
    }
  }
  if (b.grad_weights == nullptr) return;
  const float total = block_sum(dot, partial);
  if (threadIdx.x == 0) b.grad_weights[slot] = total;
}

template <class T, int kPack>
int launch_swiglu(const void* z, int64_t rows, int64_t width, void* h, cudaStream_t stream) {
  using P = Pack<T, kPack>;
  swiglu_kernel<T, kPack><<<static_cast<unsigned>(rows), threads_for(width / kPack), 0, stream>>>(
      static_cast<const P*>(z), width / kPack, static_cast<P*>(h));
  return cudaGetLastError();
}

template <class T, int kPack>
int launch_backward(const void* z, const void* dh, int64_t num_rows, const float* weights, const int64_t* slot_row,
                    int64_t slots, int64_t width, void* hw, void* dz, float* grad_weights, cudaStream_t stream) {
  using P = Pack<T, kPack>;
  const Backward<T, kPack> b = {static_cast<const P*>(z), static_cast<const P*>(dh), weights,
                                slot_row, num_rows, width / kPack, static_cast<P*>(hw), static_cast<P*>(dz),
                                grad_weights};
  swiglu_backward_kernel<T, kPack><<<static_cast<unsigned>(slots), threads_for(width / kPack), 0, stream>>>(b);
  return cudaGetLastError();
}

}  // namespace

extern "C" {

int moetrain_cuda_swiglu(const void* z, int64_t rows, int64_t width, int dtype, void* h, CUstream_st* stream) {
  if (rows == 0 || width == 0) return cudaSuccess;
  const size_t row_bytes = width * (dtype == 0 ? 4 : 2);
  const bool wide = fits<uint4>(z, row_bytes) && fits<uint4>(h, row_bytes);
  const auto run = dtype == 0 ? (wide ? &launch_swiglu<float, 4> : &launch_swiglu<float, 1>)
                              : (wide ? &launch_swiglu<__nv_bfloat16, 8> : &launch_swiglu<__nv_bfloat16, 1>);
  return run(z, rows, width, h, stream);
}

int moetrain_cuda_swiglu_backward(const void* z, const void* dh, int64_t num_rows, const float* weights,
                                  const int64_t* slot_row, int64_t slots, int64_t width, int dtype, void* hw, void* dz,
                                  float* grad_weights, CUstream_st* stream) {
  if (slots == 0) return cudaSuccess;
  const size_t row_bytes = width * (dtype == 0 ? 4 : 2);
  // Null pointers are aligned.
  const bool wide = fits<uint4>(z, row_bytes) && fits<uint4>(dh, row_bytes) && fits<uint4>(hw, row_bytes) &&
                    fits<uint4>(dz, row_bytes);
  const auto run = dtype == 0 ? (wide ? &launch_backward<float, 4> : &launch_backward<float, 1>)
                              : (wide ? &launch_backward<__nv_bfloat16, 8> : &launch_backward<__nv_bfloat16, 1>);
  return run(z, dh, num_rows, weights, slot_row, slots, width, hw, dz, grad_weights, stream);
}

}  // extern "C"
