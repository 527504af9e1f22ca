// What the grouped GEMMs of both dtypes share: which part of which expert's product a block computes.
//
// Every kind of product is c[m][n] = sum over k of a[m][k] * b[n][k] with operands whose reduction axis is either
// contiguous (element (i, k) at i * stride + k) or strided (at k * stride + i):
//   fprop  m = rows of the expert, n = N, k = K    a = x  (contiguous)   b = w (contiguous)
//   dgrad  m = rows of the expert, n = K, k = N    a = dy (contiguous)   b = w (strided)
//   wgrad  m = N, n = K, k = rows of the expert    a = dy (strided)      b = x (strided)
// k runs upwards in steps of a fixed size, so an output row of fprop and dgrad depends on its own input row only.
#pragma once

#include <cstdint>

#include "cuda/warp.cuh"

namespace moetrain_cuda {

enum Kind { kFprop = 0, kDgrad = 1, kWgrad = 2 };

template <class T>
struct Problem {
  const T* a;
  const T* b;
  T* c;
  const int64_t* tokens_per_expert;
  int experts;
  int64_t rows, n, k;  // R, N, K of launch.h
};

// The block's tile: operands advanced to their expert (a and c also to the first row of the expert).
template <class T>
struct Tile {
  const T* a;
  const T* b;
  T* c;
  int64_t m, n, k;              // sizes of the expert's product
  int64_t m0, n0;               // corner of the tile in it
  int64_t a_stride, b_stride, c_stride;
  bool present;                 // false: the grid has more blocks than tiles
};

// What a block works on: an expert's rows, or rows that belong to no expert (their output is zero), or nothing.
struct Found {
  int64_t expert, first_row, rows, tile;  // tile: number of the row tile among those of the expert
};
constexpr int64_t kNoExpert = -1, kNothing = -2;

// Finds the expert whose row tiles include number `tile`, by one warp. The counts stay on the device, so nobody has
// checked that they sum to the number of rows: rows beyond the sum count as one more group that belongs to no expert,
// and counts that exceed the rows are cut.
__device__ inline void find_row_tile(const int64_t* tokens_per_expert, int experts, int64_t rows, int64_t tile,
                                     int tile_rows, Found* found) {
  const int lane = threadIdx.x;
  if (lane == 0) found->expert = kNothing;
  __syncwarp();
  int64_t tiles_before = 0, rows_before = 0;
  for (int base = 0; base <= experts; base += 32) {
    const int e = base + lane;
    const int64_t count = e < experts ? max(tokens_per_expert[e], int64_t{0}) : 0;
    const int64_t upto_rows = warp_inclusive_scan(count, lane);
    const int64_t first_row = min(rows_before + upto_rows - count, rows);
    const int64_t present = e == experts ? rows - first_row : min(count, rows - first_row);
    const int64_t tiles = (present + tile_rows - 1) / tile_rows;
    const int64_t upto_tiles = warp_inclusive_scan(tiles, lane);
    const int64_t first_tile = tiles_before + upto_tiles - tiles;
    if (tile >= first_tile && tile < first_tile + tiles) {
      *found = {e == experts ? kNoExpert : e, first_row, present, tile - first_tile};
    }
    tiles_before += __shfl_sync(0xffffffffu, upto_tiles, 31);
    rows_before += __shfl_sync(0xffffffffu, upto_rows, 31);
  }
  __syncwarp();
}

// First row and rows of one expert, by one warp.
__device__ inline void find_expert(const int64_t* tokens_per_expert, int64_t rows, int expert, Found* found) {
  const int lane = threadIdx.x;
  int64_t first_row = 0;
  for (int e = lane; e < expert; e += 32) first_row += max(tokens_per_expert[e], int64_t{0});
  for (int step = 16; step > 0; step /= 2) first_row += __shfl_xor_sync(0xffffffffu, first_row, step);
  first_row = min(first_row, rows);
  if (lane == 0) *found = {expert, first_row, min(max(tokens_per_expert[expert], int64_t{0}), rows - first_row), 0};
  __syncwarp();
}

// Called by all threads. Grid: fprop and dgrad (row tiles of all experts, column tiles), wgrad (tiles of N, tiles of
// K, experts).
template <Kind kKind, class T, int kTileM, int kTileN>
__device__ Tile<T> locate(const Problem<T>& p) {
  __shared__ Found found;
  if (threadIdx.x < 32) {
    if (kKind == kWgrad) {
      find_expert(p.tokens_per_expert, p.rows, blockIdx.z, &found);
    } else {
      find_row_tile(p.tokens_per_expert, p.experts, p.rows, blockIdx.x, kTileM, &found);
    }
  }
  __syncthreads();
  Tile<T> t;
  t.present = found.expert != kNothing;
  if (!t.present) return t;
  const int64_t expert = max(found.expert, int64_t{0}), first_row = found.first_row, count = found.rows;
  t.n0 = static_cast<int64_t>(blockIdx.y) * kTileN;
  if (kKind == kFprop) {
    t.m = count, t.n = p.n, t.k = p.k;
    t.a = p.a + first_row * p.k, t.a_stride = p.k;
    t.b = p.b + expert * p.n * p.k, t.b_stride = p.k;
    t.c = p.c + first_row * p.n, t.c_stride = p.n;
    t.m0 = found.tile * kTileM;
  } else if (kKind == kDgrad) {
    t.m = count, t.n = p.k, t.k = p.n;
    t.a = p.a + first_row * p.n, t.a_stride = p.n;
    t.b = p.b + expert * p.n * p.k, t.b_stride = p.k;
    t.c = p.c + first_row * p.k, t.c_stride = p.k;
    t.m0 = found.tile * kTileM;
  } else {
    t.m = p.n, t.n = p.k, t.k = count;
    t.a = p.a + first_row * p.n, t.a_stride = p.n;
    t.b = p.b + first_row * p.k, t.b_stride = p.k;
    t.c = p.c + expert * p.n * p.k, t.c_stride = p.k;
    t.m0 = static_cast<int64_t>(blockIdx.x) * kTileM;
  }
  if (found.expert == kNoExpert) t.k = 0;  // an empty sum
  return t;
}

// Enough blocks whatever the counts are: every group adds at most one incomplete row tile.
template <Kind kKind, class T>
dim3 grid_of(const Problem<T>& p, int tile_m, int tile_n) {
  const auto tiles = [](int64_t size, int tile) { return static_cast<unsigned>((size + tile - 1) / tile); };
  if (kKind == kWgrad) return dim3(tiles(p.n, tile_m), tiles(p.k, tile_n), static_cast<unsigned>(p.experts));
  const int64_t incomplete = p.rows < p.experts + 1 ? p.rows : p.experts + 1;
  return dim3(static_cast<unsigned>(p.rows / tile_m + incomplete), tiles(kKind == kFprop ? p.n : p.k, tile_n), 1);
}

template <class T>
bool nothing_to_do(int kind, const Problem<T>& p) {
  if (kind == kWgrad) return p.experts == 0 || p.n == 0 || p.k == 0;
  return p.rows == 0 || (kind == kFprop ? p.n : p.k) == 0;
}

}  // namespace moetrain_cuda
