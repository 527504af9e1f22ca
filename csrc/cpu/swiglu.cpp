#include "cpu/swiglu.h"

#include "cpu/multi_isa.h"

namespace moetrain {
namespace {

constexpr int kLanes = 16;

// e^x by a polynomial on [-ln 2 / 2, ln 2 / 2] (Cephes' expf); written so that compilers vectorise it.
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x > 87.0f ? 87.0f : x;
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: rounds to an integer in the low bits
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  int32_t bits;
  __builtin_memcpy(&bits, &shifted, sizeof bits);
  bits = (bits - 0x4b400000 + 127) << 23;
  float scale;
  __builtin_memcpy(&scale, &bits, sizeof scale);
  return p * scale;
}

// NaN goes through the product with the gate itself.
inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

template <class T>
inline __attribute__((always_inline)) void swiglu_row(const T* z, int64_t width, T* hidden) {
  for (int64_t f = 0; f < width; ++f) {
    const float gate = to_float(z[f]);
    hidden[f] = from_float<T>(gate * sigmoid(gate) * to_float(z[width + f]));
  }
}

template <class T>
inline __attribute__((always_inline)) float swiglu_backward_row(const T* z, float weight, int64_t width, T* dh,
                                                                T* dz) {
  float dots[kLanes] = {};
  for (int64_t first = 0; first < width; first += kLanes) {
    const int64_t count = width - first < kLanes ? width - first : kLanes;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t f = first + i;
      const float gate = to_float(z[f]), up = to_float(z[width + f]), gradient = to_float(dh[f]);
      const float sig = sigmoid(gate), silu = gate * sig, weighted = gradient * weight;
      dots[i] += gradient * (silu * up);
      dz[f] = from_float<T>(weighted * up * (sig * (1.0f + gate * (1.0f - sig))));
      dz[width + f] = from_float<T>(weighted * silu);
      dh[f] = from_float<T>(silu * up * weight);
    }
  }
  float sum = 0;
  for (const float dot : dots) sum += dot;
  return sum;
}

MOETRAIN_MULTI_ISA void run(const float* z, int64_t width, float* hidden) { swiglu_row(z, width, hidden); }
MOETRAIN_MULTI_ISA void run(const bf16* z, int64_t width, bf16* hidden) { swiglu_row(z, width, hidden); }
MOETRAIN_MULTI_ISA float run_backward(const float* z, float weight, int64_t width, float* dh, float* dz) {
  return swiglu_backward_row(z, weight, width, dh, dz);
}
MOETRAIN_MULTI_ISA float run_backward(const bf16* z, float weight, int64_t width, bf16* dh, bf16* dz) {
  return swiglu_backward_row(z, weight, width, dh, dz);
}

}  // namespace

template <class T>
void swiglu(const T* z, int64_t rows, int64_t width, T* hidden, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) run(z + r * 2 * width, width, hidden + r * width);
}

template <class T>
void swiglu_backward(const T* z, const float* weights, const int64_t* row_slot, int64_t rows, int64_t width, T* dh,
                     T* dz, float* dweights, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; ++r) {
    const float weight = weights ? weights[row_slot[r]] : 1.0f;
    const float dot = run_backward(z + r * 2 * width, weight, width, dh + r * width, dz + r * 2 * width);
    if (dweights) dweights[row_slot[r]] = dot;
  }
}

template void swiglu<float>(const float*, int64_t, int64_t, float*, int);
template void swiglu<bf16>(const bf16*, int64_t, int64_t, bf16*, int);
template void swiglu_backward<float>(const float*, const float*, const int64_t*, int64_t, int64_t, float*, float*,
                                     float*, int);
template void swiglu_backward<bf16>(const bf16*, const float*, const int64_t*, int64_t, int64_t, bf16*, bf16*, float*,
                                    int);

}  // namespace moetrain
