// bf16 by AMX tiles: 32 queries x 32 keys, or x 32 columns of the values, in four tile registers of 16 x 16 sums.
// Operands lie as AmxLayout packs them. A sum runs upwards through one chain of tile products, so its bits depend on its
// row and column; weights are rounded to bf16 on their way to the values, and summed before that.
#include <immintrin.h>

#include "cpu/attention_vec_avx512.h"

namespace moetrain {
namespace {

constexpr int kRows = 32, kColumns = 32, kHalf = 16;
constexpr int64_t kTileDepth = 32, kTileElements = kHalf * kTileDepth;
constexpr int kTileBytes = 64;  // between the rows of a packed tile

void enter() {
  alignas(64) struct {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; ++i) config.row_bytes[i] = kTileBytes, config.rows[i] = kHalf;
  // GCC 12 believes that the instruction reads eight bytes of this only, and drops the stores to the rest.
  asm volatile("" : : "m"(config));
  _tile_loadconfig(&config);
}

void leave() { _tile_release(); }

// Tile registers 0 to 3 = the 32 x 32 product over `tiles` times 32 of k. Halves of b are `b_half` apart and its next
// tiles `b_step`; rows of a are `a_bytes` apart.
inline void multiply(const bf16* a_low, const bf16* a_high, int64_t a_step, int64_t a_bytes, const bf16* b,
                     int64_t b_half, int64_t b_step, int64_t tiles) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t t = 0; t < tiles; ++t, a_low += a_step, a_high += a_step, b += b_step) {
    _tile_loadd(4, a_low, a_bytes);
    _tile_loadd(6, b, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + b_half, kTileBytes);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a_high, a_bytes);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
}

inline void store(float* c, int64_t stride) {
  const int64_t bytes = stride * static_cast<int64_t>(sizeof(float));
  _tile_stored(0, c, bytes);
  _tile_stored(1, c + kHalf, bytes);
  _tile_stored(2, c + kHalf * stride, bytes);
  _tile_stored(3, c + kHalf * stride + kHalf, bytes);
}

void scores(const bf16* row, const bf16* panel, int64_t depth, int64_t panels, float* s) {
  const int64_t tiles = depth / kTileDepth, half = tiles * kTileElements;
  for (int64_t p = 0; p < panels; ++p, panel += 2 * half, s += kColumns) {
    multiply(row, row + half, kTileElements, kTileBytes, panel, half, kTileElements, tiles);
    store(s, kKeyBlock);
  }
}

void values(const bf16* w, const bf16* value, int64_t keys, int64_t stride, int64_t panels, const float* correction,
            float* out) {
  alignas(64) float product[kRows * kColumns];
  const int64_t tiles = (keys + kTileDepth - 1) / kTileDepth;
  for (int64_t p = 0; p < panels; ++p, value += stride, out += kRows * kColumns) {
    multiply(w, w + kHalf * kKeyBlock, kTileDepth, kKeyBlock * static_cast<int64_t>(sizeof(bf16)), value, kTileElements,
             2 * kTileElements, tiles);
    store(product, kColumns);
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor = Avx512::broadcast(correction[r]);
      for (int j = r * kColumns; j < (r + 1) * kColumns; j += Avx512::kWidth) {
        Avx512::store(out + j, Avx512::multiply_add(Avx512::load(out + j), factor, Avx512::load(product + j)));
      }
    }
  }
}

}  // namespace

AttentionTile<bf16> attention_tile_amx() {
  using Softmax = SoftmaxLoops<Avx512, bf16, kRows>;
  return {"amx",   kRows,  kColumns,          &enter,          &leave,
          &scores, &Softmax::softmax, &values, &Softmax::final_weights, &Softmax::add_received, &Softmax::max_received};
}

}  // namespace moetrain
