// Helpers of a warp, a block and single values.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

namespace moetrain_cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// Memory stays in bounds whatever the caller's indices are; torch's own indexing traps likewise.
__device__ inline void require(bool condition) {
  if (!condition) __trap();
}

__device__ inline int64_t warp_inclusive_scan(int64_t value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const int64_t below = __shfl_up_sync(kAllLanes, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

// Sum over a block of whole warps in a fixed tree; the result is valid in thread 0. `shared` holds a float a warp.
__device__ inline float block_sum(float value, float* shared) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_down_sync(kAllLanes, value, step);
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  value = 0;
  if (threadIdx.x == 0) {
    for (int w = 0; w < static_cast<int>(blockDim.x) / 32; ++w) value += shared[w];
  }
  __syncthreads();
  return value;
}

__device__ inline float widen(float x) { return x; }
__device__ inline float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

template <class T>
__device__ T narrow(float x);
template <>
__device__ inline float narrow<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 narrow<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

__device__ inline float silu(float x) { return x / (1.0f + expf(-x)); }

// kPack neighboring elements move in one access of up to 16 bytes.
template <class T, int kPack>
struct alignas(sizeof(T) * kPack) Pack {
  T value[kPack];
};

// Whether rows of `row_bytes` starting at p may be read in Units.
template <class Unit>
bool fits(const void* p, size_t row_bytes) {
  return (reinterpret_cast<uintptr_t>(p) | row_bytes) % sizeof(Unit) == 0;
}

}  // namespace moetrain_cuda
