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
void fprop(const Tensor& x, const Tensor& w, const std::vector<int64_t>& first, const int64_t* source,
           const Tensor& y) {
  const int64_t N = w.size(1), K = w.size(2);
  multiply(fprop_groups(data<T>(x), source, data<T>(w), data<T>(y), first, N, K), gemm_threads(y.size(0) * N * K));
}

template <class T>
void dgrad(const Tensor& grad, const Tensor& w, const std::vector<int64_t>& first, const Tensor& dx) {
  const int64_t N = w.size(1), K = w.size(2);
  multiply(dgrad_groups<T>(data<T>(grad), nullptr, data<T>(w), data<T>(dx), first, N, K),
           gemm_threads(grad.size(0) * N * K));
}

template <class T, class Out>
void wgrad(const Tensor& grad, const Tensor& x, const std::vector<int64_t>& first, const Tensor& dw,
           bool accumulate) {
  const int64_t N = grad.size(1), K = x.size(1);
  multiply(wgrad_groups<T, Out>(data<T>(grad), nullptr, data<T>(x), nullptr, data<Out>(dw), first, N, K, accumulate),
           gemm_threads(std::max(grad.size(0), dw.size(0)) * N * K));
}

Tensor fprop_op(const Tensor& x, const Tensor& w, const Tensor& tokens_per_expert, const Tensor& source,
                const char* op) {
  check_groups(x, tokens_per_expert, w.size(0), op);
  MOETRAIN_CHECK(x.size(1) == w.size(2), op, ": x has ", x.size(1), " columns, w is ", w.sizes(), " ([E, out, in])");
  const int64_t num_rows = source.defined() ? source.size(0) : x.size(0);
  const auto first = first_rows(tokens_per_expert, num_rows, op);
  Tensor y = at::empty({num_rows, w.size(1)}, x.options());
  const auto run = x.scalar_type() == at::kFloat ? &fprop<float> : &fprop<bf16>;
  run(x.contiguous(), w.contiguous(), first, source.defined() ? source.const_data_ptr<int64_t>() : nullptr, y);
  return y;
}

Tensor grouped_gemm_op(const Tensor& x, const Tensor& w, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm";
  check_weights(w, x, op);
  return fprop_op(x, w, tokens_per_expert, {}, op);
}

Tensor gathered_grouped_gemm(const Tensor& x, const Tensor& w, const Tensor& row_source,
                             const Tensor& tokens_per_expert) {
  const char* op = "gathered_grouped_gemm";
  check_weights(w, x, op);
  const Tensor source = checked_index(row_source, 1, x, op, "row_source");
  const int64_t* row = source.const_data_ptr<int64_t>();
  for (int64_t r = 0; r < source.numel(); ++r) {
    MOETRAIN_CHECK(row[r] >= 0 && row[r] < x.size(0), op, ": row_source[", r, "] is ", row[r], ", x has ",
                   x.size(0), " rows");
  }
  return fprop_op(x, w, tokens_per_expert, source, op);
}

Tensor grouped_gemm_dgrad(const Tensor& grad, const Tensor& w, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm dgrad";
  check_weights(w, grad, op);
  check_groups(grad, tokens_per_expert, w.size(0), op);
  const auto first = first_rows(tokens_per_expert, grad.size(0), op);
  MOETRAIN_CHECK(grad.size(1) == w.size(1), op, ": grad has ", grad.size(1), " columns, w is ", w.sizes());
  Tensor dx = at::empty({grad.size(0), w.size(2)}, grad.options());
  const auto run = grad.scalar_type() == at::kFloat ? &dgrad<float> : &dgrad<bf16>;
  run(grad.contiguous(), w.contiguous(), first, dx);
  return dx;
}

// dw: [E, N, K] in the dtype of the operands or float32.
void wgrad_into(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert, const Tensor& dw,
                bool accumulate, const char* op) {
  const auto first = first_rows(tokens_per_expert, grad.size(0), op);
  const auto run = grad.scalar_type() == at::kFloat ? &wgrad<float, float>
                   : dw.scalar_type() == at::kFloat ? &wgrad<bf16, float>
                                                    : &wgrad<bf16, bf16>;
  run(grad.contiguous(), x.contiguous(), first, dw, accumulate);
}

void check_wgrad(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert, const char* op) {
  check_dim(x, 2, op, "x");
  check_dtype(x, grad.scalar_type(), op, "x");
  check_same_device(x, grad, op, "x");
  check_groups(grad, tokens_per_expert, tokens_per_expert.numel(), op);
  MOETRAIN_CHECK(grad.size(0) == x.size(0), op, ": grad has ", grad.size(0), " rows, x has ", x.size(0));
}

Tensor grouped_gemm_wgrad(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm wgrad";
  check_wgrad(grad, x, tokens_per_expert, op);
  Tensor dw = at::empty({tokens_per_expert.numel(), grad.size(1), x.size(1)}, grad.options());
  wgrad_into(grad, x, tokens_per_expert, dw, false, op);
  return dw;
}

void grouped_gemm_wgrad_out(const Tensor& grad, const Tensor& x, const Tensor& tokens_per_expert, const Tensor& out,
                            bool accumulate) {
  const char* op = "grouped_gemm_wgrad_out";
  check_wgrad(grad, x, tokens_per_expert, op);
  check_same_device(out, grad, op, "out");
  MOETRAIN_CHECK(out.scalar_type() == grad.scalar_type() || out.scalar_type() == at::kFloat, op,
                 ": out must be Float or the dtype of grad, ", grad.scalar_type(), "; it is ", out.scalar_type());
  const std::vector<int64_t> shape{tokens_per_expert.numel(), grad.size(1), x.size(1)};
  MOETRAIN_CHECK(out.sizes() == at::IntArrayRef(shape) && out.is_contiguous(), op, ": out must be contiguous ",
                 at::IntArrayRef(shape), ", it has shape ", out.sizes(), " and strides ", out.strides());
  wgrad_into(grad, x, tokens_per_expert, out, accumulate, op);
}

}  // namespace

TORCH_LIBRARY_IMPL(moetrain, CPU, m) {
  m.impl("grouped_gemm", &grouped_gemm_op);
  m.impl("grouped_gemm_dgrad", &grouped_gemm_dgrad);
  m.impl("grouped_gemm_wgrad", &grouped_gemm_wgrad);
  m.impl("gathered_grouped_gemm", &gathered_grouped_gemm);
  m.impl("grouped_gemm_wgrad_out", &grouped_gemm_wgrad_out);
}

}  // namespace moetrain
