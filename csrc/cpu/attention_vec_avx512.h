// Sixteen floats, for the loops of attention_tile.h. In an unnamed namespace: compiled in every unit with its own flags.
#pragma once

#include <immintrin.h>

#include "cpu/attention_tile.h"

namespace moetrain {
namespace {

struct Avx512 {
  using type = __m512;
  static constexpr int kWidth = 16;
  static type zero() { return _mm512_setzero_ps(); }
  static type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, type v) { _mm512_storeu_ps(p, v); }
#if defined(__AVX512BF16__)
  static void store(bf16* p, type v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), (__m256i)_mm512_cvtneps_pbh(v));
  }
#endif
  static type broadcast(float x) { return _mm512_set1_ps(x); }
  static float first(type x) { return _mm512_cvtss_f32(x); }
  static type add(type x, type y) { return _mm512_add_ps(x, y); }
  static type multiply(type x, type y) { return _mm512_mul_ps(x, y); }
  static type multiply_add(type x, type y, type z) { return _mm512_fmadd_ps(x, y, z); }
  static type max(type x, type y) { return _mm512_max_ps(x, y); }
  static float sum_lanes(type x) { return _mm512_reduce_add_ps(x); }
  static float max_lanes(type x) { return _mm512_reduce_max_ps(x); }
  static type exp2(type x);
};

// reduce: x - floor(x), 0 for infinities; scalef: y * 2^floor(x), with overflow and underflow as they should be.
inline __m512 Avx512::exp2(__m512 x) {
  return _mm512_scalef_ps(exp2_fraction<Avx512>(_mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC)), x);
}

}  // namespace
}  // namespace moetrain
