#include "cpu/gemm_amx.h"

#include <omp.h>

#include "cpu/amx.h"
#include "cpu/scratch.h"

namespace moetrain::amx {
namespace {

// A panel and the sums of a region should leave room for each other in a 2 MB L2.
constexpr int64_t kPanelBytes = 1 << 20;
constexpr int64_t kMaxPanel = 512, kMinPanel = 128;
constexpr int64_t kStepsOfLatency = 64;  // tile products between asking for a line of memory and having it
constexpr int64_t kRegion = 512;  // outer of the strips of a region whose sums wait between parts of k

// How one product is walked: the strip operand in pieces of 32 outer, the panel operand `panel` outer at a time, k in
// parts of `depth`.
struct Plan {
  bool strip_is_a;
  int64_t panel, region, depth;
};

struct Task {
  int64_t group, panel, panels, strip, strips;
};

struct Buffers {
  Scratch strip, panel, sums;
};

// The strip of a weight gradient is a. Of the other products it is the weights while these outnumber the tokens: then
// they pass by once, prefetched, and the panel of tokens is small. For many tokens it is the tokens: then the weights
// are packed once, and the output is written in the order of memory. The bits are the same.
constexpr int64_t kManyRows = 512;

template <class Out>
Plan plan_for(const Product<Out>& g) {
  if (!g.a.reduction_contiguous) return {true, kMaxPanel, g.k > kStripDepth ? kRegion : INT64_MAX, kStripDepth};
  const bool strip_is_a = g.m >= kManyRows || g.m >= g.n;
  const int64_t fits = kPanelBytes / 2 / (g.k > 0 ? g.k : 1) / kBlock * kBlock;
  if (fits < kMinPanel) return {strip_is_a, kMaxPanel, g.k > kStripDepth ? kRegion : INT64_MAX, kStripDepth};
  return {strip_is_a, smaller(fits, strip_is_a ? 2 * kMaxPanel : kMaxPanel), INT64_MAX, g.k};
}

template <class Out>
void add_tasks(const Product<Out>& g, int64_t group, const Plan& plan, std::vector<Task>& tasks) {
  const int64_t panels = plan.strip_is_a ? g.n : g.m, strips = plan.strip_is_a ? g.m : g.n;
  for (int64_t p = 0; p < panels; p += plan.panel) {
    for (int64_t s = 0; s < strips;) {
      const int64_t count = smaller(plan.region, strips - s);
      tasks.push_back({group, p, smaller(plan.panel, panels - p), s, count});
      s += count;
    }
  }
}

// Large pieces pack least; they shrink until every thread has a few. No bit of the result depends on it.
template <class Out>
std::vector<Task> cut(const std::vector<Product<Out>>& groups, int threads, std::vector<Plan>& plans) {
  const int64_t enough = threads == 1 ? 1 : 4 * threads;
  int64_t most_strips = 0;
  for (const auto& g : groups) {
    plans.push_back(plan_for(g));
    const int64_t strips = plans.back().strip_is_a ? g.m : g.n;
    most_strips = strips > most_strips ? strips : most_strips;
  }
  for (int64_t region = most_strips;; region = (region / 2 + kBlock - 1) / kBlock * kBlock) {
    std::vector<Task> tasks;
    for (size_t i = 0; i < groups.size(); ++i) {
      Plan plan = plans[i];
      plan.region = region < plan.region ? (region > kBlock ? region : kBlock) : plan.region;
      add_tasks(groups[i], static_cast<int64_t>(i), plan, tasks);
    }
    if (static_cast<int64_t>(tasks.size()) >= enough || region <= 2 * kBlock) return tasks;
  }
}

inline void add_to(float* to, __m512 low, __m512 high, int64_t columns, bool accumulate) {
  const __mmask16 in_low = static_cast<__mmask16>(first_of_32(columns));
  const __mmask16 in_high = static_cast<__mmask16>(first_of_32(columns) >> 16);
  if (accumulate) {
    low = _mm512_add_ps(_mm512_maskz_loadu_ps(in_low, to), low);
    high = _mm512_add_ps(_mm512_maskz_loadu_ps(in_high, to + kHalf), high);
  }
  _mm512_mask_storeu_ps(to, in_low, low);
  _mm512_mask_storeu_ps(to + kHalf, in_high, high);
}

inline void add_to(bf16* to, __m512 low, __m512 high, int64_t columns, bool accumulate) {
  const __mmask32 inside = first_of_32(columns);
  if (accumulate) {
    const __m512i old = _mm512_maskz_loadu_epi16(inside, to);
    low = _mm512_add_ps(low_half(old), low);
    high = _mm512_add_ps(high_half(old), high);
  }
  _mm512_mask_storeu_epi16(to, inside, to_row(low, high));
}

// Puts a finished block where it belongs. In the block, the operand in the form of rows stands along the rows.
template <class Out>
struct Finish {
  const Product<Out>& g;
  bool strip_is_a;
  const Task& task;
  bool stream;

  void operator()(int64_t strip, int64_t block, const float* c) const {
    const int64_t panel = task.panel + block * kBlock;
    const int64_t in_panel = smaller(kBlock, task.panel + task.panels - panel);
    const int64_t in_strip = smaller(kBlock, task.strip + task.strips - strip);
    if (strip_is_a) {
      store_beside(c, strip, in_strip, block, in_panel);
      return;
    }
    if constexpr (sizeof(Out) == sizeof(bf16)) {  // only weight gradients are wider
      if (g.b.reduction_contiguous) {
        store_transposed(c, in_panel, in_strip, stream, [&](int64_t i) { return g.c_row(panel + i) + strip; });
        return;
      }
    }
    store(c, panel, in_panel, strip, in_strip);
  }

  // Blocks of the panel are columns of the output. Where they are streamed, an even block waits for the next one.
  void store_beside(const float* c, int64_t first_row, int64_t rows, int64_t block, int64_t columns) const {
    const int64_t first_column = task.panel + block * kBlock;
    if constexpr (sizeof(Out) == sizeof(bf16)) {
      if (stream && block % 2 == 0 && task.panels >= (block + 2) * kBlock) return;
      if (stream && block % 2 == 1 && columns == kBlock) {
        stream_two_blocks(c - kBlockFloats, rows,
                          [&](int64_t i) { return g.c_row(first_row + i) + first_column - kBlock; });
        return;
      }
    }
    store(c, first_row, rows, first_column, columns);
  }

  void store(const float* c, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns) const {
    if constexpr (sizeof(Out) == sizeof(bf16)) {
      if (!g.accumulate) {
        store_block(c, rows, columns, stream, [&](int64_t i) { return g.c_row(first_row + i) + first_column; });
        return;
      }
    }
    for (int64_t i = 0; i < rows; ++i, c += kBlock) {
      add_to(g.c_row(first_row + i) + first_column, _mm512_load_ps(c), _mm512_load_ps(c + kHalf), columns, g.accumulate);
    }
  }
};

template <Form kStrip, class Out>
void run(const Product<Out>& g, const Plan& plan, const Task& task, bool stream, Buffers& buffers) {
  constexpr Form kPanel = kStrip == Form::kRows ? Form::kPairs : Form::kRows;
  const Source& strips = plan.strip_is_a ? g.a : g.b;
  const Source& panels = plan.strip_is_a ? g.b : g.a;
  const int64_t blocks = blocks_of(task.panels), last = task.strip + task.strips, width = strips_width(strips);
  const bool waits = plan.depth < g.k;  // the sums of all strips of the region wait for the next part of k
  const bool in_turns = g.k <= kStripDepth;
  const int64_t held = waits ? blocks_of(task.strips) : width / kBlock;
  bf16* const strip_buffer = buffers.strip.at_least<bf16>(kStripElements);
  bf16* const panel_buffer = buffers.panel.at_least<bf16>(blocks * kBlock * tiles_of(plan.depth) * kTileDepth);
  float* const sums = buffers.sums.at_least<float>((in_turns ? kTurns : held * blocks) * kBlockFloats);
  for (int64_t k = 0; k < g.k; k += plan.depth) {
    const int64_t depth = smaller(plan.depth, g.k - k);
    pack<kPanel>(panels, task.panel, task.panels, k, depth, panel_buffer);
    const Panel panel = {panel_buffer, blocks, tiles_of(depth)};
    const auto strips_at = [&](int64_t s) {
      if (s < last || k + depth >= g.k) return Strips{strips, s, smaller(width, last - s), k, depth};
      return Strips{strips, task.strip, smaller(width, task.strips), k + depth, smaller(plan.depth, g.k - k - depth)};
    };
    // Memory answers after so many steps; what a small panel asks of one strip takes less.
    const int64_t ahead = width * (1 + kStepsOfLatency / (width / kBlock * blocks * tiles_of(depth)));
    float* c = sums;
    for (int64_t s = task.strip; s < last; s += width) {
      const Strips now = strips_at(s), next = strips_at(s + ahead);
      const Finish<Out> finish = {g, plan.strip_is_a, task, stream};
      if (in_turns) {
        multiply_strips<kStrip, Sums::kInTurns>(now, next, panel, 0, false, strip_buffer, c, finish);
      } else if (k + depth == g.k) {
        multiply_strips<kStrip>(now, next, panel, 0, k > 0, strip_buffer, c, finish);
      } else {
        multiply_strips<kStrip>(now, next, panel, 0, k > 0, strip_buffer, c, NoFinish{});
      }
      if (waits) c += width / kBlock * blocks * kBlockFloats;
    }
  }
}

template <class Out>
void zero(const Product<Out>& g) {
  if (g.accumulate) return;
  for (int64_t i = 0; i < g.m; ++i) {
    __builtin_memset(g.c_row(i), 0, g.n * sizeof(Out));
  }
}

// Whether rows of c may be written around the caches.
template <class Out>
bool may_stream(const std::vector<Product<Out>>& groups) {
  for (const auto& g : groups) {
    if (g.accumulate || g.c_stride % kBlock || reinterpret_cast<uintptr_t>(g.c) % 64) return false;
  }
  const auto& last = groups.back();
  const auto* begin = reinterpret_cast<const char*>(groups.front().c);
  const auto* end = reinterpret_cast<const char*>(last.c + (last.m > 0 ? last.m - 1 : 0) * last.c_stride + last.n);
  constexpr int64_t kFitsTheCaches = 4 << 20;
  return end - begin > kFitsTheCaches && is_mapped(begin, end - begin);
}

}  // namespace

template <class Out>
void grouped_gemm(const std::vector<Product<Out>>& groups, int threads) {
  if (groups.empty()) return;
  for (const auto& g : groups) {
    if (g.k == 0) zero(g);
  }
  std::vector<Plan> plans;
  std::vector<Task> tasks = cut(groups, threads, plans);
  const bool stream = sizeof(Out) == sizeof(bf16) && groups.front().c_index == nullptr && may_stream(groups);
  const int64_t count = static_cast<int64_t>(tasks.size());
#pragma omp parallel num_threads(threads)
  {
    thread_local Buffers buffers;
    const TileRegisters tiles;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) {
      const Product<Out>& g = groups[tasks[i].group];
      const Plan& plan = plans[tasks[i].group];
      if (g.k == 0) continue;
      // Rows that tokens stand in go to the side that needs no transpose of the larger operand; see README.
      if (plan.strip_is_a || g.b.reduction_contiguous) {
        run<Form::kRows>(g, plan, tasks[i], stream, buffers);
      } else {
        run<Form::kPairs>(g, plan, tasks[i], stream, buffers);
      }
    }
    _mm_sfence();  // streaming stores are weakly ordered
  }
}

template void grouped_gemm<bf16>(const std::vector<Product<bf16>>&, int);
template void grouped_gemm<float>(const std::vector<Product<float>>&, int);

}  // namespace moetrain::amx
