// Torch-facing helpers of the grouped products: which rows an expert has, and which engine multiplies.
#pragma once

#include <ATen/core/Tensor.h>

#include <vector>

#include "check.h"
#include "cpu/gemm_amx.h"
#include "cpu/gemm_kernel.h"
#include "cpu/isa.h"

namespace moetrain {

// First row of every expert, and the total as the last entry: num_rows.
inline std::vector<int64_t> first_rows(const at::Tensor& tokens_per_expert, int64_t num_rows, const char* op) {
  const at::Tensor counts = tokens_per_expert.contiguous();
  const int64_t* count = counts.const_data_ptr<int64_t>();
  std::vector<int64_t> first(counts.numel() + 1, 0);
  for (int64_t e = 0; e < counts.numel(); ++e) {
    MOETRAIN_CHECK(count[e] >= 0, op, ": tokens_per_expert[", e, "] is ", count[e]);
    first[e + 1] = first[e] + count[e];
  }
  MOETRAIN_CHECK(first.back() == num_rows, op, ": tokens_per_expert sums to ", first.back(), ", there are ",
                 num_rows, " rows");
  return first;
}

template <class T>
T* data(const at::Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}

// Threads of the intra-op pool, unless the whole product is too small to share.
inline int gemm_threads(int64_t multiply_adds) { return num_threads(multiply_adds / 64); }

template <class T, class Out>
void multiply(const std::vector<Gemm<T, Out>>& groups, int threads) {
#if defined(__x86_64__)
  if constexpr (std::is_same_v<T, bf16>) {
    if (widest_isa() == Isa::kAmx) {
      std::vector<amx::Product<Out>> products;
      for (const Gemm<T, Out>& g : groups) {
        products.push_back({{g.a}, {g.b}, g.c, g.c_stride, g.m, g.n, g.k, g.c_index, g.accumulate});
      }
      return amx::grouped_gemm(products, threads);
    }
  }
#endif
  grouped_gemm(groups, threads);
}

// The three products of one expert whose rows start at `first`; `token` says which row of x (or grad) each one
// is made from, or is null.
// Weights are [E, N, K], nn.Linear's [out, in].
template <class T>
std::vector<Gemm<T>> fprop_groups(const T* x, const int64_t* token, const T* w, T* y, const std::vector<int64_t>& first,
                                  int64_t N, int64_t K) {
  std::vector<Gemm<T>> groups;
  for (size_t e = 0; e + 1 < first.size(); ++e) {
    const int64_t r = first[e];
    groups.push_back({{token ? x : x + r * K, K, true, token ? token + r : nullptr},
                      {w + static_cast<int64_t>(e) * N * K, K, true},
                      y + r * N, N, first[e + 1] - r, N, K});
  }
  return groups;
}

template <class T>
std::vector<Gemm<T>> dgrad_groups(const T* grad, const int64_t* token, const T* w, T* dx,
                                  const std::vector<int64_t>& first, int64_t N, int64_t K) {
  std::vector<Gemm<T>> groups;
  for (size_t e = 0; e + 1 < first.size(); ++e) {
    const int64_t r = first[e];
    groups.push_back({{token ? grad : grad + r * N, N, true, token ? token + r : nullptr},
                      {w + static_cast<int64_t>(e) * N * K, K, false},
                      dx + r * K, K, first[e + 1] - r, K, N});
  }
  return groups;
}

template <class T, class Out>
std::vector<Gemm<T, Out>> wgrad_groups(const T* grad, const int64_t* grad_token, const T* x, const int64_t* x_token,
                                       Out* dw, const std::vector<int64_t>& first, int64_t N, int64_t K,
                                       bool accumulate) {
  std::vector<Gemm<T, Out>> groups;
  for (size_t e = 0; e + 1 < first.size(); ++e) {
    const int64_t r = first[e];
    groups.push_back({{grad_token ? grad : grad + r * N, N, false, grad_token ? grad_token + r : nullptr},
                      {x_token ? x : x + r * K, K, false, x_token ? x_token + r : nullptr},
                      dw + static_cast<int64_t>(e) * N * K, K, N, K, first[e + 1] - r, nullptr, accumulate});
  }
  return groups;
}

}  // namespace moetrain
