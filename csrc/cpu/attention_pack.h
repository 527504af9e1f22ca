// How the operands of an attention tile lie in memory. Everything outside the operand is zero, hidden keys included:
// what stands in a padding token never enters a product.
#pragma once

#include <algorithm>
#include <cstdint>

#include "cpu/attention_tile.h"

namespace moetrain {

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// Rows `stride` apart, each contiguous; `visible` (or null: all) says which of them count.
template <class T>
struct Rows {
  const T* data;
  int64_t stride, count, depth;
  const bool* visible;

  T at(int64_t i, int64_t k) const { return holds(i) && k < depth ? data[i * stride + k] : from_float<T>(0.0f); }
  bool holds(int64_t i) const { return i < count && (!visible || visible[i]); }
};

// Operands of the float tiles.
struct FloatLayout {
  using Packed = float;

  static int64_t padded_depth(int64_t depth) { return depth; }

  // to[k][i]: a strip of rows, or a panel of columns.
  template <class T>
  static void pack_rows(const Rows<T>& from, int64_t width, float* to) { pack_columns(from, width, to); }

  template <class T>
  static void pack_columns(const Rows<T>& from, int64_t width, float* to) {
    for (int64_t i = 0; i < width; ++i) {
      if (from.holds(i)) {
        const T* row = from.data + i * from.stride;
        for (int64_t k = 0; k < from.depth; ++k) to[k * width + i] = to_float(row[k]);
      } else {
        for (int64_t k = 0; k < from.depth; ++k) to[k * width + i] = 0.0f;
      }
    }
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
};

}  // namespace moetrain
