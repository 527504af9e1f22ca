#include "cpu/attention_kernel.h"

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/attention_driver.h"

namespace moetrain {
namespace {

// What a thread needs for one task: up to `strips` strips of queries of one head.
template <class P>
struct Scratch {
  P* q;             // [strips][packed strip]
  float* out;       // [strips][panel][rows][columns]
  float* self;      // [strips][kMaxStripRows]: each query's score with its own key
  float* s;         // [rows][kKeyBlock]
  P* w;             // the same, or s itself
  SoftmaxRows* rows;

  Scratch(int64_t strips, int64_t q_size, int64_t out_size, int64_t s_size, Carver& carver)
      : q(carver.take<P>(strips * q_size)),
        out(carver.take<float>(strips * out_size)),
        self(carver.take<float>(strips * kMaxStripRows)),
        s(carver.take<float>(s_size)),
        w(sizeof(P) == sizeof(float) ? reinterpret_cast<P*>(s) : carver.take<P>(s_size)),
        rows(carver.take<SoftmaxRows>(strips)) {}
};

// For inputs of T and packed operands of Layout::Packed.
template <class T, class Layout>
class Forward {
  using P = typename Layout::Packed;

 public:
  Forward(const Attention<T>& a, const AttentionTile<P>& tile, int threads, void* memory)
      : a_(a),
        shape_(a.shape),
        tile_(tile),
        carver_(memory),
        mask_(a.shape, tile.columns, carver_),
        depth_(Layout::padded_depth(a.shape.depth)),
        panels_(a.v.data ? (a.shape.depth + tile.columns - 1) / tile.columns : 0),
        task_strips_(strips_of_a_task(a.shape, tile.rows, threads)),
        keys_(carver_.take<P>(a.shape.batch * a.shape.groups * mask_.padded * depth_)),
        values_(carver_.take<P>(a.shape.batch * a.shape.groups * panels_ * value_stride())) {
    for (int i = 0; i < threads; ++i) {
      scratch_.emplace_back(task_strips_, strip_size(), out_size(), tile.rows * kKeyBlock, carver_);
    }
  }

  size_t bytes() const { return carver_.used(); }

  void run() {
    const int64_t packed_heads = shape_.batch * shape_.groups;
    const int64_t task_rows = task_strips_ * tile_.rows;
    const int64_t row_blocks = (shape_.seq + task_rows - 1) / task_rows, heads = shape_.batch * shape_.heads;
#pragma omp parallel num_threads(static_cast<int>(scratch_.size()))
    {
      const Entered<P> entered(tile_);
#pragma omp for
      for (int64_t b = 0; b < shape_.batch; ++b) mask_.fill(shape_, b);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < packed_heads * mask_.blocks; ++i) pack(i / mask_.blocks, i % mask_.blocks * kKeyBlock);
      // Under a causal mask late queries have most keys: they come first, and the threads end together.
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < row_blocks * heads; ++i) {
        run_task(i % heads / shape_.heads, i % heads % shape_.heads, (row_blocks - 1 - i / heads) * task_rows,
                 scratch_[omp_get_thread_num()]);
      }
    }
  }

 private:
  int64_t strip_size() const { return tile_.rows * depth_; }
  int64_t out_size() const { return panels_ * tile_.rows * tile_.columns; }
  int64_t value_stride() const { return mask_.padded * tile_.columns; }

  const P* keys_from(int64_t packed_head, int64_t key) const {
    return keys_ + (packed_head * mask_.padded + key) * depth_;
  }
  const P* values_from(int64_t packed_head, int64_t key) const {
    return values_ + packed_head * panels_ * value_stride() + key * tile_.columns;
  }

  void pack(int64_t packed_head, int64_t first) {
    const int64_t b = packed_head / shape_.groups, group = packed_head % shape_.groups;
    const int64_t end = std::min(first + kKeyBlock, mask_.padded);
    for (int64_t j = first; j < end; j += tile_.columns) {
      Layout::pack_columns(rows_of(a_.k, shape_, b, group, j, tile_.columns), tile_.columns,
                           const_cast<P*>(keys_from(packed_head, j)));
    }
    if (panels_ > 0) {
      Layout::pack_values(rows_of(a_.v, shape_, b, group, first, end - first), end - first, tile_.columns,
                          value_stride(), const_cast<P*>(values_from(packed_head, first)));
    }
  }

  void run_task(int64_t b, int64_t head, int64_t first, Scratch<P>& scratch) {
    const int64_t strips = std::min(task_strips_, (shape_.seq - first + tile_.rows - 1) / tile_.rows);
    for (int64_t i = 0; i < strips; ++i) start(b, head, first + i * tile_.rows, i, scratch);
    const int64_t keys = shape_.causal ? std::min(first + strips * tile_.rows, shape_.seq) : shape_.seq;
    for (int64_t key = 0; key < keys; key += kKeyBlock) {
      if (mask_.block[b * mask_.blocks + key / kKeyBlock] == Block::kHidden) continue;
      for (int64_t i = 0; i < strips; ++i) attend(b, head, first + i * tile_.rows, key, i, scratch);
    }
    for (int64_t i = 0; i < strips; ++i) finish(b, head, first + i * tile_.rows, i, scratch);
  }

  void start(int64_t b, int64_t head, int64_t query, int64_t strip, Scratch<P>& scratch) {
    Layout::pack_rows(rows_of(a_.q, shape_, b, head, query, tile_.rows), tile_.rows,
                      scratch.q + strip * strip_size());
    std::fill_n(scratch.out + strip * out_size(), out_size(), 0.0f);
    std::fill_n(scratch.self + strip * kMaxStripRows, kMaxStripRows, kHidden);
    SoftmaxRows& rows = scratch.rows[strip];
    rows = {};
    std::fill_n(rows.max, kMaxStripRows, kNoMaximum);
  }

  // One strip of queries takes in one block of keys, as far as its last query sees.
  void attend(int64_t b, int64_t head, int64_t query, int64_t key, int64_t strip, Scratch<P>& scratch) {
    const int64_t last = shape_.causal ? std::min(query + tile_.rows, shape_.seq) : shape_.seq;
    const int64_t keys = std::min(last - key, kKeyBlock);
    if (keys <= 0) return;
    const int64_t packed_head = b * shape_.groups + head / (shape_.heads / shape_.groups);
    const int64_t width = round_up(keys, tile_.columns);
    tile_.scores(scratch.q + strip * strip_size(), keys_from(packed_head, key), depth_, width / tile_.columns,
                 scratch.s);
    hide(b, query, key, width, scratch.s);
    keep_self(query, key, width, scratch.s, scratch.self + strip * kMaxStripRows);
    SoftmaxRows& rows = scratch.rows[strip];
    tile_.softmax(scratch.s, scratch.w, width, shape_.scale * kLog2E, a_.measure == Measure::kRowEntropy, rows);
    tile_.values(scratch.w, values_from(packed_head, key), keys, value_stride(), panels_, rows.correction,
                 scratch.out + strip * out_size());
  }

  void hide(int64_t b, int64_t query, int64_t key, int64_t width, float* s) const {
    if (mask_.block[b * mask_.blocks + key / kKeyBlock] == Block::kSomeHidden) {
      const float* addend = mask_.addend + b * mask_.padded + key;
      for (int64_t r = 0; r < tile_.rows; ++r) {
        for (int64_t j = 0; j < width; ++j) s[r * kKeyBlock + j] += addend[j];
      }
    }
    if (!shape_.causal) return;
    for (int64_t r = 0; r < tile_.rows; ++r) {
      for (int64_t j = std::max<int64_t>(query + r + 1 - key, 0); j < width; ++j) s[r * kKeyBlock + j] = kHidden;
    }
  }

  void keep_self(int64_t query, int64_t key, int64_t width, const float* s, float* self) const {
    for (int64_t r = 0; r < tile_.rows; ++r) {
      const int64_t j = query + r - key;
      if (j >= 0 && j < width) self[r] = s[r * kKeyBlock + j];
    }
  }

  void finish(int64_t b, int64_t head, int64_t query, int64_t strip, Scratch<P>& scratch) const {
    const SoftmaxRows& rows = scratch.rows[strip];
    float weight[kMaxStripRows];
    if (a_.measure == Measure::kSelfWeight || a_.measure == Measure::kRowMax) {
      const float* score = a_.measure == Measure::kRowMax ? rows.max : scratch.self + strip * kMaxStripRows;
      tile_.final_weights(score, shape_.scale * kLog2E, rows, weight);
    }
    for (int64_t r = 0; r < std::min<int64_t>(tile_.rows, shape_.seq - query); ++r) {
      const int64_t i = query + r, row = (b * shape_.heads + head) * shape_.seq + i;
      const bool* valid = valid_from(shape_, b, i);
      const bool sees = rows.sum[r] != 0.0f && (!valid || *valid);
      if (panels_ > 0) write_out(scratch.out + strip * out_size(), b, head, i, r, sees ? rows.sum[r] : 0.0f);
      if (a_.lse) a_.lse[row] = sees ? shape_.scale * rows.max[r] + std::log(rows.sum[r]) : infinite;
      if (a_.statistic) a_.statistic[row] = sees ? statistic(rows, r, mask_.visible[b * shape_.seq + i], weight) : 0.0f;
    }
  }

  // Out of the strip's panels; zeros where there is nothing to divide by.
  void write_out(const float* out, int64_t b, int64_t head, int64_t query, int64_t r, float sum) const {
    T* to = a_.out + ((query * shape_.batch + b) * shape_.heads + head) * shape_.depth;
    for (int64_t first = 0; first < shape_.depth; first += tile_.columns, out += tile_.rows * tile_.columns) {
      const int64_t used = std::min<int64_t>(tile_.columns, shape_.depth - first);
      const float* from = out + r * tile_.columns;
      for (int64_t k = 0; k < used; ++k) to[first + k] = from_float<T>(sum != 0.0f ? from[k] / sum : 0.0f);
    }
  }

  float statistic(const SoftmaxRows& rows, int64_t r, int32_t visible, const float* weight) const {
    if (a_.measure != Measure::kRowEntropy) return std::min(weight[r], 1.0f);
    if (visible < 2) return 0.0f;
    const float bits = std::log2(rows.sum[r]) - rows.weighted[r] / rows.sum[r];
    return std::max(bits / std::log2(static_cast<float>(visible)), 0.0f);
  }

  static constexpr float infinite = std::numeric_limits<float>::infinity();

  const Attention<T>& a_;
  const AttentionShape& shape_;
  const AttentionTile<P>& tile_;
  Carver carver_;
  KeyMask mask_;
  const int64_t depth_, panels_, task_strips_;
  P* keys_;    // [B][G][padded / columns][panel]
  P* values_;  // [B][G][panel][padded][columns]
  std::vector<Scratch<P>> scratch_;
};

}  // namespace

template <class T>
size_t attention_workspace(const Attention<T>& a, int threads) {
  return with_tile<T>([&](auto layout, const auto& tile) {
    return Forward<T, decltype(layout)>(a, tile, threads, nullptr).bytes();
  });
}

template <class T>
void attention_forward(const Attention<T>& a, int threads, void* workspace) {
  with_tile<T>([&](auto layout, const auto& tile) {
    Forward<T, decltype(layout)>(a, tile, threads, workspace).run();
  });
}

template size_t attention_workspace<float>(const Attention<float>&, int);
template size_t attention_workspace<bf16>(const Attention<bf16>&, int);
template void attention_forward<float>(const Attention<float>&, int, void*);
template void attention_forward<bf16>(const Attention<bf16>&, int, void*);

void sum_over_heads(const float* statistic, const AttentionShape& shape, float* sum, int threads) {
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t s = 0; s < shape.seq; ++s) {
    for (int64_t b = 0; b < shape.batch; ++b) {
      float total = 0.0f;
      for (int64_t h = 0; h < shape.heads; ++h) total += statistic[(b * shape.heads + h) * shape.seq + s];
      sum[s * shape.batch + b] = total;
    }
  }
}

}  // namespace moetrain
