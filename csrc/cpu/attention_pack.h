// How the operands of an attention tile lie in memory. Everything outside the operand is zero, hidden keys included:
// what stands in a padding token never enters a product.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "cpu/attention_tile.h"

namespace moetrain {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows `stride` apart, each contiguous; `visible` (or null: all) says which of them count.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, count, depth;
  const bool* visible;

  bool holds(int64_t i) const { return i < count && (!visible || visible[i]); }
  T at(int64_t i, int64_t k) const { return holds(i) && k < depth ? data[i * stride + k] : from_float<T>(0.0f); }
  bool holds4(int64_t i) const { return holds(i) && holds(i + 1) && holds(i + 2) && holds(i + 3); }
};

typedef float Float4 __attribute__((vector_size(16)));

inline Float4 load4(const float* p) {
  Float4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Float4 load4(const bf16* p) { return Float4{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])}; }

inline void store4(float* p, Float4 v) { std::memcpy(p, &v, sizeof v); }

// Four elements of row j go to the places j of to, to + width, ...
inline void transpose4(Float4 a, Float4 b, Float4 c, Float4 d, float* to, int64_t width) {
  typedef int32_t Int4 __attribute__((vector_size(16)));
  const Float4 ab01 = __builtin_shuffle(a, b, Int4{0, 4, 1, 5}), ab23 = __builtin_shuffle(a, b, Int4{2, 6, 3, 7});
  const Float4 cd01 = __builtin_shuffle(c, d, Int4{0, 4, 1, 5}), cd23 = __builtin_shuffle(c, d, Int4{2, 6, 3, 7});
  store4(to, __builtin_shuffle(ab01, cd01, Int4{0, 1, 4, 5}));
  store4(to + width, __builtin_shuffle(ab01, cd01, Int4{2, 3, 6, 7}));
  store4(to + 2 * width, __builtin_shuffle(ab23, cd23, Int4{0, 1, 4, 5}));
  store4(to + 3 * width, __builtin_shuffle(ab23, cd23, Int4{2, 3, 6, 7}));
}

// Eight bf16 as they are: four pairs in the place of four floats.
inline Float4 load_pairs(const bf16* p) {
  Float4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

// (x0, y0), (x1, y1), ... of eight bf16 each.
inline void interleave8(const bf16* x, const bf16* y, bf16* to) {
  typedef uint16_t Short8 __attribute__((vector_size(16)));
  Short8 a, b;
  std::memcpy(&a, x, sizeof a);
  std::memcpy(&b, y, sizeof b);
  const Short8 low = __builtin_shuffle(a, b, Short8{0, 8, 1, 9, 2, 10, 3, 11});
  const Short8 top = __builtin_shuffle(a, b, Short8{4, 12, 5, 13, 6, 14, 7, 15});
  std::memcpy(to, &low, sizeof low);
  std::memcpy(to + 8, &top, sizeof top);
}

// Operands of the float tiles.
struct FloatLayout {
  using Packed = float;

  static int64_t padded_depth(int64_t depth) { return depth; }

  // to[k][i]: a strip of rows, or a panel of columns.
  template <class T>
  static void pack_rows(const Rows<T>& from, int64_t width, float* to) { pack_columns(from, width, to); }

  template <class T>
  static void pack_columns(const Rows<T>& from, int64_t width, float* to) {
    int64_t i = 0;
    for (; i + 4 <= width; i += 4) {
      int64_t k = 0;
      if (from.holds4(i)) {
        for (; k + 4 <= from.depth; k += 4) {
          const T* at = from.data + i * from.stride + k;
          transpose4(load4(at), load4(at + from.stride), load4(at + 2 * from.stride), load4(at + 3 * from.stride),
                     to + k * width + i, width);
        }
      }
      for (int64_t j = i; j < i + 4; ++j) pack_column(from, j, k, width, to);
    }
    for (; i < width; ++i) pack_column(from, i, 0, width, to);
  }

  // to[panel][key][column of the panel], panels `stride` apart.
  template <class T>
  static void pack_values(const Rows<T>& from, int64_t keys, int64_t width, int64_t stride, float* to) {
    for (int64_t first = 0; first < from.depth; first += width, to += stride) {
      const int64_t used = std::min(width, from.depth - first);
      for (int64_t i = 0; i < keys; ++i) {
        const T* row = from.data + i * from.stride + first;
        const int64_t copied = from.holds(i) ? used : 0;
        for (int64_t k = 0; k < copied; ++k) to[i * width + k] = to_float(row[k]);
        for (int64_t k = copied; k < width; ++k) to[i * width + k] = 0.0f;
      }
    }
  }

 private:
  template <class T>
  static void pack_column(const Rows<T>& from, int64_t i, int64_t k, int64_t width, float* to) {
    const bool holds = from.holds(i);
    for (; k < from.depth; ++k) to[k * width + i] = holds ? to_float(from.data[i * from.stride + k]) : 0.0f;
  }
};

// Operands of AMX tiles of 16 rows of 64 bytes: 16 outer x 32 k as rows, or 16 pairs of k x 16 outer as pairs.
struct AmxLayout {
  using Packed = bf16;
  static constexpr int64_t kHalf = 16, kTileDepth = 32, kTileElements = kHalf * kTileDepth;

  static int64_t padded_depth(int64_t depth) { return round_up(depth, kTileDepth); }

  // to[half][tile of k][16 outer][32 k]
  static void pack_rows(const Rows<bf16>& from, int64_t width, bf16* to) {
    const int64_t tiles = padded_depth(from.depth) / kTileDepth;
    for (int64_t i = 0; i < width; ++i) {
      bf16* row = to + i / kHalf * tiles * kTileElements + i % kHalf * kTileDepth;
      int64_t k = 0;
      for (; from.holds(i) && k + kTileDepth <= from.depth; k += kTileDepth) {
        std::memcpy(row + k / kTileDepth * kTileElements, from.data + i * from.stride + k, kTileDepth * sizeof(bf16));
      }
      for (; k < tiles * kTileDepth; ++k) row[k / kTileDepth * kTileElements + k % kTileDepth] = from.at(i, k);
    }
  }

  // to[half][tile of k][16 pairs of k][16 outer][2]
  static void pack_columns(const Rows<bf16>& from, int64_t width, bf16* to) {
    const int64_t depth = padded_depth(from.depth), half = kHalf * depth;
    for (int64_t i = 0; i < width; i += 4) {
      bf16* column = to + i / kHalf * half + i % kHalf * 2;
      int64_t k = 0;
      for (; from.holds4(i) && k + 8 <= from.depth; k += 8) {
        const bf16* at = from.data + i * from.stride + k;
        transpose4(load_pairs(at), load_pairs(at + from.stride), load_pairs(at + 2 * from.stride),
                   load_pairs(at + 3 * from.stride), reinterpret_cast<float*>(column + k * kHalf), kHalf);
      }
      for (; k < depth; ++k) {
        for (int64_t j = 0; j < 4; ++j) column[k / 2 * kTileDepth + 2 * j + k % 2] = from.at(i + j, k);
      }
    }
  }

  // to[panel of 32 columns][tile of 32 keys][half of the columns][16 pairs of keys][16 columns][2], panels `stride` apart.
  static void pack_values(const Rows<bf16>& from, int64_t keys, int64_t width, int64_t stride, bf16* to) {
    for (int64_t i = 0; i < keys; i += 2) {
      bf16* pair = to + i / kTileDepth * 2 * kTileElements + i % kTileDepth * kHalf;
      const auto place = [&](int64_t k) {
        return pair + k / width * stride + k % width / kHalf * kTileElements + k % kHalf * 2;
      };
      const bf16* at = from.data + i * from.stride;
      int64_t k = 0;
      for (; from.holds(i) && from.holds(i + 1) && k + 8 <= from.depth; k += 8) {
        interleave8(at + k, at + from.stride + k, place(k));
      }
      for (; k < round_up(from.depth, width); ++k) {
        place(k)[0] = from.at(i, k);
        place(k)[1] = from.at(i + 1, k);
      }
    }
  }
};

}  // namespace moetrain
