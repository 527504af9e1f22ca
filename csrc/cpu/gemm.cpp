// Torch-facing side of gemm_kernel. Legend: R rows sorted by expert, E experts, K in, N out (nn.Linear's [out, in]).
#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "check.h"
#include "cpu/gemm_kernel.h"

namespace moetrain {
namespace {

using at::Tensor;

// First row of every expert, and the total as the last entry.
std::vector<int64_t> first_rows(const Tensor& rows, const Tensor& tokens_per_expert, int64_t num_experts,
                                const char* op) {
  check_groups(rows, tokens_per_expert, num_experts, op);
  const Tensor counts = tokens_per_expert.contiguous();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  std::vector<int64_t> first(num_experts + 1, 0);
  for (int64_t e = 0; e < num_experts; ++e) {
    MOETRAIN_CHECK(count[e] >= 0, op, ": tokens_per_expert[", e, "] is ", count[e]);
    first[e + 1] = first[e] + count[e];
  }
  MOETRAIN_CHECK(first.back() == rows.size(0), op, ": tokens_per_expert sums to ", first.back(), ", there are ",
                 rows.size(0), " rows");
  return first;
}

void check_weights(const Tensor& w, const Tensor& rows, const char* op) {
  check_dim(w, 3, op, "w");
  check_dtype(w, rows.scalar_type(), op, "w");
  check_same_device(w, rows, op, "w");
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Threads of the intra-op pool, unless the whole product is too small to share.
int gemm_threads(int64_t multiply_adds) { return num_threads(multiply_adds / 64); }

template <class T>
void fprop(const Tensor& x, const Tensor& w, const std::vector<int64_t>& first, const Tensor& y) {
  const int64_t N = w.size(1), K = w.size(2);
  std::vector<Gemm<T>> groups;
  for (int64_t e = 0; e < w.size(0); ++e) {
    groups.push_back({{data<T>(x) + first[e] * K, K, true}, {data<T>(w) + e * N * K, K, true},
                      data<T>(y) + first[e] * N, N, first[e + 1] - first[e], N, K});
  }
  grouped_gemm(groups, gemm_threads(x.size(0) * N * K));
}

template <class T>
void dgrad(const Tensor& grad, const Tensor& w, const std::vector<int64_t>& first, const Tensor& dx) {
  const int64_t N = w.size(1), K = w.size(2);
  std::vector<Gemm<T>> groups;
  for (int64_t e = 0; e < w.size(0); ++e) {
    groups.push_back({{data<T>(grad) + first[e] * N, N, true}, {data<T>(w) + e * N * K, K, false},
                      data<T>(dx) + first[e] * K, K, first[e + 1] - first[e], K, N});
  }
  grouped_gemm(groups, gemm_threads(grad.size(0) * N * K));
}

template <class T>
void wgrad(const Tensor& grad, const Tensor& x, const std::vector<int64_t>& first, const Tensor& dw) {
  const int64_t N = grad.size(1), K = x.size(1);
  std::vector<Gemm<T>> groups;
  for (int64_t e = 0; e < dw.size(0); ++e) {
    groups.push_back({{data<T>(grad) + first[e] * N, N, false}, {data<T>(x) + first[e] * K, K, false},
                      data<T>(dw) + e * N * K, K, N, K, first[e + 1] - first[e]});
  }
  grouped_gemm(groups, gemm_threads(std::max(grad.size(0), dw.size(0)) * N * K));
}

Tensor grouped_gemm_op(const Tensor& x, const Tensor& w, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm";
  check_weights(w, x, op);
  const auto first = first_rows(x, tokens_per_expert, w.size(0), op);
  MOETRAIN_CHECK(x.size(1) == w.size(2), op, ": x has ", x.size(1), " columns, w is ", w.sizes(), " ([E, out, in])");
  Tensor y = at::empty({x.size(0), w.size(1)}, x.options());
  const auto run = x.scalar_type() == at::kFloat ? &fprop<float> : &fprop<bf16>;
  run(x.contiguous(), w.contiguous(), first, y);
  return y;
}

Tensor grouped_gemm_dgrad(const Tensor& grad, const Tensor& w, const Tensor& tokens_per_expert) {
  const char* op = "grouped_gemm dgrad";
  check_weights(w, grad, op);
  const auto first = first_rows(grad, tokens_per_expert, w.size(0), op);
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
  const auto first = first_rows(grad, tokens_per_expert, num_experts, op);
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
