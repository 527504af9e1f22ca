#include "cpu/gemm_kernel.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/gemm_tile.h"
#include "cpu/isa.h"
#include "cpu/scratch.h"

namespace moetrain {
namespace {

// A packed block of a (kBlockFloats) and the two panels of b in use stay in L2.
constexpr int64_t kBlockK = 512;
constexpr int64_t kBlockFloats = 448 * kBlockK;
constexpr int64_t kBlockM = 4096;
constexpr int64_t kBlockN = 2048;
constexpr int64_t kCopyDepth = kLookAhead;

Tile choose_tile() {
#if defined(__x86_64__)
  if (widest_isa() >= Isa::kAvx512) return tile_avx512();
  if (widest_isa() == Isa::kAvx2) return tile_avx2();
#endif
  return tile_base();
}

const Tile& tile() {
  static const Tile chosen = choose_tile();
  return chosen;
}

const PackFns<float>& pack_fns_of(const Tile& t, float) { return t.pack_float; }
const PackFns<bf16>& pack_fns_of(const Tile& t, bf16) { return t.pack_bf16; }

int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// Rows of a, this many steps of k deep, that stay in L2.
int64_t rows_fitting(int64_t k) { return std::min<int64_t>(kBlockFloats / std::min(k, kBlockK), 1024); }

struct Buffers {
  Scratch a, b, sums;
};

// The part of one group's c that one thread computes at a stretch.
struct Task {
  int64_t group, row, rows, column, columns;
};

// Rows [first, last) of an operand cut into panels: of a, of nearly equal height, so that no tile is a sliver; of b,
// whole ones and the rest.
struct Panels {
  int64_t first, last, pitch, count;
  bool even;
  int64_t start(int64_t panel) const {
    return even ? first + (last - first) * panel / count : std::min(first + panel * pitch, last);
  }
  int64_t size(int64_t panel) const { return start(panel + 1) - start(panel); }
};

// The rows in memory that panels of an operand are packed from, for steps [k, k + depth).
template <class T>
class Source {
 public:
  // outer: the rows of x in all.
  void set(const Operand<T>& x, int64_t outer, const Panels& panels, int64_t k, int64_t depth) {
    static const T zeros[kBlockK] = {};
    x_ = &x;
    outer_ = outer;
    panels_ = panels;
    depth_ = depth;
    const int64_t first = x.reduction_contiguous ? panels.first : k;
    const int64_t last = x.reduction_contiguous ? panels.last : k + depth;
    const int64_t offset = x.reduction_contiguous ? k : 0;
    rows_.resize(last - first + panels.pitch + kLookAhead);
    for (int64_t i = first; i < last; ++i) rows_[i - first] = x.row(i) + offset;
    std::fill(rows_.begin() + (last - first), rows_.end(), zeros);
  }

  int64_t panel_floats() const { return panels_.pitch * depth_; }

  // Panels [begin, end), one after the other.
  void pack(int64_t begin, int64_t end, float* to) const {
    const PackFns<T>& fns = pack_fns_of(tile(), T{});
    if (x_->reduction_contiguous) {
      for (int64_t p = begin; p < end; ++p, to += panel_floats()) {
        fns.transpose(rows_.data() + panels_.start(p) - panels_.first, depth_, panels_.pitch, to);
      }
      return;
    }
    for (int64_t k = 0; k < depth_; k += kCopyDepth) {  // few rows, so that lines on two panels are read once
      for (int64_t p = begin; p < end; ++p) {
        const int64_t first = panels_.start(p);
        fns.copy(rows_.data() + k, first, std::min(panels_.pitch, outer_ - first), std::min(kCopyDepth, depth_ - k),
                 panels_.pitch, to + (p - begin) * panel_floats() + k * panels_.pitch);
      }
    }
  }

  // Work for the tiles of the panel before this one, in so many bursts: pack it to `to` and return true, or fetch what
  // packing will read and return false.
  bool work_ahead(int64_t panel, int64_t bursts, float* to, Ahead& ahead) const {
    if constexpr (std::is_same_v<T, float>) {
      if (!x_->reduction_contiguous && panels_.size(panel) == panels_.pitch) {
        ahead.burst = ceil_div(depth_, bursts);
        ahead.copy_rows = rows_.data();
        ahead.copies_left = depth_;
        ahead.copy_first = panels_.start(panel);
        ahead.to = to;
        return true;
      }
    }
    const bool across = x_->reduction_contiguous;
    const int64_t first = across ? panels_.start(panel) - panels_.first : 0;
    ahead.ask_rows = reinterpret_cast<const char* const*>(rows_.data() + first);
    ahead.asks_left = across ? panels_.size(panel) : depth_;
    ahead.offset = across ? 0 : panels_.start(panel) * sizeof(T);
    ahead.lines = ceil_div((across ? depth_ : panels_.size(panel)) * sizeof(T), 64);
    ahead.burst = ceil_div(ahead.asks_left * ahead.lines, bursts);
    return false;
  }

  // The same for a panel that is packed already: fetch it.
  void fetch_packed(const float* panel, int64_t bursts, Ahead& ahead) {
    packed_ = reinterpret_cast<const char*>(panel);
    ahead.ask_rows = &packed_;
    ahead.asks_left = 1;
    ahead.lines = ceil_div(panel_floats() * sizeof(float), 64);
    ahead.burst = ceil_div(ahead.lines, bursts);
  }

 private:
  const Operand<T>* x_ = nullptr;
  Panels panels_{};
  int64_t outer_ = 0, depth_ = 0;
  std::vector<const T*> rows_;
  const char* packed_ = nullptr;
};

// From float sums to c.
template <class T, class Out>
void write_sums(const Gemm<T, Out>& g, const float* sums, int64_t stride, int64_t row, int64_t rows, int64_t column,
                int64_t columns) {
  for (int64_t r = 0; r < rows; ++r, sums += stride) {
    Out* out = g.c_row(row + r) + column;
    for (int64_t j = 0; j < columns; ++j) {
      out[j] = from_float<Out>(g.accumulate ? to_float(out[j]) + sums[j] : sums[j]);
    }
  }
}

// The output may hold the sums while they grow: no rounding to bf16, no order of rows, nothing to add to.
template <class T, class Out>
bool holds_sums(const Gemm<T, Out>& g) {
  return std::is_same_v<Out, float> && !g.accumulate && !g.c_index;
}

// One task: for each block of k, and of rows, multiply the packed rows of a with one panel of b after the other. The
// first block of rows packs b; if others follow, its panels are kept for them.
template <class T, class Out>
class Run {
 public:
  Run(const Gemm<T, Out>& g, const Task& task, Buffers& buffers)
      : g_(g),
        task_(task),
        columns_{task.column, task.column + task.columns, tile().columns, ceil_div(task.columns, tile().columns),
                 false},
        block_rows_(ceil_div(task.rows, ceil_div(task.rows, rows_fitting(g.k)))),
        keeps_b_(block_rows_ < task.rows),
        keeps_sums_(g.k > kBlockK) {
    const Tile& t = tile();
    const int64_t depth = std::min(kBlockK, g.k);
    sums_stride_ = keeps_sums_ ? columns_.count * t.columns : t.columns;
    a_ = buffers.a.at_least<float>(ceil_div(block_rows_, t.rows) * t.row_pitch * depth);
    b_ = buffers.b.at_least<float>((keeps_b_ ? columns_.count : 2) * t.columns * depth);
    sums_ = buffers.sums.at_least<float>((keeps_sums_ ? task.rows : t.rows) * sums_stride_);
  }

  void run() {
    for (k_ = 0; k_ < g_.k; k_ += kBlockK) {
      depth_ = std::min(kBlockK, g_.k - k_);
      b_source_.set(g_.b, g_.n, columns_, k_, depth_);
      for (int64_t row = 0; row < task_.rows; row += block_rows_) {
        run_rows(row, std::min(block_rows_, task_.rows - row));
      }
    }
  }

 private:
  float* b_panel(int64_t j) const { return b_ + (keeps_b_ ? j : j % 2) * b_source_.panel_floats(); }

  void run_rows(int64_t row, int64_t size) {
    const Tile& t = tile();
    const Panels rows{task_.row + row, task_.row + row + size, t.row_pitch, ceil_div(size, t.rows), true};
    a_source_.set(g_.a, g_.m, rows, k_, depth_);
    a_source_.pack(0, rows.count, a_);
    const int64_t bursts = rows.count * ceil_div(depth_, kStepsPerBurst);
    bool packed = row > 0;
    for (int64_t j = 0; j < columns_.count; ++j) {
      if (!packed) b_source_.pack(j, j + 1, b_panel(j));
      Ahead ahead;
      if (j + 1 < columns_.count) packed = prepare(j + 1, row > 0, bursts, ahead);
      for (int64_t i = 0; i < rows.count; ++i) run_tile(rows, i, j, ahead);
    }
  }

  // Gives the tiles work for panel j of b; false when it will still have to be packed.
  bool prepare(int64_t j, bool packed_before, int64_t bursts, Ahead& ahead) {
    if (!packed_before) return b_source_.work_ahead(j, bursts, b_panel(j), ahead);
    b_source_.fetch_packed(b_panel(j), bursts, ahead);
    return true;
  }

  void run_tile(const Panels& rows, int64_t i, int64_t j, Ahead& ahead) {
    const Tile& t = tile();
    TileCall call{a_ + i * a_source_.panel_floats(), b_panel(j), depth_, sums_, sums_stride_, k_ > 0};
    if constexpr (std::is_same_v<Out, float>) {
      if (holds_sums(g_) && columns_.size(j) == t.columns) {
        call.c = g_.c_row(rows.start(i)) + columns_.start(j);
        call.c_stride = g_.c_stride;
        t.run(rows.size(i), call, ahead);
        return;
      }
    }
    if (keeps_sums_) call.c += (rows.start(i) - task_.row) * sums_stride_ + j * t.columns;
    t.run(rows.size(i), call, ahead);
    if (k_ + depth_ < g_.k) return;
    write_sums(g_, call.c, sums_stride_, rows.start(i), rows.size(i), columns_.start(j), columns_.size(j));
  }

  const Gemm<T, Out>& g_;
  const Task& task_;
  const Panels columns_;
  const int64_t block_rows_;
  const bool keeps_b_, keeps_sums_;
  int64_t sums_stride_ = 0, k_ = 0, depth_ = 0;
  float *a_ = nullptr, *b_ = nullptr, *sums_ = nullptr;
  Source<T> a_source_, b_source_;
};

template <class T, class Out>
std::vector<Task> cut(const std::vector<Gemm<T, Out>>& groups, int64_t block_m, int64_t block_n) {
  std::vector<Task> tasks;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (groups[g].k == 0 || groups[g].m == 0) continue;
    const int64_t most = holds_sums(groups[g]) ? block_m : std::min(block_m, rows_fitting(groups[g].k));
    const int64_t blocks = ceil_div(groups[g].m, most);
    for (int64_t i = 0; i < blocks; ++i) {
      const int64_t r = groups[g].m * i / blocks, rows = groups[g].m * (i + 1) / blocks - r;
      for (int64_t j = 0; j < groups[g].n; j += block_n) {
        tasks.push_back({static_cast<int64_t>(g), r, rows, j, std::min(block_n, groups[g].n - j)});
      }
    }
  }
  return tasks;
}

// Large blocks pack least; they shrink until every thread has a few. The cut changes no bit of the result.
template <class T, class Out>
std::vector<Task> cut_for(const std::vector<Gemm<T, Out>>& groups, int threads) {
  const Tile& t = tile();
  int64_t block_m = kBlockM, block_n = kBlockN;
  std::vector<Task> tasks = cut(groups, block_m, block_n);
  const int64_t enough = threads == 1 ? 1 : 4 * threads;
  while (static_cast<int64_t>(tasks.size()) < enough && block_n > 4 * t.columns) {
    block_n /= 2;
    tasks = cut(groups, block_m, block_n);
  }
  while (static_cast<int64_t>(tasks.size()) < enough && block_m > 4 * t.rows) {
    block_m /= 2;
    tasks = cut(groups, block_m, block_n);
  }
  return tasks;
}

// An empty sum.
template <class T, class Out>
void write_zeros(const Gemm<T, Out>& g) {
  if (g.accumulate) return;
  for (int64_t r = 0; r < g.m; ++r) std::memset(g.c_row(r), 0, g.n * sizeof(Out));
}

}  // namespace

template <class T, class Out>
void grouped_gemm(const std::vector<Gemm<T, Out>>& groups, int threads) {
  for (const Gemm<T, Out>& g : groups) {
    if (g.k == 0) write_zeros(g);
  }
  const std::vector<Task> tasks = cut_for(groups, threads);
  const int64_t count = static_cast<int64_t>(tasks.size());
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffers buffers;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) Run(groups[tasks[i].group], tasks[i], buffers).run();
  }
}

template void grouped_gemm(const std::vector<Gemm<float>>&, int);
template void grouped_gemm(const std::vector<Gemm<bf16>>&, int);
template void grouped_gemm(const std::vector<Gemm<bf16, float>>&, int);

}  // namespace moetrain
