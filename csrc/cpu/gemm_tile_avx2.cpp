#include <immintrin.h>

#include "cpu/gemm_pack_avx2.h"
#include "cpu/gemm_tile.h"

namespace moetrain {
namespace {

struct Avx2 {
  using type = __m256;
  static constexpr int kWidth = 8;
  static type zero() { return _mm256_setzero_ps(); }
  static type load(const float* p) { return _mm256_loadu_ps(p); }
  static void store(float* p, type v) { _mm256_storeu_ps(p, v); }
  static type broadcast(float x) { return _mm256_set1_ps(x); }
  static type multiply_add(type x, type y, type z) { return _mm256_fmadd_ps(x, y, z); }
  static type multiply_add(const float* x, type y, type z) { return multiply_add(broadcast(*x), y, z); }
};

}  // namespace

// 12 of 16 registers accumulate.
Tile tile_avx2() {
  return {6, 8, 16, &run_tile<Avx2, 6, 8, 2>, pack_fns<PackAvx2, float>(), pack_fns<PackAvx2, bf16>()};
}

}  // namespace moetrain
