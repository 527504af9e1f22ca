// Row movement on the GPU for the other torch-facing units. Arguments are checked by the caller, indices by the kernels.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace moetrain::cuda {

// x[index]; both contiguous.
at::Tensor gather(const at::Tensor& x, const at::Tensor& index, const char* op);

// Sum of each token's rows in slot order, weighted unless `weights` is empty; all contiguous.
at::Tensor combine(const at::Tensor& rows, const std::optional<at::Tensor>& weights, const at::Tensor& slot_row,
                   const char* op);

// The weights of a plan's slots: float32, of the shape of slot_row, made contiguous.
at::Tensor checked_weights(const at::Tensor& weights, const at::Tensor& slot_row, const at::Tensor& rows,
                           const char* op);

}  // namespace moetrain::cuda
