#include "cpu/gemm_kernel.h"

#include <omp.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#include <type_traits>

#include "cpu/gemm_tile.h"

namespace moetrain {
namespace {

// A block of a (kBlockM x kBlockK floats) stays in L2 while panels of b pass through L1.
constexpr int64_t kBlockM = 480;
constexpr int64_t kBlockN = 512;
constexpr int64_t kBlockK = 256;
constexpr int kMaxRows = 12, kMaxColumns = 32;

Tile choose_tile() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("MOETRAIN_CPU_ISA");
  const auto allowed = [&](const char* isa) { return !wanted || std::strcmp(wanted, isa) == 0; };
  if (allowed("avx512") && __builtin_cpu_supports("avx512f")) return tile_avx512();
  if ((allowed("avx512") || allowed("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return tile_avx2();
  }
#endif
  return tile_base();
}

const Tile& tile() {
  static const Tile chosen = choose_tile();
  return chosen;
}

// Scratch of one thread, kept between calls: fresh pages cost more than the packing itself.
class Buffer {
 public:
  Buffer() = default;
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  float* at_least(int64_t floats) {
    if (floats > size_) {
      std::free(data_);
      size_ = (floats + 15) / 16 * 16;
      data_ = static_cast<float*>(std::aligned_alloc(64, size_ * sizeof(float)));
      if (!data_) throw std::bad_alloc();
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

struct Scratch {
  Buffer a, b, c;
};

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

inline Float4 load4(const float* p) {
  Float4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Float4 load4(const bf16* p) {
  typedef uint16_t Short4 __attribute__((vector_size(8)));
  typedef uint32_t Word4 __attribute__((vector_size(16)));
  Short4 narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  const Word4 wide = __builtin_convertvector(narrow, Word4) << 16;
  Float4 v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

inline void store4(float* p, Float4 v) { std::memcpy(p, &v, sizeof v); }

// to[j * width + i] = rows[i][k + j] for a block of 4 x 4.
template <class T>
inline void transpose4(const T* const* rows, int64_t k, float* to, int64_t width) {
  const Float4 r0 = load4(rows[0] + k), r1 = load4(rows[1] + k);
  const Float4 r2 = load4(rows[2] + k), r3 = load4(rows[3] + k);
  const Float4 low01 = __builtin_shuffle(r0, r1, Int4{0, 4, 1, 5}), low23 = __builtin_shuffle(r2, r3, Int4{0, 4, 1, 5});
  const Float4 top01 = __builtin_shuffle(r0, r1, Int4{2, 6, 3, 7}), top23 = __builtin_shuffle(r2, r3, Int4{2, 6, 3, 7});
  store4(to, __builtin_shuffle(low01, low23, Int4{0, 1, 4, 5}));
  store4(to + width, __builtin_shuffle(low01, low23, Int4{2, 3, 6, 7}));
  store4(to + 2 * width, __builtin_shuffle(top01, top23, Int4{0, 1, 4, 5}));
  store4(to + 3 * width, __builtin_shuffle(top01, top23, Int4{2, 3, 6, 7}));
}

// One panel of count rows of x: to[k][i] for i < width and k < depth, zero where i >= count.
template <class T>
void pack_transposing(const Operand<T>& x, int64_t outer, int64_t count, int64_t first_k, int64_t depth,
                      int64_t width, float* to) {
  int64_t i = 0;
  for (; i + 4 <= count; i += 4) {
    const T* rows[4];
    for (int64_t j = 0; j < 4; ++j) rows[j] = x.row(outer + i + j) + first_k;
    int64_t k = 0;
    for (; k + 4 <= depth; k += 4) transpose4(rows, k, to + k * width + i, width);
    for (; k < depth; ++k) {
      for (int64_t j = 0; j < 4; ++j) to[k * width + i + j] = to_float(rows[j][k]);
    }
  }
  for (; i < width; ++i) {
    const T* row = i < count ? x.row(outer + i) + first_k : nullptr;
    for (int64_t k = 0; k < depth; ++k) to[k * width + i] = row ? to_float(row[k]) : 0.0f;
  }
}

template <class T>
void pack_copying(const Operand<T>& x, int64_t outer, int64_t count, int64_t first_k, int64_t depth, int64_t width,
                  float* to) {
  for (int64_t k = 0; k < depth; ++k, to += width) {
    const T* from = x.row(first_k + k) + outer;
    int64_t i = 0;
    for (; i + 4 <= count; i += 4) store4(to + i, load4(from + i));
    for (; i < width; ++i) to[i] = i < count ? to_float(from[i]) : 0.0f;
  }
}

template <class T>
void pack(const Operand<T>& x, int64_t outer, int64_t count, int64_t k, int64_t depth, int64_t width, float* to) {
  if (x.reduction_contiguous) {
    pack_transposing(x, outer, count, k, depth, width, to);
  } else {
    pack_copying(x, outer, count, k, depth, width, to);
  }
}

// A tile that sticks out of c is computed beside it.
void run_partial(const float* a, const float* b, int64_t k, float* c, int64_t c_stride, bool accumulate,
                 int64_t rows, int64_t columns) {
  alignas(64) float whole[kMaxRows * kMaxColumns] = {};
  const Tile& t = tile();
  if (accumulate) {
    for (int64_t r = 0; r < rows; ++r) std::memcpy(whole + r * t.columns, c + r * c_stride, columns * sizeof(float));
  }
  t.run(a, b, k, whole, t.columns, accumulate);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * c_stride, whole + r * t.columns, columns * sizeof(float));
}

// The part of one group's c that one thread computes at a stretch.
struct Task {
  int64_t group, row, rows, column, columns;
};

// c holds floats: the output itself, or scratch of the task.
template <class T, class Out>
void run_task(const Gemm<T, Out>& g, const Task& task, float* c, int64_t c_stride, Scratch& scratch) {
  const Tile& t = tile();
  const int64_t padded_rows = (task.rows + t.rows - 1) / t.rows * t.rows;
  float* a = scratch.a.at_least(padded_rows * kBlockK);
  float* b = scratch.b.at_least(t.columns * kBlockK);
  for (int64_t k = 0; k < g.k; k += kBlockK) {
    const int64_t depth = std::min(kBlockK, g.k - k);
    for (int64_t r = 0; r < task.rows; r += t.rows) {
      pack(g.a, task.row + r, std::min<int64_t>(t.rows, task.rows - r), k, depth, t.rows, a + r * depth);
    }
    for (int64_t j = 0; j < task.columns; j += t.columns) {
      const int64_t columns = std::min<int64_t>(t.columns, task.columns - j);
      pack(g.b, task.column + j, columns, k, depth, t.columns, b);
      for (int64_t r = 0; r < task.rows; r += t.rows) {
        const int64_t rows = std::min<int64_t>(t.rows, task.rows - r);
        float* out = c + r * c_stride + j;
        if (rows == t.rows && columns == t.columns) {
          t.run(a + r * depth, b, depth, out, c_stride, k > 0);
        } else {
          run_partial(a + r * depth, b, depth, out, c_stride, k > 0, rows, columns);
        }
      }
    }
  }
}

template <class T, class Out>
void run_task_into(const Gemm<T, Out>& g, const Task& task, Scratch& scratch) {
  if constexpr (std::is_same_v<Out, float>) {
    if (!g.accumulate && !g.c_index) {
      run_task(g, task, g.c_row(task.row) + task.column, g.c_stride, scratch);
      return;
    }
  }
  float* c = scratch.c.at_least(task.rows * task.columns);
  run_task(g, task, c, task.columns, scratch);
  for (int64_t r = 0; r < task.rows; ++r, c += task.columns) {
    Out* out = g.c_row(task.row + r) + task.column;
    for (int64_t j = 0; j < task.columns; ++j) {
      out[j] = from_float<Out>(g.accumulate ? to_float(out[j]) + c[j] : c[j]);
    }
  }
}

template <class T, class Out>
std::vector<Task> cut(const std::vector<Gemm<T, Out>>& groups, int64_t block_m, int64_t block_n) {
  std::vector<Task> tasks;
  for (size_t g = 0; g < groups.size(); ++g) {
    if (groups[g].k == 0) continue;
    for (int64_t r = 0; r < groups[g].m; r += block_m) {
      for (int64_t j = 0; j < groups[g].n; j += block_n) {
        tasks.push_back({static_cast<int64_t>(g), r, std::min(block_m, groups[g].m - r), j,
                         std::min(block_n, groups[g].n - j)});
      }
    }
  }
  return tasks;
}

// Large blocks pack least; they shrink until every thread has a few. The cut changes no bit of the result.
template <class T, class Out>
std::vector<Task> cut_for(const std::vector<Gemm<T, Out>>& groups, int threads) {
  int64_t block_m = kBlockM, block_n = kBlockN / tile().columns * tile().columns;
  std::vector<Task> tasks = cut(groups, block_m, block_n);
  const int64_t enough = threads == 1 ? 1 : 4 * threads;
  while (static_cast<int64_t>(tasks.size()) < enough && block_n > 2 * tile().columns) {
    block_n = std::max<int64_t>(block_n / 2 / tile().columns, 1) * tile().columns;
    tasks = cut(groups, block_m, block_n);
  }
  while (static_cast<int64_t>(tasks.size()) < enough && block_m > 4 * tile().rows) {
    block_m = block_m / 2 / tile().rows * tile().rows;
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
    thread_local Scratch scratch;
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < count; ++i) run_task_into(groups[tasks[i].group], tasks[i], scratch);
  }
}

template void grouped_gemm(const std::vector<Gemm<float>>&, int);
template void grouped_gemm(const std::vector<Gemm<bf16>>&, int);
template void grouped_gemm(const std::vector<Gemm<bf16, float>>&, int);

const char* gemm_isa() { return tile().isa; }

}  // namespace moetrain
