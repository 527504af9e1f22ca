// Grouped GEMM on the CPU, torch-free: for every group g, c_g[m][n] = sum over k of a_g[m][k] * b_g[n][k],
// with float accumulators and k ascending, whatever the blocking, the tails and the number of threads.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/bf16.h"

namespace moetrain {

// A matrix [outer][reduction]. Element (i, k) is data[i * stride + k] when the reduction axis is contiguous,
// data[k * stride + i] otherwise. With an index, row r of memory is index[r] instead: a gather that costs nothing,
// because operands are packed anyhow.
template <class T>
struct Operand {
  const T* data;
  int64_t stride;
  bool reduction_contiguous;
  const int64_t* index = nullptr;
};

template <class T, class Out = T>
struct Gemm {
  Operand<T> a;
  Operand<T> b;
  Out* c;  // [m][n], rows c_stride apart
  int64_t c_stride;
  int64_t m, n, k;
  const int64_t* c_index = nullptr;  // row i goes to row c_index[i]
  bool accumulate = false;           // c += instead of c =
};

template <class T>
void grouped_gemm(const std::vector<Gemm<T>>& groups, int threads);

// "avx512", "avx2" or "base": what this CPU has, or less by MOETRAIN_CPU_ISA (for tests).
const char* gemm_isa();

}  // namespace moetrain
