// Grouped GEMM in float32, torch-free: tiles through shared memory and plain fused multiply-adds, no tensor cores (TF32
// would drop bits). One block computes 128 x 128 of one expert's product, a thread 8 x 8 of it; the next tile travels
// in registers while this one is multiplied.
#include <cuda_runtime.h>

#include "cuda/groups.cuh"
#include "cuda/launch.h"

namespace {

using namespace moetrain_cuda;

constexpr int kTile = 128;  // of m and of n
constexpr int kDepth = 8;   // of k
constexpr int kThreads = 256;
constexpr int kHalf = kTile / 2;  // a thread computes rows and columns in both halves of the tile: 4 + 4
constexpr int kRun = kHalf;       // swiglu: the left half of a tile is gate, the right one up
constexpr int kLoads = kTile * kDepth / kThreads;
constexpr int kStride = kTile + 4;  // keeps float4 reads aligned and spreads the writes of a contiguous operand

// The elements of an operand's next tile that this thread carries. Neighboring threads read neighboring addresses.
template <bool kContiguous>
struct Carrier {
  Rows<float> rows;
  int outer, depth;
  const float* row[kContiguous ? kLoads : 1];  // start of the rows of a contiguous operand, null: outside
  int column;                         // of a strided one
  float value[kLoads];

  __device__ static int flat(int load) { return load * kThreads + static_cast<int>(threadIdx.x); }
  __device__ static int k_of(int load) { return kContiguous ? flat(load) % kDepth : flat(load) / kTile; }
  __device__ static int outer_of(int load) { return kContiguous ? flat(load) / kDepth : flat(load) % kTile; }

  __device__ void read(int k0) {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int k = k0 + k_of(i);
      if (kContiguous) {
        value[i] = row[i] && k < depth ? row[i][k] : 0.0f;
      } else {
        value[i] = column < outer && k < depth ? rows.at(rows.physical(k))[column] : 0.0f;
      }
    }
  }

  __device__ void write(float (*to)[kStride]) const {
#pragma unroll
    for (int i = 0; i < kLoads; ++i) to[k_of(i)][outer_of(i)] = value[i];
  }
};

__device__ void read_eight(float (&to)[8], const float* from) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float4 v = *reinterpret_cast<const float4*>(from + half * kHalf);
    to[4 * half] = v.x, to[4 * half + 1] = v.y, to[4 * half + 2] = v.z, to[4 * half + 3] = v.w;
  }
}

// Offset in the tile of the i-th of a thread's eight rows or columns.
__device__ int place(int thread, int i) { return thread * 4 + i % 4 + i / 4 * kHalf; }

__device__ void store_swiglu(const MoetrainGemm& p, const Tile<float>& t, int row, int column, float gate,
                             float up) {
  if (row >= t.m || column >= t.n) return;
  static_cast<float*>(p.h)[(t.first_row + row) * int64_t{t.n} + column] = silu(gate) * up;
  if (p.c == nullptr) return;
  float* const z = static_cast<float*>(p.c) + t.c + row * p.n + column;
  z[0] = gate;
  z[t.n] = up;
}

template <Kind kKind>
__device__ void store(const MoetrainGemm& p, const Tile<float>& t, const float (&acc)[8][8]) {
  const int down = threadIdx.x / 16, across = threadIdx.x % 16;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int row = t.m0 + place(down, i);
    if constexpr (kKind == kSwiglu) {
#pragma unroll
      for (int j = 0; j < 4; ++j) store_swiglu(p, t, row, t.n0 + across * 4 + j, acc[i][j], acc[i][j + 4]);
    } else {
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        const int column = t.n0 + place(across, j);
        if (row >= t.m || column >= t.n) continue;
        float* const to = static_cast<float*>(p.c) + t.c + int64_t{row} * t.n + column;
        *to = kKind == kWgrad && p.accumulate ? *to + acc[i][j] : acc[i][j];
      }
    }
  }
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads, 2) gemm_kernel(const MoetrainGemm p) {
  constexpr bool kContiguousA = kKind != kWgrad, kContiguousB = kKind == kFprop || kKind == kSwiglu;
  __shared__ __align__(16) float a[kDepth][kStride], b[kDepth][kStride];
  const Tile<float> t = locate<kKind, float, kTile, kTile>(p);
  if (!t.present) return;  // the whole block
  using CarrierA = Carrier<kContiguousA>;
  using CarrierB = Carrier<kContiguousB>;
  CarrierA from_a = {t.a, t.m, t.k, {}, t.m0 + CarrierA::outer_of(0), {}};
  CarrierB from_b = {t.b, t.n, t.k, {}, t.n0 + CarrierB::outer_of(0), {}};
#pragma unroll
  for (int i = 0; i < kLoads; ++i) {
    if constexpr (kContiguousA) {
      const int row = t.m0 + CarrierA::outer_of(i);
      from_a.row[i] = row < t.m ? t.a.at(t.a.physical(row)) : nullptr;
    }
    if constexpr (kContiguousB) {
      const int row = row_of_b<kKind, kRun>(CarrierB::outer_of(i), t.n0, t.n);
      from_b.row[i] = row >= 0 ? t.b.at(row) : nullptr;
    }
  }
  float acc[8][8] = {};
  from_a.read(0);
  from_b.read(0);
  for (int k0 = 0; k0 < t.k; k0 += kDepth) {
    from_a.write(a);
    from_b.write(b);
    __syncthreads();
    from_a.read(k0 + kDepth);
    from_b.read(k0 + kDepth);
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
      float left[8], right[8];
      read_eight(left, a[k] + threadIdx.x / 16 * 4);
      read_eight(right, b[k] + threadIdx.x % 16 * 4);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
#pragma unroll
        for (int j = 0; j < 8; ++j) acc[i][j] = fmaf(left[i], right[j], acc[i][j]);
      }
    }
    __syncthreads();
  }
  store<kKind>(p, t, acc);
}

template <Kind kKind>
int launch(const MoetrainGemm& p, cudaStream_t stream) {
  gemm_kernel<kKind><<<static_cast<unsigned>(blocks_of<kKind>(p, kTile, kTile)), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

extern "C" int moetrain_cuda_grouped_gemm_fp32(const MoetrainGemm* gemm, CUstream_st* stream) {
  if (too_large(*gemm)) return cudaErrorInvalidValue;
  if (nothing_to_do(*gemm)) return cudaSuccess;
  if (gemm->kind == kFprop) return launch<kFprop>(*gemm, stream);
  if (gemm->kind == kDgrad) return launch<kDgrad>(*gemm, stream);
  if (gemm->kind == kWgrad) return launch<kWgrad>(*gemm, stream);
  return launch<kSwiglu>(*gemm, stream);
}
