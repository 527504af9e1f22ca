// Statistics that need the log-sum-exp of every row first. The strips of attention turned round: a strip of keys
// against blocks of queries, so that one thread owns the whole sum of a key.
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "cpu/attention_driver.h"

namespace moetrain {
namespace {

template <class P>
struct Scratch {
  P* k;         // [strips][packed strip]
  float* s;     // [rows][kKeyBlock]
  float* found; // [strips][kMaxStripRows]

  Scratch(int64_t strips, int64_t k_size, int64_t s_size, Carver& carver)
      : k(carver.take<P>(strips * k_size)),
        s(carver.take<float>(s_size)),
        found(carver.take<float>(strips * kMaxStripRows)) {}
};

// For inputs of T and packed operands of Layout::Packed.
template <class T, class Layout>
class Received {
  using P = typename Layout::Packed;

 public:
  Received(const FromLse<T>& a, const AttentionTile<P>& tile, int threads, void* memory)
      : a_(a),
        shape_(a.shape),
        tile_(tile),
        carver_(memory),
        padded_(round_up(a.shape.seq, tile.columns)),
        depth_(Layout::padded_depth(a.shape.depth)),
        task_strips_(strips_of_a_task(a.shape, tile.rows, threads)),
        queries_(carver_.take<P>(a.shape.batch * a.shape.heads * padded_ * depth_)),
        offset_(carver_.take<float>(a.shape.batch * a.shape.heads * padded_)) {
    for (int i = 0; i < threads; ++i) {
      scratch_.emplace_back(task_strips_, tile.rows * depth_, tile.rows * kKeyBlock, carver_);
    }
  }

  size_t bytes() const { return carver_.used(); }

  void run() {
    const int64_t heads = shape_.batch * shape_.heads, blocks = (shape_.seq + kKeyBlock - 1) / kKeyBlock;
    const int64_t task_rows = task_strips_ * tile_.rows, row_blocks = (shape_.seq + task_rows - 1) / task_rows;
#pragma omp parallel num_threads(static_cast<int>(scratch_.size()))
    {
      const Entered<P> entered(tile_);
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < heads * blocks; ++i) pack(i / blocks, i % blocks * kKeyBlock);
      // Under a causal mask early keys are seen by most queries: they come first, and the threads end together.
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < heads * row_blocks; ++i) {
        run_task(i % heads, i / heads * task_rows, scratch_[omp_get_thread_num()]);
      }
    }
  }

 private:
  // Queries become columns, and their log-sum-exp the offset of a column: infinite where nothing is seen.
  void pack(int64_t head, int64_t first) {
    const int64_t b = head / shape_.heads, end = std::min(first + kKeyBlock, padded_);
    const bool* valid = valid_from(shape_, b, 0);
    for (int64_t i = first; i < end; i += tile_.columns) {
      Layout::pack_columns(rows_of(a_.q, shape_, b, head % shape_.heads, i, tile_.columns), tile_.columns,
                           queries_ + (head * padded_ + i) * depth_);
    }
    for (int64_t i = first; i < end; ++i) {
      const bool sees = i < shape_.seq && (!valid || valid[i]);
      offset_[head * padded_ + i] = sees ? -a_.lse[head * shape_.seq + i] * kLog2E : -infinite;
    }
  }

  void run_task(int64_t head, int64_t first, Scratch<P>& scratch) {
    const int64_t b = head / shape_.heads, group = head % shape_.heads / (shape_.heads / shape_.groups);
    const int64_t strips = std::min(task_strips_, (shape_.seq - first + tile_.rows - 1) / tile_.rows);
    const bool largest = a_.measure == Measure::kColMax;
    for (int64_t i = 0; i < strips; ++i) {
      Layout::pack_rows(rows_of(a_.k, shape_, b, group, first + i * tile_.rows, tile_.rows), tile_.rows,
                        scratch.k + i * tile_.rows * depth_);
    }
    std::fill_n(scratch.found, strips * kMaxStripRows, largest ? -infinite : 0.0f);
    for (int64_t query = shape_.causal ? first / kKeyBlock * kKeyBlock : 0; query < shape_.seq; query += kKeyBlock) {
      for (int64_t i = 0; i < strips; ++i) receive(head, first + i * tile_.rows, query, i, scratch);
    }
    for (int64_t i = 0; i < strips; ++i) finish(head, first + i * tile_.rows, scratch.found + i * kMaxStripRows);
  }

  // One strip of keys takes in one block of queries.
  void receive(int64_t head, int64_t key, int64_t query, int64_t strip, Scratch<P>& scratch) {
    const int64_t width = round_up(std::min(shape_.seq - query, kKeyBlock), tile_.columns);
    tile_.scores(scratch.k + strip * tile_.rows * depth_, queries_ + (head * padded_ + query) * depth_, depth_,
                 width / tile_.columns, scratch.s);
    for (int64_t r = 0; shape_.causal && r < tile_.rows; ++r) {
      std::fill_n(scratch.s + r * kKeyBlock, std::clamp<int64_t>(key + r - query, 0, width), kHidden);
    }
    const auto take_in = a_.measure == Measure::kColMax ? tile_.max_received : tile_.add_received;
    take_in(scratch.s, width, shape_.scale * kLog2E, offset_ + head * padded_ + query,
            scratch.found + strip * kMaxStripRows);
  }

  void finish(int64_t head, int64_t key, const float* found) const {
    for (int64_t r = 0; r < std::min<int64_t>(tile_.rows, shape_.seq - key); ++r) {
      const bool* valid = valid_from(shape_, head / shape_.heads, key + r);
      const float result = a_.measure == Measure::kColMax ? std::min(std::exp2(found[r]), 1.0f) : found[r];
      a_.statistic[head * shape_.seq + key + r] = !valid || *valid ? result : 0.0f;
    }
  }

  static constexpr float infinite = std::numeric_limits<float>::infinity();

  const FromLse<T>& a_;
  const AttentionShape& shape_;
  const AttentionTile<P>& tile_;
  Carver carver_;
  const int64_t padded_, depth_, task_strips_;
  P* queries_;     // [B][H][padded / columns][panel]
  float* offset_;  // [B][H][padded], in units of base 2
  std::vector<Scratch<P>> scratch_;
};

// Sixteen sums, each over ascending positions, then one over them: the same on every CPU.
template <class T>
float dot(const T* x, const T* y, int64_t depth) {
  float lane[16] = {};
  int64_t k = 0;
  for (; k + 16 <= depth; k += 16) {
    for (int64_t j = 0; j < 16; ++j) lane[j] += to_float(x[k + j]) * to_float(y[k + j]);
  }
  for (int64_t j = 0; k + j < depth; ++j) lane[j] += to_float(x[k + j]) * to_float(y[k + j]);
  float sum = 0.0f;
  for (const float part : lane) sum += part;
  return sum;
}

}  // namespace

template <class T>
size_t received_workspace(const FromLse<T>& a, int threads) {
  return with_tile<T>([&](auto layout, const auto& tile) {
    return Received<T, decltype(layout)>(a, tile, threads, nullptr).bytes();
  });
}

template <class T>
void attention_received(const FromLse<T>& a, int threads, void* workspace) {
  with_tile<T>([&](auto layout, const auto& tile) {
    Received<T, decltype(layout)>(a, tile, threads, workspace).run();
  });
}

template <class T>
void self_weight(const FromLse<T>& a, int threads) {
  const AttentionShape& shape = a.shape;
#pragma omp parallel for collapse(2) num_threads(threads)
  for (int64_t head = 0; head < shape.batch * shape.heads; ++head) {
    for (int64_t s = 0; s < shape.seq; ++s) {
      const int64_t b = head / shape.heads, h = head % shape.heads, group = h / (shape.heads / shape.groups);
      const bool* valid = valid_from(shape, b, s);
      const float score = shape.scale * dot(a.q.at(s, b, h), a.k.at(s, b, group), shape.depth);
      const float weight = std::min(std::exp(score - a.lse[head * shape.seq + s]), 1.0f);
      a.statistic[head * shape.seq + s] = !valid || *valid ? weight : 0.0f;
    }
  }
}

template size_t received_workspace<float>(const FromLse<float>&, int);
template size_t received_workspace<bf16>(const FromLse<bf16>&, int);
template void attention_received<float>(const FromLse<float>&, int, void*);
template void attention_received<bf16>(const FromLse<bf16>&, int, void*);
template void self_weight<float>(const FromLse<float>&, int);
template void self_weight<bf16>(const FromLse<bf16>&, int);

}  // namespace moetrain
