#include "cpu/bias_kernel.h"

#include <algorithm>

#include "cpu/multi_isa.h"

namespace moetrain {
namespace {

constexpr int64_t kChunk = 256;  // columns whose sums stay in L1

template <class T>
inline __attribute__((always_inline)) void add_to_row(T* row, const T* bias, float lowest, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float sum = to_float(row[i]) + to_float(bias[i]);
    row[i] = from_float<T>(sum < lowest ? lowest : sum);
  }
}

template <class T>
inline __attribute__((always_inline)) void add_row(float* sums, const T* row, int64_t n) {
  for (int64_t i = 0; i < n; ++i) sums[i] += to_float(row[i]);
}

template <class T>
inline __attribute__((always_inline)) void narrow_row(const float* from, T* to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = from_float<T>(from[i]);
}

// A NaN is no zero: it stays visible.
template <class T>
inline __attribute__((always_inline)) void mask_row(const T* activation, T* grad, int64_t n) {
  for (int64_t i = 0; i < n; ++i) grad[i] = to_float(activation[i]) == 0.0f ? from_float<T>(0.0f) : grad[i];
}

#define MOETRAIN_CLONES(T)                                                                     \
  MOETRAIN_MULTI_ISA void run_bias(T* row, const T* bias, float lowest, int64_t n) {           \
    add_to_row(row, bias, lowest, n);                                                          \
  }                                                                                            \
  MOETRAIN_MULTI_ISA void run_sum(float* sums, const T* row, int64_t n) { add_row(sums, row, n); } \
  MOETRAIN_MULTI_ISA void run_narrow(const float* from, T* to, int64_t n) { narrow_row(from, to, n); } \
  MOETRAIN_MULTI_ISA void run_mask(const T* activation, T* grad, int64_t n) { mask_row(activation, grad, n); }
MOETRAIN_CLONES(float)
MOETRAIN_CLONES(bf16)

}  // namespace

template <class T>
void add_bias(T* rows, const int64_t* index, const T* bias, const int64_t* first, int64_t groups, int64_t width,
              bool relu, int threads) {
  const float lowest = relu ? 0.0f : -__builtin_inff();
#pragma omp parallel num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
#pragma omp for schedule(static) nowait
    for (int64_t r = first[g]; r < first[g + 1]; ++r) {
      run_bias(rows + (index ? index[r] : r) * width, bias + g * width, lowest, width);
    }
  }
}

template <class T>
void sum_rows(const T* rows, const int64_t* index, const int64_t* first, int64_t groups, int64_t width, T* out,
              int threads) {
#pragma omp parallel for collapse(2) schedule(dynamic) num_threads(threads)
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t begin = 0; begin < width; begin += kChunk) {
      const int64_t n = std::min(kChunk, width - begin);
      float sums[kChunk] = {};
      for (int64_t r = first[g]; r < first[g + 1]; ++r) run_sum(sums, rows + (index ? index[r] : r) * width + begin, n);
      run_narrow(sums, out + g * width + begin, n);
    }
  }
}

template <class T>
void relu_backward(const T* activation, int64_t count, T* grad, int threads) {
  constexpr int64_t kBlock = 4096;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    run_mask(activation + begin, grad + begin, std::min(kBlock, count - begin));
  }
}

#define MOETRAIN_INSTANTIATE(T)                                                                                      \
  template void add_bias<T>(T*, const int64_t*, const T*, const int64_t*, int64_t, int64_t, bool, int);              \
  template void sum_rows<T>(const T*, const int64_t*, const int64_t*, int64_t, int64_t, T*, int);                    \
  template void relu_backward<T>(const T*, int64_t, T*, int)
MOETRAIN_INSTANTIATE(float);
MOETRAIN_INSTANTIATE(bf16);

}  // namespace moetrain
