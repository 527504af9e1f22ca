// The inner loops of attention, one strip of rows (queries) against one block of columns (keys) at a time:
// scores, online softmax, weighted values. Packed operands are padded with zeros, so a tail runs the same
// instructions; each row's sums run over ascending keys and do not look at other rows. Hence a row's bits depend
// on its query and on the keys that it sees, alone.
//
// A strip of scores is [rows][kKeyBlock]; hidden scores are kHidden. Included by the files of wide instructions:
// free of the standard library (see gemm_tile.h).
#pragma once

#include <cstdint>

#include "cpu/bf16.h"

namespace moetrain {

constexpr int64_t kKeyBlock = 384;  // a block of keys and values stays in L2, a strip of scores in L1
constexpr int kMaxStripRows = 32;

// Finite, for -inf - -inf is no number: the weight exp(c * (kHidden - kNoMaximum)) is zero.
constexpr float kHidden = -1e30f;
constexpr float kNoMaximum = -1e20f;

// What the softmax knows of the rows of a strip, in units of base 2: c = scale / ln 2.
struct SoftmaxRows {
  float max[kMaxStripRows];         // largest score so far (unscaled)
  float sum[kMaxStripRows];         // of exp2(c * (score - max))
  float weighted[kMaxStripRows];    // of exp2(x) * x, x = c * (score - max); for the entropy
  float correction[kMaxStripRows];  // what the last block made of all sums before it
};

// P: type of the packed operands. Layouts (attention_pack.h) know how to write them.
template <class P>
struct AttentionTile {
  const char* isa;
  int rows;     // of a strip
  int columns;  // of a panel: keys, or columns of the values

  // Around the work of a thread; null where there is nothing to set up.
  void (*enter)();
  void (*leave)();
  // s[r][j] = row r . column j, for whole panels of columns.
  void (*scores)(const P* row, const P* panel, int64_t depth, int64_t panels, float* s);
  // s becomes weights relative to the new maximum: w[r][j] = exp2(c * (s[r][j] - max[r])); w may be s.
  void (*softmax)(float* s, P* w, int64_t width, float c, bool entropy, SoftmaxRows& rows);
  // out[panel][r][.] = out * correction[r] + sum over keys of w[r][key] * value[key][.]; panels are stride apart.
  void (*values)(const P* w, const P* value, int64_t keys, int64_t stride, int64_t panels, const float* correction,
                 float* out);
  // w[r] = exp2(c * (score[r] - max[r])) / sum[r]: one score a row as a final weight.
  void (*final_weights)(const float* score, float c, const SoftmaxRows& rows, float* w);
  // sum[r] += sum over j of exp2(c * s[r][j] - offset[j]).
  void (*add_received)(const float* s, int64_t width, float c, const float* offset, float* sum);
  // max[r] = max(max[r], c * s[r][j] - offset[j]).
  void (*max_received)(const float* s, int64_t width, float c, const float* offset, float* max);
};

AttentionTile<float> attention_tile_base();
#if defined(__x86_64__)
AttentionTile<float> attention_tile_avx2();
AttentionTile<float> attention_tile_avx512();
AttentionTile<bf16> attention_tile_amx();
#endif

// Vec, beside what run_tile of gemm_tile.h asks for: multiply, max (a NaN in y survives), exp2, sum_lanes, max_lanes.
template <class Vec, int kRows, int kVectors>
struct AttentionLoops {
  using V = typename Vec::type;
  static constexpr int kColumns = kVectors * Vec::kWidth;

  static void scores(const float* row, const float* panel, int64_t depth, int64_t panels, float* s) {
    for (int64_t p = 0; p < panels; ++p, panel += depth * kColumns, s += kColumns) {
      V acc[kRows][kVectors];
      clear(acc);
      const float* a = row;
      const float* b = panel;
      for (int64_t k = 0; k < depth; ++k, a += kRows, b += kColumns) multiply_add(a, 1, b, acc);
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) Vec::store(s + r * kKeyBlock + v * Vec::kWidth, acc[r][v]);
      }
    }
  }

  static void values(const float* w, const float* value, int64_t keys, int64_t stride, int64_t panels,
                     const float* correction, float* out) {
    for (int64_t p = 0; p < panels; ++p, value += stride, out += kRows * kColumns) {
      V acc[kRows][kVectors];
      clear(acc);
      const float* b = value;
      for (int64_t k = 0; k < keys; ++k, b += kColumns) multiply_add(w + k, kKeyBlock, b, acc);
      // The block's own sum first: shorter chains, smaller errors.
#pragma GCC unroll 16
      for (int r = 0; r < kRows; ++r) {
        const V factor = Vec::broadcast(correction[r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          float* to = out + r * kColumns + v * Vec::kWidth;
          Vec::store(to, Vec::multiply_add(Vec::load(to), factor, acc[r][v]));
        }
      }
    }
  }

 private:
  static inline __attribute__((always_inline)) void clear(V (&acc)[kRows][kVectors]) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec::zero();
    }
  }

  static inline __attribute__((always_inline)) void multiply_add(const float* a, int64_t a_stride, const float* b,
                                                                 V (&acc)[kRows][kVectors]) {
    V column[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) column[v] = Vec::load(b + v * Vec::kWidth);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; ++r) {
      const V x = Vec::broadcast(a[r * a_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec::multiply_add(x, column[v], acc[r][v]);
    }
  }
};

// The exponentials, for any layout of operands: P says how weights are stored.
template <class Vec, class P, int kRows>
struct SoftmaxLoops {
  using V = typename Vec::type;

  static void softmax(float* s, P* w, int64_t width, float c, bool entropy, SoftmaxRows& rows) {
    // All maxima first: a row's exponentials wait for its own, and others fill the time.
    float max[kRows];
    for (int r = 0; r < kRows; ++r) max[r] = largest(s + r * kKeyBlock, width, rows.max[r]);
    for (int r = 0; r < kRows; ++r, s += kKeyBlock, w += kKeyBlock) {
      const V scale = Vec::broadcast(c), offset = Vec::multiply(Vec::broadcast(-max[r]), scale);
      const V shift = Vec::multiply_add(Vec::broadcast(rows.max[r]), scale, offset);
      V sum = Vec::zero(), weighted = Vec::zero();
      for (int64_t j = 0; j < width; j += Vec::kWidth) {
        const V x = Vec::multiply_add(Vec::load(s + j), scale, offset);
        const V weight = Vec::exp2(x);
        sum = Vec::add(sum, weight);
        if (entropy) weighted = Vec::multiply_add(weight, x, weighted);
        Vec::store(w + j, weight);
      }
      const float correction = Vec::first(Vec::exp2(shift)), sum_before = rows.sum[r];
      rows.max[r] = max[r];
      rows.correction[r] = correction;
      rows.sum[r] = sum_before * correction + Vec::sum_lanes(sum);
      rows.weighted[r] = (rows.weighted[r] + Vec::first(shift) * sum_before) * correction + Vec::sum_lanes(weighted);
    }
  }

  static void final_weights(const float* score, float c, const SoftmaxRows& rows, float* w) {
    for (int r = 0; r < kRows; ++r) {
      // As in softmax, to the bit: the weight of a query's only key is then exactly one.
      const V scale = Vec::broadcast(c), offset = Vec::multiply(Vec::broadcast(-rows.max[r]), scale);
      w[r] = Vec::first(Vec::exp2(Vec::multiply_add(Vec::broadcast(score[r]), scale, offset))) / rows.sum[r];
    }
  }

  static void add_received(const float* s, int64_t width, float c, const float* offset, float* sum) {
    const V scale = Vec::broadcast(c);
    for (int r = 0; r < kRows; ++r, s += kKeyBlock) {
      V total = Vec::zero();
      for (int64_t j = 0; j < width; j += Vec::kWidth) {
        const V x = Vec::multiply_add(Vec::load(s + j), scale, Vec::load(offset + j));
        total = Vec::add(total, Vec::exp2(x));
      }
      sum[r] += Vec::sum_lanes(total);
    }
  }

  static void max_received(const float* s, int64_t width, float c, const float* offset, float* max) {
    const V scale = Vec::broadcast(c);
    for (int r = 0; r < kRows; ++r, s += kKeyBlock) {
      V most = Vec::broadcast(max[r]);
      for (int64_t j = 0; j < width; j += Vec::kWidth) {
        most = Vec::max(most, Vec::multiply_add(Vec::load(s + j), scale, Vec::load(offset + j)));
      }
      max[r] = Vec::max_lanes(most);
    }
  }

 private:
  static float largest(const float* s, int64_t width, float before) {
    V even = Vec::broadcast(before), odd = even;  // a panel has two vectors at least
    for (int64_t j = 0; j < width; j += 2 * Vec::kWidth) {
      even = Vec::max(even, Vec::load(s + j));
      odd = Vec::max(odd, Vec::load(s + j + Vec::kWidth));
    }
    return Vec::max_lanes(Vec::max(even, odd));
  }
};

// 2^x for 0 <= x < 1 within 2e-9 (fitted to the smallest relative error, the constant held at one).
template <class Vec>
inline typename Vec::type exp2_fraction(typename Vec::type x) {
  typename Vec::type y = Vec::broadcast(0.00021612919226754457f);
  y = Vec::multiply_add(y, x, Vec::broadcast(0.001246784464456141f));
  y = Vec::multiply_add(y, x, Vec::broadcast(0.009675451554358006f));
  y = Vec::multiply_add(y, x, Vec::broadcast(0.055485282093286514f));
  y = Vec::multiply_add(y, x, Vec::broadcast(0.2402293086051941f));
  y = Vec::multiply_add(y, x, Vec::broadcast(0.6931470632553101f));
  return Vec::multiply_add(y, x, Vec::broadcast(1.0f));
}

template <class Vec, int kRows, int kVectors>
constexpr AttentionTile<float> float_attention_tile(const char* isa) {
  using Loops = AttentionLoops<Vec, kRows, kVectors>;
  using Softmax = SoftmaxLoops<Vec, float, kRows>;
  return {isa,
          kRows,
          Loops::kColumns,
          nullptr,
          nullptr,
          &Loops::scores,
          &Softmax::softmax,
          &Loops::values,
          &Softmax::final_weights,
          &Softmax::add_received,
          &Softmax::max_received};
}

}  // namespace moetrain
