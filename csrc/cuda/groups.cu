// What torch's grouped product needs beside the operands: where groups end, and zeros where none is. Torch-free.
#include <cuda_runtime.h>

#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace {

using namespace moetrain_cuda;

constexpr int kThreads = 256;

// One warp. Counts that exceed the rows are cut, so that nothing is read beyond them.
__global__ void ends_kernel(const int64_t* tokens_per_expert, int64_t experts, int64_t rows, int32_t* ends) {
  const int lane = threadIdx.x;
  int64_t before = 0;
  for (int64_t base = 0; base < experts; base += 32) {
    const int64_t e = base + lane;
    const int64_t count = e < experts ? max(tokens_per_expert[e], int64_t{0}) : 0;
    const int64_t upto = warp_inclusive_scan(count, lane);
    if (e < experts) ends[e] = static_cast<int32_t>(min(before + upto, rows));
    before += __shfl_sync(kAllLanes, upto, 31);
  }
}

template <class Unit>
__global__ void zero_kernel(const int32_t* end, int64_t units, Unit* c) {
  const int64_t row = blockIdx.x;
  if (row < *end) return;
  for (int64_t i = threadIdx.x; i < units; i += blockDim.x) c[row * units + i] = 0;
}

}  // namespace

extern "C" {

int moetrain_cuda_group_ends(const int64_t* tokens_per_expert, int64_t experts, int64_t rows, int32_t* ends,
                             CUstream_st* stream) {
  if (experts == 0) return cudaSuccess;
  ends_kernel<<<1, 32, 0, stream>>>(tokens_per_expert, experts, rows, ends);
  return cudaGetLastError();
}

int moetrain_cuda_zero_unclaimed(const int32_t* ends, int64_t experts, int64_t rows, size_t row_bytes, void* c,
                                 CUstream_st* stream) {
  if (experts == 0 || rows == 0 || row_bytes == 0) return cudaSuccess;
  // bfloat16 at least, so rows are whole units of two bytes.
  zero_kernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(
      ends + experts - 1, static_cast<int64_t>(row_bytes / sizeof(uint16_t)), static_cast<uint16_t*>(c));
  return cudaGetLastError();
}

}  // extern "C"
