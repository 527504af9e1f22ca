// Grouped products on the GPU for the other torch-facing units.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace moetrain::cuda {

enum class Product { kForward = 0, kInputGradient = 1, kWeightGradient = 2, kSwiglu = 3 };  // kinds of launch.h

// A matrix of routed rows, contiguous; with `index`, routed row r is row index[r] of it.
struct Routed {
  at::Tensor data;
  std::optional<at::Tensor> index;

  int64_t rows() const { return index ? index->size(0) : data.size(0); }
};

// Whether products of weights [E, n, k] with such rows go through torch's grouped product (see docs/how-to/extension.md).
bool through_torch(const at::Tensor& rows, int64_t n, int64_t k);

// The rows in order, when torch's product will take them: it cannot gather.
Routed prepared(const Routed& rows, bool for_torch, const char* op);

// x w^T or dy w, for weights w [E, n, k].
at::Tensor row_product(Product kind, const Routed& rows, const at::Tensor& w, const at::Tensor& tokens_per_expert,
                       const char* op);

// dy^T x of each expert: [E, dy columns, x columns].
at::Tensor weight_gradient(const Routed& grad, const Routed& x, const at::Tensor& tokens_per_expert, const char* op);

// h = SwiGLU(x w^T) [R, n / 2], and z = x w^T [R, n] if wanted, else [0, n].
struct Activated {
  at::Tensor h, z;
};
Activated swiglu_product(const Routed& x, const at::Tensor& w, const at::Tensor& tokens_per_expert, bool keep_z,
                         const char* op);

}  // namespace moetrain::cuda
