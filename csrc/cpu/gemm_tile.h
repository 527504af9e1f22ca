// The register tile of the grouped GEMM: c[rows][columns] (+)= sum over k of a[k][rows] * b[k][columns].
// One loop over k in ascending order, one fused multiply-add an element and step: the bits of an element
// depend on its own row of a and column of b alone. Tiles are always computed whole (operands are padded
// with zeros), so a tail runs the very same instructions.
#pragma once

#include <cstdint>

namespace moetrain {

using TileFn = void (*)(const float* a, const float* b, int64_t k, float* c, int64_t c_stride, bool accumulate);

struct Tile {
  const char* isa;
  int rows;     // multiple of 4
  int columns;  // multiple of 4
  TileFn run;
};

Tile tile_base();
#if defined(__x86_64__)
Tile tile_avx2();
Tile tile_avx512();
#endif

// Vec: type, kWidth, zero, load, store, broadcast, multiply_add. Kept free of the standard library: an inline
// function of it compiled here with wide instructions could be picked by the linker for the whole library.
template <class Vec, int kRows, int kVectors>
inline void run_tile(const float* a, const float* b, int64_t k, float* c, int64_t c_stride, bool accumulate) {
  typename Vec::type acc[kRows][kVectors];
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      acc[r][v] = accumulate ? Vec::load(c + r * c_stride + v * Vec::kWidth) : Vec::zero();
    }
  }
  for (int64_t i = 0; i < k; ++i) {
    typename Vec::type column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = Vec::load(b + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const typename Vec::type row = Vec::broadcast(a[r]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec::multiply_add(row, column[v], acc[r][v]);
    }
    a += kRows;
    b += kVectors * Vec::kWidth;
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Vec::store(c + r * c_stride + v * Vec::kWidth, acc[r][v]);
  }
}

}  // namespace moetrain
