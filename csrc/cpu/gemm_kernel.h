// Grouped GEMM on the CPU, torch-free: for every group g, c_g[m][n] = sum over k of a_g[m][k] * b_g[n][k],
// with float accumulators and k ascending, whatever the blocking, the tails and the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/bf16.h"

namespace moetrain {

// A matrix [outer][reduction]. Element (i, k) is data[i * stride + k] when the reduction axis is contiguous,
// data[k * stride + i] otherwise. `index`, when given, names the physical row of a logical one, a row being what
// `stride` steps over: data[index[i] * stride + k], or data[index[k] * stride + i].
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  bool reduction_contiguous;
  const int64_t* index = nullptr;

  const T* row(int64_t r) const { return data + (index ? index[r] : r) * stride; }
};

// Out is T or float: a weight gradient of bf16 operands may be kept, and added to, in float.
template <class T, class Out = T>
struct Gemm {
  Operand<T> a;
  Operand<T> b;
  Out* c;  // [m][n], rows c_stride apart
  int64_t c_stride;
  int64_t m, n, k;
  const int64_t* c_index = nullptr;  // row i goes to row c_index[i] of c; no two to the same one
  bool accumulate = false;           // c = c + product, the bits of that one sum, instead of c = product

  Out* c_row(int64_t r) const { return c + (c_index ? c_index[r] : r) * c_stride; }
};

// No two groups may write the same element of c.
template <class T, class Out>
void grouped_gemm(const std::vector<Gemm<T, Out>>& groups, int threads);

}  // namespace moetrain
