#include <immintrin.h>

#include "cpu/gemm_pack_avx2.h"
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
  // The broadcast as a part of the instruction; a compiler would share it between the vectors of a row.
  static type multiply_add(const float* x, type y, type z) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(z) : "v"(y), "m"(*x));
    return z;
  }
};

}  // namespace

// 28 of 32 registers accumulate. 24 x 16 is as fast in registers, but touches more rows of c than an L1 set has ways
// when these are a power of two apart: 15 % slower.
Tile tile_avx512() {
  return {14, 16, 32, &run_tile<Avx512, 14, 16, 2>, pack_fns<PackAvx2, float>(),
          pack_fns<PackAvx2, bf16>()};
}

}  // namespace moetrain
