// What the grouped GEMMs of both dtypes share: which part of which expert's product a block computes.
//
// Every kind of product is c[m][n] = sum over k of a[m][k] * b[n][k] with operands whose reduction axis is either
// contiguous (element (i, k) at i * stride + k) or strided (at k * stride + i):
//   fprop   m = rows of the expert, n = N, k = K    a = x  (contiguous)   b = w (contiguous)
//   dgrad   m = rows of the expert, n = K, k = N    a = dy (contiguous)   b = w (strided)
//   wgrad   m = N, n = K, k = rows of the expert    a = dy (strided)      b = x (strided)
//   swiglu  fprop, where a tile takes columns of the gate and the same columns of up, n = F of them
// k runs upwards in steps of a fixed size, so an output row of fprop and dgrad depends on its own input row only,
// whatever the tile.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/launch.h"
#include "cuda/warp.cuh"

namespace moetrain_cuda {

enum Kind { kFprop = 0, kDgrad = 1, kWgrad = 2, kSwiglu = 3 };

// Operands whose row of a routed token may lie anywhere.
template <class T>
struct Rows {
  const T* data;
  int stride;
  const int64_t* index;  // null: row i is row i
  int64_t count;         // rows of the matrix behind index

  __device__ int64_t physical(int row) const {
    if (index == nullptr) return row;
    const int64_t at = index[row];
    require(at >= 0 && at < count);
    return at;
  }
  __device__ const T* at(int64_t physical_row) const { return data + physical_row * stride; }
};

template <class T>
struct Tile {
  Rows<T> a, b;                 // advanced to their expert
  int64_t c;                    // offset of the expert's first output element (of h: that of its first row)
  int64_t first_row;            // of the expert
  int m, n, k;                  // sizes of the expert's product (the launchers check that they fit)
  int m0, n0;                   // corner of the tile in it
  bool present;                 // false: the grid has more blocks than tiles
};

// What a block works on: an expert's rows, or rows that belong to no expert (their output is zero), or nothing.
struct Found {
  int64_t expert, first_row, rows, tiles_before;  // row tiles of the groups before it
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
    const int64_t left = rows - first_row;
    const int64_t present = e < experts ? min(count, left) : e == experts ? left : 0;
    const int64_t tiles = (present + tile_rows - 1) / tile_rows;
    const int64_t upto_tiles = warp_inclusive_scan(tiles, lane);
    const int64_t first_tile = tiles_before + upto_tiles - tiles;
    if (tile >= first_tile && tile < first_tile + tiles) {
      *found = {e == experts ? kNoExpert : e, first_row, present, first_tile};
    }
    tiles_before += __shfl_sync(kAllLanes, upto_tiles, 31);
    rows_before += __shfl_sync(kAllLanes, upto_rows, 31);
  }
  __syncwarp();
}

// First row and rows of one expert, by one warp.
__device__ inline void find_expert(const int64_t* tokens_per_expert, int64_t rows, int64_t expert, Found* found) {
  const int lane = threadIdx.x;
  int64_t first_row = 0;
  for (int64_t e = lane; e < expert; e += 32) first_row += max(tokens_per_expert[e], int64_t{0});
  for (int step = 16; step > 0; step /= 2) first_row += __shfl_xor_sync(kAllLanes, first_row, step);
  first_row = min(first_row, rows);
  if (lane == 0) *found = {expert, first_row, min(max(tokens_per_expert[expert], int64_t{0}), rows - first_row), 0};
  __syncwarp();
}

__host__ __device__ inline int64_t tiles_of(int64_t size, int tile) { return (size + tile - 1) / tile; }

// Columns of the product and, in swiglu, how many of them a tile covers (its other half are those of up).
template <Kind kKind>
__host__ __device__ int64_t columns_of(int64_t n, int64_t k) {
  return kKind == kFprop ? n : kKind == kSwiglu ? n / 2 : k;
}
template <Kind kKind>
constexpr int columns_of_tile(int tile_n) {
  return kKind == kSwiglu ? tile_n / 2 : tile_n;
}

// Corner of tile `tile` among row_tiles x column_tiles: bands of kBand row tiles, column by column. Blocks that run at
// the same time then share their columns of b, and a band's rows of a stay in the L2 cache.
struct Corner {
  int64_t row, column;
};
__device__ inline Corner corner_of(int64_t tile, int64_t row_tiles, int64_t column_tiles) {
  constexpr int64_t kBand = 8;
  const int64_t band = tile / (kBand * column_tiles), in_band = tile % (kBand * column_tiles);
  const int64_t height = min(kBand, row_tiles - band * kBand);
  return {band * kBand + in_band % height, in_band / height};
}

// Called by all threads of a block. Blocks are numbered expert by expert, so one expert's weights are read together.
template <Kind kKind, class T, int kTileM, int kTileN>
__device__ Tile<T> locate(const MoetrainGemm& p) {
  __shared__ Found found;
  constexpr int kColumns = columns_of_tile<kKind>(kTileN);
  const int64_t column_tiles = tiles_of(columns_of<kKind>(p.n, p.k), kColumns);
  const int64_t expert_tiles = tiles_of(p.n, kTileM) * column_tiles;  // of wgrad
  if (threadIdx.x < 32) {
    if (kKind == kWgrad) {
      find_expert(p.tokens_per_expert, p.rows, blockIdx.x / expert_tiles, &found);
    } else {
      find_row_tile(p.tokens_per_expert, static_cast<int>(p.experts), p.rows, blockIdx.x / column_tiles, kTileM,
                    &found);
    }
  }
  __syncthreads();
  Tile<T> t;
  t.present = found.expert != kNothing;
  if (!t.present) return t;
  const int64_t expert = max(found.expert, int64_t{0});
  t.first_row = found.first_row;
  // A gathered matrix is advanced by its index, any other by its rows.
  const auto routed = [&](const void* data, int stride, const int64_t* index, int64_t count) {
    const T* const base = static_cast<const T*>(data);
    return index ? Rows<T>{base, stride, index + t.first_row, count}
                 : Rows<T>{base + t.first_row * stride, stride, nullptr, 0};
  };
  const Rows<T> weights = {static_cast<const T*>(p.b) + expert * p.n * p.k, static_cast<int>(p.k), nullptr, 0};
  int64_t tile = 0;
  if (kKind == kWgrad) {
    t.m = static_cast<int>(p.n), t.n = static_cast<int>(p.k), t.k = static_cast<int>(found.rows);
    t.a = routed(p.a, t.m, p.a_rows, p.a_count);
    t.b = routed(p.b, t.n, p.b_rows, p.b_count);
    t.c = expert * p.n * p.k;
    tile = blockIdx.x % expert_tiles;
  } else {
    t.m = static_cast<int>(found.rows);
    t.n = static_cast<int>(columns_of<kKind>(p.n, p.k));
    t.k = static_cast<int>(kKind == kDgrad ? p.n : p.k);
    t.a = routed(p.a, t.k, p.a_rows, p.a_count);
    t.b = weights;
    t.c = t.first_row * (kKind == kDgrad ? p.k : p.n);
    tile = blockIdx.x - found.tiles_before * column_tiles;
  }
  const Corner corner = corner_of(tile, tiles_of(t.m, kTileM), column_tiles);
  t.m0 = static_cast<int>(corner.row) * kTileM;
  t.n0 = static_cast<int>(corner.column) * kColumns;
  if (found.expert == kNoExpert) t.k = 0;  // an empty sum
  return t;
}

// Row i of the b tile of a product, as a row of the expert's weights. In swiglu rows alternate, kRun at a time, between
// gate and up, so that one thread holds both values of a column. -1: outside.
template <Kind kKind, int kRun>
__device__ int row_of_b(int i, int n0, int n) {
  if (kKind != kSwiglu) return n0 + i < n ? n0 + i : -1;
  const int column = n0 + i / (2 * kRun) * kRun + i % kRun;
  return column < n ? i / kRun % 2 * n + column : -1;
}

// Enough blocks whatever the counts are: every group adds at most one incomplete row tile.
template <Kind kKind>
int64_t blocks_of(const MoetrainGemm& p, int tile_m, int tile_n) {
  const int64_t column_tiles = tiles_of(columns_of<kKind>(p.n, p.k), columns_of_tile<kKind>(tile_n));
  if (kKind == kWgrad) return p.experts * tiles_of(p.n, tile_m) * column_tiles;
  const int64_t incomplete = p.rows < p.experts + 1 ? p.rows : p.experts + 1;
  return (p.rows / tile_m + incomplete) * column_tiles;
}

// Rows and columns are numbered by int on the device; two of them never overflow a tile's corner.
inline bool too_large(const MoetrainGemm& p) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return p.rows > kMost || p.n > kMost || p.k > kMost || p.experts > kMost;
}

inline bool nothing_to_do(const MoetrainGemm& p) {
  if (p.kind == kWgrad) return p.experts == 0 || p.n == 0 || p.k == 0;
  return p.rows == 0 || (p.kind == kDgrad ? p.k : p.n) == 0;
}

}  // namespace moetrain_cuda
