// Blocks of 8 x 8 for the packing of both wide instruction sets. Eight rows at a time, not sixteen: rows a power of
// two apart fall into one set of a 12-way L1. For files compiled for AVX2, each with its own copy: hence the
// anonymous namespace.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/bf16.h"

namespace moetrain {
namespace {

struct PackAvx2 {
  static constexpr int64_t kSide = 8;

  static __m128 load4(const float* p) { return _mm_loadu_ps(p); }
  static __m128 load4(const bf16* p) {
    const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm_castsi128_ps(_mm_slli_epi32(_mm_cvtepu16_epi32(narrow), 16));
  }

  template <class T>
  static __m256 load4x2(const T* low, const T* high) {
    return _mm256_insertf128_ps(_mm256_castps128_ps256(load4(low)), load4(high), 1);
  }

  // Four steps of k: to[j * width + i] = rows[i][k + j] for i < 8, j < 4.
  template <class T>
  static void transpose8x4(const T* const* rows, int64_t k, float* to, int64_t width) {
    const __m256 r0 = load4x2(rows[0] + k, rows[4] + k), r1 = load4x2(rows[1] + k, rows[5] + k);
    const __m256 r2 = load4x2(rows[2] + k, rows[6] + k), r3 = load4x2(rows[3] + k, rows[7] + k);
    const __m256d low01 = _mm256_castps_pd(_mm256_unpacklo_ps(r0, r1));
    const __m256d top01 = _mm256_castps_pd(_mm256_unpackhi_ps(r0, r1));
    const __m256d low23 = _mm256_castps_pd(_mm256_unpacklo_ps(r2, r3));
    const __m256d top23 = _mm256_castps_pd(_mm256_unpackhi_ps(r2, r3));
    _mm256_storeu_ps(to, _mm256_castpd_ps(_mm256_unpacklo_pd(low01, low23)));
    _mm256_storeu_ps(to + width, _mm256_castpd_ps(_mm256_unpackhi_pd(low01, low23)));
    _mm256_storeu_ps(to + 2 * width, _mm256_castpd_ps(_mm256_unpacklo_pd(top01, top23)));
    _mm256_storeu_ps(to + 3 * width, _mm256_castpd_ps(_mm256_unpackhi_pd(top01, top23)));
  }

  template <class T>
  static void transpose(const T* const* rows, int64_t k, float* to, int64_t width) {
    transpose8x4(rows, k, to, width);
    transpose8x4(rows, k + 4, to + 4 * width, width);
  }

  template <class T>
  static void copy(const T* from, float* to) {
    _mm256_storeu_ps(to, load4x2(from, from + 4));
  }
};

}  // namespace
}  // namespace moetrain
