#include <immintrin.h>

#include "cpu/gemm_tile.h"

namespace moetrain {
namespace {

struct Avx512 {
  using type = __m512;
  static constexpr int kWidth = 16;
  static type zero() { return _mm512_setzero_ps(); }
  static type load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, type v) { _mm512_storeu_ps(p, v); }
  static type broadcast(float x) { return _mm512_set1_ps(x); }
  static type multiply_add(type x, type y, type z) { return _mm512_fmadd_ps(x, y, z); }
};

}  // namespace

// 24 of 32 registers accumulate.
Tile tile_avx512() { return {"avx512", 12, 32, &run_tile<Avx512, 12, 2>}; }

}  // namespace moetrain
