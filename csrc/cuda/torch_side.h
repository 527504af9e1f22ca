// What the torch-facing units of the CUDA kernels share. Uses c10's generic stream interface, not c10/cuda (whose
// headers do not compile in a CPU wheel), so that CI can compile these units without a CUDA torch.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/version.h>

#include "check.h"
#include "cuda/launch.h"

#define MOETRAIN_TORCH_BEFORE_2_13 (TORCH_VERSION_MAJOR == 2 && TORCH_VERSION_MINOR < 13)
#if MOETRAIN_TORCH_BEFORE_2_13
#include <c10/cuda/CUDAStream.h>
#endif

namespace moetrain::cuda {

using at::Tensor;

inline CUstream_st* current_stream(const Tensor& t) {
#if MOETRAIN_TORCH_BEFORE_2_13
  return c10::cuda::getCurrentCUDAStream(t.device().index()).stream();
#else
  const c10::impl::VirtualGuardImpl device(c10::DeviceType::CUDA);
  return static_cast<CUstream_st*>(device.getStream(t.device()).native_handle());
#endif
}

inline void check_launch(int error, const char* op) {
  TORCH_CHECK(error == 0, "moetrain: ", op, " on CUDA: ", moetrain_cuda_error_string(error));
}

inline int dtype_code(const Tensor& t) { return t.scalar_type() == at::kFloat ? 0 : 1; }

}  // namespace moetrain::cuda
