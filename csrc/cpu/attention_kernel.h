// Attention on the CPU, torch-free: out = softmax(scale * q k^T) v by blocks with an online softmax, and in the same
// pass, for every query, the log of the softmax's denominator and one statistic of its row of weights.
//
// Legend: S positions, B sequences, H query heads, G key heads (H a multiple of G), d head width.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/bf16.h"

namespace moetrain {

enum class Measure { kNone, kSelfWeight, kRowMax, kRowEntropy, kColMax, kColSum };

// [S, B, heads, d] with d contiguous.
template <class T>
struct Heads {
  const T* data = nullptr;
  int64_t stride_s = 0, stride_b = 0, stride_h = 0;

  const T* at(int64_t s, int64_t b, int64_t h) const { return data + s * stride_s + b * stride_b + h * stride_h; }
};

struct AttentionShape {
  int64_t seq, batch, heads, groups, depth;
  bool causal;
  float scale;        // above zero
  const bool* valid;  // [B, S]: a real token; null: all are. Others are seen by nobody and see nothing.
};

template <class T>
struct Attention {
  AttentionShape shape;
  Heads<T> q, k, v;            // v without data: statistics only
  T* out = nullptr;            // [S, B, H, d]; zero where a query sees nothing
  float* lse = nullptr;        // [B, H, S] natural log; infinite where a query sees nothing
  float* statistic = nullptr;  // [B, H, S]
  Measure measure = Measure::kNone;  // of a row
};

// The statistics of columns, and kSelfWeight, from the log-sum-exp of the rows.
template <class T>
struct FromLse {
  AttentionShape shape;
  Heads<T> q, k;
  const float* lse;  // [B, H, S]
  float* statistic;  // [B, H, S]
  Measure measure;
};

// Both take memory of so many bytes, aligned to 64: O(S) of it. Bits do not depend on the number of threads.
template <class T>
size_t attention_workspace(const Attention<T>& a, int threads);
template <class T>
void attention_forward(const Attention<T>& a, int threads, void* workspace);

template <class T>
size_t received_workspace(const FromLse<T>& a, int threads);
template <class T>
void attention_received(const FromLse<T>& a, int threads, void* workspace);

template <class T>
void self_weight(const FromLse<T>& a, int threads);

// sum[S, B] of statistic [B, H, S] over the heads, in order.
void sum_over_heads(const float* statistic, const AttentionShape& shape, float* sum, int threads);

}  // namespace moetrain
