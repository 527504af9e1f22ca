#include <immintrin.h>

#include "cpu/attention_tile.h"

namespace moetrain {
namespace {

struct Avx2 {
  using type = __m256;
  static constexpr int kWidth = 8;
  static type zero() { return _mm256_setzero_ps(); }
  static type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  static type broadcast(float x) { return _mm256_set1_ps(x); }
  static float first(type x) { return _mm256_cvtss_f32(x); }
  static type add(type x, type y) { return _mm256_add_ps(x, y); }
  static type multiply(type x, type y) { return _mm256_mul_ps(x, y); }
  static type multiply_add(type x, type y, type z) { return _mm256_fmadd_ps(x, y, z); }
  static type max(type x, type y) { return _mm256_max_ps(x, y); }
  static type exp2(type x);

  static float sum_lanes(type x) {
    __m128 y = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_add_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_add_ss(y, _mm_movehdup_ps(y)));
  }

  static float max_lanes(type x) {
    __m128 y = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
    y = _mm_max_ps(y, _mm_movehl_ps(y, y));
    return _mm_cvtss_f32(_mm_max_ss(y, _mm_movehdup_ps(y)));
  }
};

// The exponent is written into the bits of a float: from -127 (zero) to 128 (infinity). max and min keep a NaN in
// their second operand.
inline __m256 Avx2::exp2(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(128.0f), _mm256_max_ps(_mm256_set1_ps(-127.0f), x));
  const __m256 whole = _mm256_floor_ps(x);
  const __m256i exponent = _mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127));
  return _mm256_mul_ps(exp2_fraction<Avx2>(_mm256_sub_ps(x, whole)),
                       _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23)));
}

}  // namespace

// 12 of 16 registers accumulate.
AttentionTile<float> attention_tile_avx2() { return float_attention_tile<Avx2, 6, 2>("avx2"); }

}  // namespace moetrain
