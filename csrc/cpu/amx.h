// bf16 products of 32 x 32 blocks by AMX tiles: packing, the block product, and what a block's end may do with it.
// Only for units compiled with AMX and AVX512 enabled, and entered where widest_isa() is AMX. Everything here is in an
// unnamed namespace and free of the standard library: an inline function compiled with wide instructions could else
// be picked by the linker for the whole library.
//
// Both operands of a block are [outer][k]. A tile holds 16 outer x 32 k (1 KB), in one of two forms:
//   rows   [16 outer][32 k]            the left operand of the tile product; its outer axis becomes the block's rows
//   pairs  [16 pairs of k][16 outer][2]  the right operand; its outer axis becomes the block's columns
// A packed half block is a sequence of tiles along k; a block is two halves of 16 outer. Whatever sticks out of the
// operand is zero, so tails run the same instructions, and nothing uninitialized is read.
//
// The sum over k runs upwards through one chain of tile products an element: its bits depend on its row and column.
#pragma once

#include <immintrin.h>

#include <cstdint>

#include "cpu/gemm_amx.h"

namespace moetrain::amx {
namespace {

constexpr int64_t kHalf = 16;          // outer of a tile
constexpr int64_t kBlock = 32;         // outer of a block
constexpr int64_t kTileDepth = 32;     // k of a tile
constexpr int64_t kTileElements = 512;
constexpr int64_t kBlockFloats = kBlock * kBlock;
constexpr int64_t kStripDepth = 512;   // k of a packed strip: 32 KB, which stay in L1

constexpr int64_t tiles_of(int64_t k) { return (k + kTileDepth - 1) / kTileDepth; }
constexpr int64_t blocks_of(int64_t outer) { return (outer + kBlock - 1) / kBlock; }
constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// The tile registers of the calling thread, while in scope.
class TileRegisters {
 public:
  TileRegisters() {
    alignas(64) struct {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    for (int i = 0; i < 8; ++i) config.row_bytes[i] = 64, config.rows[i] = kHalf;
    // GCC 12 believes that the instruction reads eight bytes of this only, and may drop the stores to the rest.
    asm volatile("" : : "m"(config));
    _tile_loadconfig(&config);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

inline __mmask32 first_of_32(int64_t count) {
  return count >= 32 ? ~__mmask32{0} : static_cast<__mmask32>((1u << (count < 0 ? 0 : count)) - 1);
}

// 16 x 16 transpose of 32-bit elements.
inline void transpose(__m512i (&r)[16]) {
  __m512i t[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

inline void store_tile(const __m512i (&r)[16], bf16* tile) {
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) _mm512_store_si512(tile + i * 32, r[i]);
}

// 16-bit positions that interleave two vectors of 16 (low halves) or the upper halves, and two halves of one vector.
inline __m512i interleave_low(__m512i x, __m512i y) {
  const __m512i which = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                         37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  return _mm512_permutex2var_epi16(x, which, y);
}
inline __m512i interleave_high(__m512i x, __m512i y) {
  const __m512i which = _mm512_set_epi16(63, 31, 62, 30, 61, 29, 60, 28, 59, 27, 58, 26, 57, 25, 56, 24, 55, 23, 54,
                                         22, 53, 21, 52, 20, 51, 19, 50, 18, 49, 17, 48, 16);
  return _mm512_permutex2var_epi16(x, which, y);
}
// Two float vectors, rounded to bf16, as pairs (x[i], y[i]).
inline __m512i to_pairs(__m512 x, __m512 y) {
  const __m512i which = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                         21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(which, (__m512i)_mm512_cvtne2ps_pbh(y, x));
}
// Two float vectors, rounded to bf16, one after the other.
inline __m512i to_row(__m512 first, __m512 second) { return (__m512i)_mm512_cvtne2ps_pbh(second, first); }
inline __m512 first_of_pairs(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
inline __m512 second_of_pairs(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}
inline __m512 low_half(__m512i row) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(row)), 16));
}
inline __m512 high_half(__m512i row) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(row, 1)), 16));
}

enum class Form { kRows, kPairs };

// k contiguous: a tile of rows is a copy, a tile of pairs its transpose as 32-bit elements.
template <Form kForm>
inline void pack_half_contiguous(const Source& x, int64_t outer, int64_t count, int64_t k, int64_t depth, bf16* to) {
  const bf16* row[kHalf];
  for (int i = 0; i < kHalf; ++i) row[i] = i < count ? x.row(outer + i) + k : x.data;
  for (int64_t at = 0; at < depth; at += kTileDepth, to += kTileElements) {
    const __mmask32 inside = first_of_32(depth - at);
    __m512i r[16];
#pragma GCC unroll 16
    for (int i = 0; i < kHalf; ++i) r[i] = _mm512_maskz_loadu_epi16(i < count ? inside : 0, row[i] + at);
    if (kForm == Form::kPairs) transpose(r);
    store_tile(r, to);
  }
}

// Two neighboring k interleave into pairs; a tile of rows is the transpose of that. `row(i)` loads 32 outer of k + i.
template <Form kForm, class Row>
inline void interleave_tile(const Row& row, bf16* low, bf16* high) {
  __m512i r_low[16], r_high[16];
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) {
    const __m512i even = row(2 * p), odd = row(2 * p + 1);
    r_low[p] = interleave_low(even, odd);
    r_high[p] = interleave_high(even, odd);
  }
  if (kForm == Form::kRows) {
    transpose(r_low);
    transpose(r_high);
  }
  store_tile(r_low, low);
  store_tile(r_high, high);
}

// Outer contiguous: of the tile's 32 k `depth` exist, of its 32 outer `count`.
template <Form kForm>
inline void pack_tile_strided(const Source& x, int64_t outer, int64_t count, int64_t k, int64_t depth, bf16* low,
                              bf16* high) {
  const Source from = {{x.start(outer), x.stride, false, x.index}};
  if (depth >= kTileDepth && count >= kBlock && !x.index) {  // nearly always; the rest asks about every row
    const bf16* first = from.row(k);
    const int64_t stride = x.stride;
    interleave_tile<kForm>([&](int64_t i) { return _mm512_loadu_si512(first + i * stride); }, low, high);
    return;
  }
  const __mmask32 inside = first_of_32(count);
  interleave_tile<kForm>(
      [&](int64_t i) {
        return _mm512_maskz_loadu_epi16(i < depth ? inside : 0, i < depth ? from.row(k + i) : from.data);
      },
      low, high);
}

// Packs outer .. outer + count, k .. k + depth: half h of block b starts at tile (2 b + h) * tiles_of(depth). A strided
// operand is read row by row, all blocks of 32 rows before the next 32, because a row is what lies in one page.
template <Form kForm>
inline void pack(const Source& x, int64_t outer, int64_t count, int64_t k, int64_t depth, bf16* to) {
  const int64_t half = tiles_of(depth) * kTileElements;
  if (x.reduction_contiguous) {
    for (int64_t i = 0; i < blocks_of(count) * kBlock; i += kHalf, to += half) {
      pack_half_contiguous<kForm>(x, outer + i, smaller(count - i, kHalf), k, depth, to);
    }
    return;
  }
  for (int64_t at = 0; at < depth; at += kTileDepth, to += kTileElements) {
    for (int64_t i = 0; i < count; i += kBlock) {
      bf16* low = to + i / kBlock * 2 * half;
      pack_tile_strided<kForm>(x, outer + i, count - i, k + at, depth - at, low, low + half);
    }
  }
}

// Cache lines of the strip after this one, touched a few at a time while tiles multiply.
class Prefetch {
 public:
  Prefetch() = default;
  Prefetch(const Source& x, int64_t outer, int64_t count, int64_t k, int64_t depth) : source_(x) {
    if (count <= 0 || depth <= 0) return;
    if (x.reduction_contiguous) {
      source_.data += k;
      row_ = outer, end_ = outer + count, lines_of_row_ = (depth + 31) / 32;
    } else {
      source_.data = x.start(outer);
      row_ = k, end_ = k + depth, lines_of_row_ = (count + 31) / 32;
    }
    lines_ = (end_ - row_) * lines_of_row_;
    open_row();
  }
  int64_t lines() const { return lines_; }
  void touch(int64_t lines) {
    for (; lines > 0 && row_ < end_; --lines) {
      _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T1);
      at_ += 32;
      if (--left_ == 0) {
        ++row_;
        open_row();
      }
    }
  }

 private:
  void open_row() {
    if (row_ >= end_) return;
    at_ = source_.row(row_);
    left_ = lines_of_row_;
  }

  Source source_{};
  const bf16* at_ = nullptr;
  int64_t row_ = 0, end_ = 0, lines_of_row_ = 0, left_ = 0, lines_ = 0;
};

// Where the tiles of a block's halves are: `stride` bytes between a tile's rows, `step` elements between tiles.
struct Halves {
  const bf16 *low, *high;
  int64_t stride = 64, step = kTileElements;
};

// Some steps of a block product: sums += rows times pairs. The lines of the operand that passes by (the panel, in L2)
// are asked for with the hint that nobody wants them again, so that they do not push the strip out of L1: with plain
// loads both together are more than it holds, and a strip of 512 k would be read from L2 every time.
template <Form kPassing>
inline void multiply_tiles(Halves& a, Halves& b, int64_t tiles, Prefetch& next, int64_t lines_a_tile) {
  for (int64_t t = 0; t < tiles; ++t) {
    if constexpr (kPassing == Form::kRows) {
      _tile_stream_loadd(4, a.low, 64);
      _tile_loadd(6, b.low, b.stride);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, b.high, b.stride);
      _tile_dpbf16ps(1, 4, 7);
      _tile_stream_loadd(5, a.high, 64);
    } else {
      _tile_loadd(4, a.low, a.stride);
      _tile_stream_loadd(6, b.low, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_stream_loadd(7, b.high, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, a.high, a.stride);
    }
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
    a.low += a.step, a.high += a.step, b.low += b.step, b.high += b.step;
    next.touch(lines_a_tile);
  }
}

// c[32][32] (+)= a block of rows times a block of pairs. `meanwhile` runs in the middle of the sum: it is vector work,
// which the tile unit does not wait for.
template <Form kPassing, class Meanwhile>
inline void multiply(Halves a, Halves b, int64_t tiles, bool accumulate, float* c, Prefetch& next,
                     int64_t lines_a_tile, const Meanwhile& meanwhile) {
  constexpr int kBytes = kBlock * sizeof(float);
  if (accumulate) {
    _tile_loadd(0, c, kBytes);
    _tile_loadd(1, c + kHalf, kBytes);
    _tile_loadd(2, c + kHalf * kBlock, kBytes);
    _tile_loadd(3, c + kHalf * kBlock + kHalf, kBytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  const int64_t before = tiles / 4;
  multiply_tiles<kPassing>(a, b, before, next, lines_a_tile);
  meanwhile();
  multiply_tiles<kPassing>(a, b, tiles - before, next, lines_a_tile);
  _tile_stored(0, c, kBytes);
  _tile_stored(1, c + kHalf, kBytes);
  _tile_stored(2, c + kHalf * kBlock, kBytes);
  _tile_stored(3, c + kHalf * kBlock + kHalf, kBytes);
}

// A packed panel and the part of it that a strip meets: `tile` of `tiles` along k.
struct Panel {
  const bf16* data;
  int64_t blocks;
  int64_t tiles;
};

struct NoFinish {
  void operator()(int64_t, int64_t, const float*) const {}
};

// Some strips of 32 outer: the part of an operand that is packed at a time, k from k to k + depth.
struct Strips {
  Source source;
  int64_t outer, count, k, depth;

  // Whether memory holds tiles of rows already, whole ones, which do not all fall into the same sets of L1.
  bool lies_in_tiles(int64_t part) const {
    return source.reduction_contiguous && !source.index && count % kBlock == 0 && part % kTileDepth == 0 &&
           source.stride % 1024 != 0;
  }
  Halves tiles_in_place(int64_t strip, int64_t at) const {
    const bf16* low = source.row(outer + strip * kBlock) + k + at;
    return {low, low + kHalf * source.stride, source.stride * static_cast<int64_t>(sizeof(bf16)), kTileDepth};
  }
};

// Outer to pack at a time: of a strided operand four strips, so that a page is opened once for all of them.
inline int64_t strips_width(const Source& x) { return x.reduction_contiguous ? kBlock : 4 * kBlock; }
constexpr int64_t kStripElements = 4 * kBlock * kStripDepth;

// What becomes of products: all are kept, side by side, because somebody will read or continue them later; or four take
// turns, and stay in L1, because `finish` is all that becomes of them. Either way the product of block b - 1 stands
// before that of an odd b.
enum class Sums { kKept, kInTurns };
constexpr int64_t kTurns = 4;

// Strips times every block of a panel, whose tiles from `first_tile` on stand for the same k. kStrip is the form of the
// strips; the panel has the other one. The product of strip s and block b is at c + (s * blocks + b) * kBlockFloats;
// finish(outer of the strip, b, product) is called when it is complete, in the middle of the block after it: while it
// is in L1, and while tiles multiply. `next` are the strips that will be asked for after these; their lines are fetched
// meanwhile.
template <Form kStrip, Sums kSums = Sums::kKept, class Finish>
inline void multiply_strips(const Strips& strips, const Strips& next, const Panel& panel, int64_t first_tile,
                            bool accumulate, bf16* buffer, float* c, const Finish& finish) {
  const int64_t count = blocks_of(strips.count);
  for (int64_t at = 0; at < strips.depth; at += kStripDepth) {
    const int64_t part = smaller(kStripDepth, strips.depth - at), tiles = tiles_of(part);
    const bool last = at + part == strips.depth;
    const Strips& then = last ? next : strips;
    const int64_t then_at = last ? 0 : at + part;
    Prefetch prefetch(then.source, then.outer, then.count, then.k + then_at, smaller(kStripDepth, then.depth - then_at));
    const int64_t lines = prefetch.lines() / (count * panel.blocks * tiles) + 1;
    const bool in_place = kStrip == Form::kRows && strips.lies_in_tiles(part);
    if (!in_place) pack<kStrip>(strips.source, strips.outer, strips.count, strips.k + at, part, buffer);
    const float* complete = nullptr;  // the product of (strip, block), which finish has not seen
    int64_t complete_strip = 0, complete_block = 0;
    const auto finish_complete = [&] {
      if (complete) finish(complete_strip, complete_block, complete);
    };
    for (int64_t s = 0; s < count; ++s) {
      Halves strip{buffer + 2 * s * tiles * kTileElements, buffer + (2 * s + 1) * tiles * kTileElements};
      if (in_place) strip = strips.tiles_in_place(s, at);
      const bf16* p = panel.data + (first_tile + at / kTileDepth) * kTileElements;
      for (int64_t b = 0; b < panel.blocks; ++b, p += 2 * panel.tiles * kTileElements) {
        const Halves block{p, p + panel.tiles * kTileElements};
        float* const out = c + (kSums == Sums::kKept ? s * panel.blocks + b : b % kTurns) * kBlockFloats;
        if (kStrip == Form::kRows) {
          multiply<Form::kPairs>(strip, block, tiles, accumulate || at > 0, out, prefetch, lines, finish_complete);
        } else {
          multiply<Form::kRows>(block, strip, tiles, accumulate || at > 0, out, prefetch, lines, finish_complete);
        }
        if (last) complete = out, complete_strip = strips.outer + s * kBlock, complete_block = b;
      }
    }
    finish_complete();
  }
}

// ---- what a finished block becomes

inline void store_row(bf16* to, __m512i row, int64_t columns, bool stream) {
  if (stream) {
    _mm512_stream_si512(reinterpret_cast<__m512i*>(to), row);
  } else {
    _mm512_mask_storeu_epi16(to, first_of_32(columns), row);
  }
}

// Rows and columns of the output that exist; `row(i)` is where row i of the block goes. Streaming stores go around the
// caches: only for whole, aligned rows, and only into memory that is mapped (a page fault costs more than they gain).
template <class Row>
inline void store_block(const float* c, int64_t rows, int64_t columns, bool stream, const Row& row) {
  const bool whole = stream && columns == kBlock;
  for (int64_t i = 0; i < rows; ++i, c += kBlock) {
    store_row(row(i), to_row(_mm512_load_ps(c), _mm512_load_ps(c + kHalf)), columns, whole);
  }
}

// The pairs (rows 2p, 2p + 1 of the block) for columns half * 16 ...: a tile of the form kPairs, of the transpose.
inline void to_pairs_of_rows(const float* c, int64_t half, __m512i (&r)[16]) {
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) {
    r[p] = to_pairs(_mm512_load_ps(c + 2 * p * kBlock + half * kHalf),
                    _mm512_load_ps(c + (2 * p + 1) * kBlock + half * kHalf));
  }
}

// Two neighboring blocks, whole lines in pairs: memory takes 128 bytes at a time 1.6 times as fast as twice 64.
template <class Row>
inline void stream_two_blocks(const float* c, int64_t rows, const Row& row) {
  for (int64_t i = 0; i < rows; ++i, c += kBlock) {
    const float* next = c + kBlockFloats;
    const __m512i first = to_row(_mm512_load_ps(c), _mm512_load_ps(c + kHalf));
    const __m512i second = to_row(_mm512_load_ps(next), _mm512_load_ps(next + kHalf));
    store_row(row(i), first, kBlock, true);
    store_row(row(i) + kBlock, second, kBlock, true);
  }
}

// Stores the block's transpose: `rows` of the output are columns of the block.
template <class Row>
inline void store_transposed(const float* c, int64_t rows, int64_t columns, bool stream, const Row& row) {
  const bool whole = stream && columns == kBlock;
  for (int64_t half = 0; half < 2 && half * kHalf < rows; ++half) {
    __m512i r[16];
    to_pairs_of_rows(c, half, r);
    transpose(r);
    const int64_t count = smaller(kHalf, rows - half * kHalf);
    for (int64_t i = 0; i < count; ++i) store_row(row(half * kHalf + i), r[i], columns, whole);
  }
}

}  // namespace
}  // namespace moetrain::amx
