// What the grouped GEMM needs of an instruction set: the register tile and the packing of its operands.
//
// The tile: c[rows][columns] (+)= sum over k of a[k][rows] * b[k][columns]. One loop over k in ascending order, one
// fused multiply-add an element and step: the bits of an element depend on its own row of a and column of b alone,
// on neither the height of the tile nor the place in it. A tile of fewer rows is the same code with fewer registers.
//
// Everything here is a template of a type in the anonymous namespace of its file, and free of the standard library:
// an inline function compiled there with wide instructions could be picked by the linker for the whole library.
#pragma once

#include <cstdint>

#include "cpu/bf16.h"

namespace moetrain {

// What the tile does on the side for the next panel of b, `burst` items at a time, every kStepsPerBurst steps of k:
// copy its rows (floats, reduction axis strided), or else ask for its cache lines, to be transposed later.
struct Ahead {
  int64_t burst = 0;
  // Copying: to[i] = copy_rows[i][copy_first ...], one row of the panel an item. Asks for rows kLookAhead further.
  const float* const* copy_rows = nullptr;
  int64_t copies_left = 0, copy_first = 0;
  float* to = nullptr;
  // Asking: `lines` cache lines from each of ask_rows[0 .. asks_left), one line an item.
  const char* const* ask_rows = nullptr;
  int64_t asks_left = 0, lines = 0, line = 0, offset = 0;
};

constexpr int64_t kLookAhead = 8;
constexpr int64_t kStepsPerBurst = 16;

struct TileCall {
  const float* a;
  const float* b;
  int64_t k;
  float* c;
  int64_t c_stride;  // floats
  bool accumulate;
};

// rows <= Tile::rows.
using TileFn = void (*)(int rows, const TileCall& call, Ahead& ahead);

// Both write float panels, to[k * pitch + i] for i < pitch and k < depth, and look ahead in `rows`, which has
// kLookAhead pointers more than they pack.
template <class T>
struct PackFns {
  // From rows[i][k].
  void (*transpose)(const T* const* rows, int64_t depth, int64_t pitch, float* to);
  // From rows[k][first + i]; zero for i >= count.
  void (*copy)(const T* const* rows, int64_t first, int64_t count, int64_t depth, int64_t pitch, float* to);
};

// The widths of panels are 1, 2 or 4 blocks of packing.
struct Tile {
  int rows;       // most rows of a tile
  int row_pitch;  // width of a panel of a, at least `rows`
  int columns;    // width of a panel of b
  TileFn run;
  PackFns<float> pack_float;
  PackFns<bf16> pack_bf16;
};

Tile tile_base();
#if defined(__x86_64__)
Tile tile_avx2();
Tile tile_avx512();
#endif

// Vec: type, kWidth, zero, load, store, broadcast, multiply_add, and multiply_add of a number in memory.
template <class Vec, int kVectors>
inline void work_ahead(Ahead& ahead) {
  for (int64_t i = 0; i < ahead.burst && ahead.copies_left > 0; ++i) {
    const float* from = *ahead.copy_rows + ahead.copy_first;
    const float* later = ahead.copy_rows[kLookAhead] + ahead.copy_first;
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      __builtin_prefetch(later + v * Vec::kWidth);
      Vec::store(ahead.to + v * Vec::kWidth, Vec::load(from + v * Vec::kWidth));
    }
    ++ahead.copy_rows;
    --ahead.copies_left;
    ahead.to += kVectors * Vec::kWidth;
  }
  for (int64_t i = 0; i < ahead.burst && ahead.asks_left > 0; ++i) {
    __builtin_prefetch(*ahead.ask_rows + ahead.offset + 64 * ahead.line, 0, 2);
    if (++ahead.line < ahead.lines) continue;
    ahead.line = 0;
    ++ahead.ask_rows;
    --ahead.asks_left;
  }
}

template <class Vec, int kRows, int kPitch, int kVectors>
void run_rows(const TileCall& call, Ahead& ahead) {
  typename Vec::type acc[kRows][kVectors];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* c = call.c + r * call.c_stride + v * Vec::kWidth;
      if (call.accumulate) {
        acc[r][v] = Vec::load(c);
      } else {
        __builtin_prefetch(c, 0, 2);  // the stores come much later, but all at once
        acc[r][v] = Vec::zero();
      }
    }
  }
  const float *a = call.a, *b = call.b;
  for (int64_t k = call.k; k > 0; k -= kStepsPerBurst) {
    work_ahead<Vec, kVectors>(ahead);
    const float* stop = b + (k < kStepsPerBurst ? k : kStepsPerBurst) * kVectors * Vec::kWidth;
#pragma GCC unroll 1
    for (; b != stop; b += kVectors * Vec::kWidth) {
      typename Vec::type column[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) column[v] = Vec::load(b + v * Vec::kWidth);
#pragma GCC unroll 32
      for (int r = 0; r < kRows; ++r) {
        if (r % 2 == 0) {
          const typename Vec::type row = Vec::broadcast(a[r]);
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec::multiply_add(row, column[v], acc[r][v]);
        } else {
#pragma GCC unroll 4
          for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec::multiply_add(a + r, column[v], acc[r][v]);
        }
      }
      a += kPitch;
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) Vec::store(call.c + r * call.c_stride + v * Vec::kWidth, acc[r][v]);
  }
}

template <class Vec, int kRows, int kPitch, int kVectors>
void run_tile(int rows, const TileCall& call, Ahead& ahead) {
  if (rows == kRows) {
    run_rows<Vec, kRows, kPitch, kVectors>(call, ahead);
  } else if constexpr (kRows > 1) {
    run_tile<Vec, kRows - 1, kPitch, kVectors>(rows, call, ahead);
  }
}

// Block: kSide (8 at most), transpose (of kSide rows from k on: to[j * pitch + i] = rows[i][k + j]) and copy (of
// kSide numbers).
template <class Block, class T>
void pack_transposing(const T* const* rows, int64_t depth, int64_t pitch, float* to) {
  constexpr int64_t kSide = Block::kSide;
  const int64_t whole = depth / kSide * kSide;
  for (int64_t i = 0; i < pitch; i += kSide, rows += kSide, to += kSide) {
    for (int64_t k = 0; k < whole; k += kSide) {
      for (int64_t r = 0; k % 16 == 0 && r < kSide; ++r) __builtin_prefetch(rows[r + kLookAhead] + k);  // once a line
      Block::transpose(rows, k, to + k * pitch, pitch);
    }
    if (whole == depth) continue;
    T tail[kSide][kSide] = {};
    const T* tails[kSide];
    for (int64_t r = 0; r < kSide; ++r) {
      for (int64_t k = whole; k < depth; ++k) tail[r][k - whole] = rows[r][k];
      tails[r] = tail[r];
    }
    float turned[kSide * kSide];
    Block::transpose(tails, 0, turned, kSide);
    for (int64_t k = whole; k < depth; ++k) {
      for (int64_t r = 0; r < kSide; ++r) to[k * pitch + r] = turned[(k - whole) * kSide + r];
    }
  }
}

template <class Block, int64_t kBlocks, class T>
void copy_whole(const T* const* rows, int64_t first, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; ++k, to += kBlocks * Block::kSide) {
    __builtin_prefetch(rows[k + kLookAhead] + first);
#pragma GCC unroll 4
    for (int64_t i = 0; i < kBlocks; ++i) Block::copy(rows[k] + first + i * Block::kSide, to + i * Block::kSide);
  }
}

template <class Block, class T>
void copy_part(const T* const* rows, int64_t first, int64_t count, int64_t depth, int64_t pitch, float* to) {
  constexpr int64_t kSide = Block::kSide;
  for (int64_t k = 0; k < depth; ++k, to += pitch) {
    for (int64_t i = 0; i < pitch; i += kSide) {
      T part[kSide] = {};
      for (int64_t j = i; j < count && j < i + kSide; ++j) part[j - i] = rows[k][first + j];
      Block::copy(part, to + i);
    }
  }
}

template <class Block, class T>
void pack_copying(const T* const* rows, int64_t first, int64_t count, int64_t depth, int64_t pitch, float* to) {
  constexpr int64_t kSide = Block::kSide;
  if (count < pitch) return copy_part<Block>(rows, first, count, depth, pitch, to);
  if (pitch == kSide) return copy_whole<Block, 1>(rows, first, depth, to);
  if (pitch == 2 * kSide) return copy_whole<Block, 2>(rows, first, depth, to);
  if (pitch == 4 * kSide) return copy_whole<Block, 4>(rows, first, depth, to);
}

template <class Block, class T>
constexpr PackFns<T> pack_fns() {
  return {&pack_transposing<Block, T>, &pack_copying<Block, T>};
}

}  // namespace moetrain
