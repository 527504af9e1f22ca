// Torch-facing side of gemm_kernel. Legend: R rows sorted by expert, E experts, K in, N out (nn.Linear's [out, in]).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "check.h"
#include "cpu/groups.h"

namespace moetrain {
namespace {

using at::Tensor;

void check_weights(const Tensor& w, const Tensor& rows, const char* op) {
  check_dim(w, 3, op, "w");
  check_dtype(w, rows.scalar_type(), op, "w");
  check_same_device(w, rows, op, "w");
}

template <class T>
void fprop(const Tensor& x, const Tensor& w, const std::vector<int64_t>& first, const Tensor& y) {
  const int64_t N = w.size(1), K = w.size(2);
  multiply(fprop_groups<T>(data<T>(x), nullptr, data<T>(w), data<T>(y), first, N, K), gemm_threads(x.size(0) * N * K));
}

template <class T>
void dgrad(const Tensor& grad, const Tensor& w, const std::vector<int64_t>& first, const Tensor& dx) {
  const int64_t N = w.size(1), K = w.size(2);
  multiply(dgrad_groups<T>(data<T>(grad), nullptr, data<T>(w), data<T>(dx), first, N, K),
           gemm_threads(grad.size(0) * N * K));
}

template <class T>
void wgrad(const Tensor& grad, const Tensor& x, const std::vector<int64_t>& first, const Tensor& dw) {
  const int64_t N = grad.size(1), K = x.size(1);
  multiply(wgrad_groups<T, T>(data<T>(grad), nullptr, data<T>(x), nullptr, data<T>(dw), first, N, K, false),
           gemm_threads(std::max(grad.size(0), dw.size(0)) * N * K));
}

std::vector<int64_t> checked_groups(const Tensor& rows, const Tensor& tokens_per_expert, int64_t num_experts,
                                    const char* op) {
  check_groups(rows, tokens_per_expert, num_experts, op);
  return first_rows(tokens_per_expert, num_experts, rows.size(0), op);
}

Tensor grouped_gemm_op(const Tensor& x, const Tensor& w, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm";
  check_weights(w, x, op);
  const auto first = checked_groups(x, tokens_per_expert, w.size(0), op);
  MOETRAIN_CHECK(x.size(1) == w.size(2), op, ": x has ", x.size(1), " columns, w is ", w.sizes(), " ([E, out, in])");
  Tensor y = at::empty({x.size(0), w.size(1)}, x.options());
  const auto run = x.scalar_type() == at::kFloat ? &fprop<float> : &fprop<bf16>;
  run(x.contiguous(), w.contiguous(), first, y);
  return y;
}

Tensor grouped_gemm_dgrad(const Tensor& grad, const Tensor& w, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm dgrad";
  check_weights(w, grad, op);
  const auto first = checked_groups(grad, tokens_per_expert, w.size(0), op);
  MOETRAIN_CHECK(grad.size(1) == w.size(1), op, ": grad has ", grad.size(1), " columns, w is ", w.sizes());
  Tensor dx = at::empty({grad.size(0), w.size(2)}, grad.options());
  const auto run = grad.scalar_type() == at::kFloat ? &dgrad<float> : &dgrad<bf16>;
  run(grad.contiguous(), w.contiguous(), first, dx);
  return dx;
}

Tensor grouped_gemm_wgrad(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm wgrad";
  check_dim(x, 2, op, "x");
  check_dtype(x, grad.scalar_type(), op, "x");
  check_same_device(x, grad, op, "x");
  const int64_t num_experts = tokens_per_expert.numel();
  const auto first = checked_groups(grad, tokens_per_expert, num_experts, op);
  MOETRAIN_CHECK(grad.size(0) == x.size(0), op, ": grad has ", grad.size(0), " rows, x has ", x.size(0));
  Tensor dw = at::empty({num_experts, grad.size(1), x.size(1)}, grad.options());
  const auto run = grad.scalar_type() == at::kFloat ? &wgrad<float> : &wgrad<bf16>;
  run(grad.contiguous(), x.contiguous(), first, dw);
  return dw;
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
  m.impl("grouped_gemm", &grouped_gemm_op);
  m.impl("grouped_gemm_dgrad", &grouped_gemm_dgrad);
  m.impl("grouped_gemm_wgrad", &grouped_gemm_wgrad);
}

}  // namespace moetrain
