// Helpers of a warp.
#pragma once

#include <cstdint>

namespace moetrain_cuda {

__device__ inline int64_t warp_inclusive_scan(int64_t value, int lane) {
  for (int step = 1; step < 32; step *= 2) {
    const int64_t below = __shfl_up_sync(0xffffffffu, value, step);
    if (lane >= step) value += below;
  }
  return value;
}

}  // namespace moetrain_cuda
