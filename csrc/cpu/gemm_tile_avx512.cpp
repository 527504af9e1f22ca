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
  // The broadcast as a part of the multiply-add. A compiler would share one broadcast between the two vectors of a
  // row: 44 instructions a step of k instead of 30, measured 6 % slower where hyper-threads share the core.
  static type multiply_add(const float* x, type y, type z) {
    asm("vfmadd231ps %2%{1to16%}, %1, %0" : "+v"(z) : "v"(y), "m"(*x));
    return z;
  }
};

}  // namespace

// 28 of 32 registers accumulate. Fewer rows and more columns would leave broadcasts to hide; more rows and fewer columns
// (24 x 16) touch more rows of c than an L1 set has ways when these are a power of two apart.
Tile tile_avx512() {
  return {"avx512", 14, 16, 32, &run_tile<Avx512, 14, 16, 2>, pack_fns<PackAvx2, float>(),
          pack_fns<PackAvx2, bf16>()};
}

}  // namespace moetrain
