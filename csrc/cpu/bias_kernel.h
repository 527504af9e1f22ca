// Biases of grouped products, torch-free. Rows first[g] .. first[g + 1] belong to group g; `index` (may be null) says
// where row r lies in memory. T: float or bf16.
#pragma once

#include <cstdint>

#include "cpu/bf16.h"

namespace moetrain {

// rows[r] += bias[group of r], then max(., 0) if relu.
template <class T>
void add_bias(T* rows, const int64_t* index, const T* bias, const int64_t* first, int64_t groups, int64_t width,
              bool relu, int threads);

// out[g] = sum of the group's rows in their order, with float accumulators; zero for a group without rows.
template <class T>
void sum_rows(const T* rows, const int64_t* index, const int64_t* first, int64_t groups, int64_t width, T* out,
              int threads);

// grad[i] = 0 where activation[i] is 0.
template <class T>
void relu_backward(const T* activation, int64_t count, T* grad, int threads);

}  // namespace moetrain
