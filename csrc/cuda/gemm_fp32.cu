// Grouped GEMM in float32, torch-free: plain tiles through shared memory, no tensor cores (TF32 would drop bits).
#include <cuda_runtime.h>

#include "cuda/groups.cuh"
#include "cuda/launch.h"

namespace {

using namespace moetrain_cuda;

constexpr int kTile = 64;   // of m and of n
constexpr int kDepth = 16;  // of k
constexpr int kThreads = 256;
constexpr int kEach = 4;    // outputs a thread, in m and in n

// to[k][i] = element (outer0 + i, k0 + k) of the operand, zero outside of it.
template <bool kContiguous>
__device__ void load_tile(const float* from, int64_t stride, int64_t outer0, int64_t outer, int64_t k0, int64_t depth,
                          float (*to)[kTile + 4]) {
#pragma unroll
  for (int step = 0; step < kTile * kDepth / kThreads; ++step) {
    const int flat = step * kThreads + threadIdx.x;
    // Neighbouring threads read neighbouring addresses.
    const int k = kContiguous ? flat % kDepth : flat / kTile;
    const int i = kContiguous ? flat / kDepth : flat % kTile;
    const bool inside = outer0 + i < outer && k0 + k < depth;
    const int64_t at = kContiguous ? (outer0 + i) * stride + k0 + k : (k0 + k) * stride + outer0 + i;
    to[k][i] = inside ? from[at] : 0.0f;
  }
}

template <Kind kKind>
__global__ void __launch_bounds__(kThreads) gemm_kernel(Problem<float> problem) {
  __shared__ float a[kDepth][kTile + 4], b[kDepth][kTile + 4];
  const Tile<float> t = locate<kKind, float, kTile, kTile>(problem);
  if (!t.present) return;  // the whole block
  const int row = threadIdx.x / 16 * kEach, column = threadIdx.x % 16 * kEach;
  float acc[kEach][kEach] = {};
  for (int64_t k0 = 0; k0 < t.k; k0 += kDepth) {
    load_tile<kKind != kWgrad>(t.a, t.a_stride, t.m0, t.m, k0, t.k, a);
    load_tile<kKind == kFprop>(t.b, t.b_stride, t.n0, t.n, k0, t.k, b);
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
#pragma unroll
        for (int j = 0; j < kEach; ++j) acc[i][j] = fmaf(a[k][row + i], b[k][column + j], acc[i][j]);
      }
    }
    __syncthreads();
  }
  for (int i = 0; i < kEach; ++i) {
    for (int j = 0; j < kEach; ++j) {
      const int64_t m = t.m0 + row + i, n = t.n0 + column + j;
      if (m < t.m && n < t.n) t.c[m * t.c_stride + n] = acc[i][j];
    }
  }
}

template <Kind kKind>
int launch(const Problem<float>& p, cudaStream_t stream) {
  gemm_kernel<kKind><<<grid_of<kKind>(p, kTile, kTile), kThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace

extern "C" int moetrain_cuda_grouped_gemm_fp32(int kind, const void* a, const void* b, void* c,
                                               const int64_t* tokens_per_expert, int64_t rows, int64_t experts,
                                               int64_t n, int64_t k, CUstream_st* stream) {
  const Problem<float> p = {static_cast<const float*>(a), static_cast<const float*>(b), static_cast<float*>(c),
                            tokens_per_expert, static_cast<int>(experts), rows, n, k};
  if (nothing_to_do(kind, p)) return cudaSuccess;
  if (kind == kFprop) return launch<kFprop>(p, stream);
  if (kind == kDgrad) return launch<kDgrad>(p, stream);
  return launch<kWgrad>(p, stream);
}
