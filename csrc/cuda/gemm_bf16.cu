// Grouped GEMM in bfloat16 with float accumulators, torch-free: mma.sync m16n8k16 fed by ldmatrix from swizzled tiles
// that cp.async brings in kStages stages. Runs on sm_80 and later. One block of eight warps computes 128 x 128 or
// 128 x 256 of one expert's product; the fragments of the next 16 steps of k are read while these are multiplied.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/groups.cuh"
#include "cuda/launch.h"
#include "cuda/mma.cuh"

namespace {

using namespace moetrain_cuda;

constexpr int kDepth = 32;  // of k, a stage
constexpr int kStages = 4;
constexpr int kThreads = 256;
constexpr int kSteps = kDepth / 16;  // of one mma
static_assert(kSteps % 2 == 0, "fragments alternate between two buffers");

// kBlocks: blocks that one processor holds. One alone must hide the latency of its own shared memory, with a second
// buffer of fragments; two hide each other's, and have no registers for it.
template <int kTileN, int kTileWarpM, int kBlocks>
struct Shape {
  static constexpr int kM = 128, kN = kTileN;
  static constexpr int kWarpM = kTileWarpM, kWarpN = 64;
  static constexpr int kWarpsN = kN / kWarpN;
  static constexpr int kBlocksPerProcessor = kBlocks, kBuffers = kBlocks == 1 ? 2 : 1;
  static constexpr int kStageA = kM * kDepth, kStageB = kN * kDepth;  // elements
  static constexpr int kSharedBytes = kStages * (kStageA + kStageB) * static_cast<int>(sizeof(bf16));
  static_assert(kM / kWarpM * kWarpsN == kThreads / 32, "a warp, a piece");
};
using Small = Shape<128, 32, 2>;
using Large = Shape<256, 64, 1>;

// Stages an operand [outer][k] whose reduction axis is contiguous. Where its rows start is worked out once (rows may be
// gathered) and kept in shared memory, for registers are what the large tile lacks.
template <int kOuter, bool kAligned>
struct ContiguousLoader {
  const bf16** start;  // [kOuter], null: outside of the operand
  const bf16* anywhere;
  int depth;

  __device__ void load(int k0, bf16* to) {
    constexpr int kRowChunks = kDepth / kChunk;
    constexpr int kRows = kThreads / kRowChunks;  // of one load of all threads
    const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    const int k = k0 + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kOuter / kRows; ++i) {
      const bf16* const from = start[row + i * kRows];
      copy_chunk<kAligned>(to + swizzled<kDepth>(row + i * kRows, chunk), from + k, anywhere, from ? depth - k : 0);
    }
  }
};

// Stages an operand as [k][outer] whose reduction axis is strided. The index of a gathered one is read a stage ahead.
template <int kOuter, bool kAligned>
struct StridedLoader {
  static constexpr int kRowChunks = kOuter / kChunk;
  static constexpr int kRows = kThreads / kRowChunks;  // of one load of all threads
  static constexpr int kLoads = kDepth / kRows;
  Rows<bf16> rows;
  int outer0, outer, depth;
  int next[kLoads];

  __device__ void look_ahead(int k0) {
    if (rows.index == nullptr) return;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int k = k0 + i * kRows + threadIdx.x / kRowChunks;
      next[i] = k < depth ? static_cast<int>(rows.index[k]) : 0;
    }
  }

  __device__ void load(int k0, bf16* to) {
    const int row = threadIdx.x / kRowChunks, chunk = threadIdx.x % kRowChunks;
    const int column = outer0 + chunk * kChunk;
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const int k = k0 + row + i * kRows;
      if (rows.index != nullptr) require(k >= depth || (next[i] >= 0 && next[i] < rows.count));
      copy_chunk<kAligned>(to + swizzled<kOuter>(row + i * kRows, chunk),
                           rows.at(rows.index != nullptr ? next[i] : k) + column, rows.data,
                           k < depth ? outer - column : 0);
    }
    look_ahead(k0 + kDepth);
  }
};

template <bool kContiguous, int kOuter, bool kAligned>
struct LoaderOf {
  using type = ContiguousLoader<kOuter, kAligned>;
};
template <int kOuter, bool kAligned>
struct LoaderOf<false, kOuter, kAligned> {
  using type = StridedLoader<kOuter, kAligned>;
};

template <class S>
struct Accumulator {
  float value[S::kWarpM / 16][S::kWarpN / 8][4];
};

template <class S>
struct Fragments {
  uint32_t a[S::kWarpM / 16][4], b[S::kWarpN / 16][4];
};

template <class S, bool kContiguousA, bool kContiguousB>
__device__ void read_fragments(Fragments<S>& to, const bf16* a, const bf16* b, int m, int n, int k, int lane) {
#pragma unroll
  for (int i = 0; i < S::kWarpM / 16; ++i) {
    load_a<kContiguousA, kContiguousA ? kDepth : S::kM>(to.a[i], a, m + 16 * i, k, lane);
  }
#pragma unroll
  for (int j = 0; j < S::kWarpN / 16; ++j) {
    load_b<kContiguousB, kContiguousB ? kDepth : S::kN>(to.b[j], b, n + 16 * j, k, lane);
  }
}

template <class S>
__device__ void multiply(Accumulator<S>& acc, const Fragments<S>& f) {
#pragma unroll
  for (int i = 0; i < S::kWarpM / 16; ++i) {
#pragma unroll
    for (int j = 0; j < S::kWarpN / 8; ++j) {
      multiply_add(acc.value[i][j], f.a[i], f.b[j / 2][j % 2 * 2], f.b[j / 2][j % 2 * 2 + 1]);
    }
  }
}

// ---------------------------------------------------------------------------------------------- what leaves a block

// Four pieces of 8 columns, from `column` on, of one row of c; word j holds this lane's two columns of piece j. Called
// by all lanes, also those whose row is outside.
template <bool kAligned>
__device__ void store_pieces(bf16* row, bool inside, int column, int columns, uint32_t (&word)[4], int lane) {
  if constexpr (kAligned) {
    transpose_quad(word, lane);
    const int at = column + lane % 4 * kChunk;
    if (inside && at < columns) *reinterpret_cast<uint4*>(row + at) = {word[0], word[1], word[2], word[3]};
  } else {
#pragma unroll
    for (int v = 0; v < 8; ++v) {
      const int at = column + v / 2 * 8 + lane % 4 * 2 + v % 2;
      if (inside && at < columns) row[at] = __ushort_as_bfloat16(static_cast<uint16_t>(word[v / 2] >> v % 2 * 16));
    }
  }
}

__device__ float low(uint32_t word) { return __bfloat162float(__ushort_as_bfloat16(static_cast<uint16_t>(word))); }
__device__ float high(uint32_t word) { return low(word >> 16); }

// Both halves of z arrive as the pieces 2 j and 2 j + 1; h is computed from their rounded values, so that it is what
// the backward recomputes.
template <class S, bool kAligned>
__device__ void store_swiglu(const MoetrainGemm& p, const Tile<bf16>& t, const Accumulator<S>& acc, int m, int n,
                             int lane) {
  bf16* const z = static_cast<bf16*>(p.c);
  bf16* const h = static_cast<bf16*>(p.h);
  const int column = t.n0 + n / 2;
#pragma unroll
  for (int v = 0; v < S::kWarpM / 8; ++v) {
    const int row = t.m0 + m + 8 * v + lane / 4;
    const bool inside = row < t.m;
    uint32_t gate[4], up[4], product[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* const g = acc.value[v / 2][2 * j] + v % 2 * 2;
      const float* const u = acc.value[v / 2][2 * j + 1] + v % 2 * 2;
      gate[j] = pack(g[0], g[1]);
      up[j] = pack(u[0], u[1]);
      product[j] = pack(silu(low(gate[j])) * low(up[j]), silu(high(gate[j])) * high(up[j]));
    }
    store_pieces<kAligned>(h + (t.first_row + row) * int64_t{t.n}, inside, column, t.n, product, lane);
    if (z == nullptr) continue;
    bf16* const z_row = z + t.c + row * p.n;
    store_pieces<kAligned>(z_row, inside, column, t.n, gate, lane);
    store_pieces<kAligned>(z_row + t.n, inside, column, t.n, up, lane);
  }
}

template <class S, bool kAligned>
__device__ void store(const MoetrainGemm& p, const Tile<bf16>& t, const Accumulator<S>& acc, int m, int n, int lane) {
  bf16* const c = static_cast<bf16*>(p.c) + t.c;
#pragma unroll
  for (int v = 0; v < S::kWarpM / 8; ++v) {
    const int row = t.m0 + m + 8 * v + lane / 4;
#pragma unroll
    for (int group = 0; group < S::kWarpN / 32; ++group) {
      uint32_t word[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float* const pair = acc.value[v / 2][4 * group + j] + v % 2 * 2;
        word[j] = pack(pair[0], pair[1]);
      }
      store_pieces<kAligned>(c + int64_t{row} * t.n, row < t.m, t.n0 + n + 32 * group, t.n, word, lane);
    }
  }
}

// Weight gradients that are float or added to what is there: pairs of columns, straight from the registers.
template <class S, class Out, bool kAligned>
__device__ void store_pairs(const MoetrainGemm& p, const Tile<bf16>& t, const Accumulator<S>& acc, int m, int n,
                            int lane) {
  constexpr int kPair = kAligned ? 2 : 1;  // elements of an access: aligned rows hold whole pairs
  using Access = Pack<Out, kPair>;
  Out* const c = static_cast<Out*>(p.c) + t.c;
#pragma unroll
  for (int v = 0; v < S::kWarpM / 8; ++v) {
    const int row = t.m0 + m + 8 * v + lane / 4;
#pragma unroll
    for (int j = 0; j < S::kWarpN / 8; ++j) {
      const float* const pair = acc.value[v / 2][j] + v % 2 * 2;
#pragma unroll
      for (int i = 0; i < 2; i += kPair) {
        const int column = t.n0 + n + 8 * j + lane % 4 * 2 + i;
        if (row >= t.m || column >= t.n) continue;
        Access* const to = reinterpret_cast<Access*>(c + int64_t{row} * t.n + column);
        Access value = {};
        if (p.accumulate) value = *to;
#pragma unroll
        for (int e = 0; e < kPair; ++e) value.value[e] = narrow<Out>(widen(value.value[e]) + pair[i + e]);
        *to = value;
      }
    }
  }
}

template <Kind kKind, class S, bool kAligned>
__device__ void leave(const MoetrainGemm& p, const Tile<bf16>& t, const Accumulator<S>& acc, int m, int n, int lane) {
  if constexpr (kKind == kSwiglu) {
    store_swiglu<S, kAligned>(p, t, acc, m, n, lane);
  } else if constexpr (kKind == kWgrad) {
    if (p.wide) {
      store_pairs<S, float, kAligned>(p, t, acc, m, n, lane);
    } else if (p.accumulate) {
      store_pairs<S, bf16, kAligned>(p, t, acc, m, n, lane);
    } else {
      store<S, kAligned>(p, t, acc, m, n, lane);
    }
  } else {
    store<S, kAligned>(p, t, acc, m, n, lane);
  }
}

// ---------------------------------------------------------------------------------------------- the kernel

template <Kind kKind, class S, bool kAligned>
__global__ void __launch_bounds__(kThreads, S::kBlocksPerProcessor) gemm_kernel(const MoetrainGemm p) {
  constexpr bool kContiguousA = kKind != kWgrad, kContiguousB = kKind == kFprop || kKind == kSwiglu;
  extern __shared__ __align__(128) bf16 shared[];
  __shared__ const bf16* start_a[kContiguousA ? S::kM : 1];
  __shared__ const bf16* start_b[kContiguousB ? S::kN : 1];
  bf16* const stages_a = shared;
  bf16* const stages_b = shared + kStages * S::kStageA;
  const Tile<bf16> t = locate<kKind, bf16, S::kM, S::kN>(p);
  if (!t.present) return;  // the whole block
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m = warp / S::kWarpsN * S::kWarpM, n = warp % S::kWarpsN * S::kWarpN;

  typename LoaderOf<kContiguousA, S::kM, kAligned>::type a;
  typename LoaderOf<kContiguousB, S::kN, kAligned>::type b;
  if constexpr (kContiguousA) {
    a = {start_a, t.a.data, t.k};
    for (int i = threadIdx.x; i < S::kM; i += kThreads) {
      start_a[i] = t.m0 + i < t.m ? t.a.at(t.a.physical(t.m0 + i)) : nullptr;
    }
  } else {
    a = {t.a, t.m0, t.m, t.k, {}};
    a.look_ahead(0);
  }
  if constexpr (kContiguousB) {
    b = {start_b, t.b.data, t.k};
    for (int i = threadIdx.x; i < S::kN; i += kThreads) {
      const int row = row_of_b<kKind, kChunk>(i, t.n0, t.n);
      start_b[i] = row >= 0 ? t.b.at(row) : nullptr;
    }
  } else {
    b = {t.b, t.n0, t.n, t.k, {}};
    b.look_ahead(0);
  }
  __syncthreads();

  const int steps = (t.k + kDepth - 1) / kDepth;
  const auto load = [&](int step, int stage) {
    if (step < steps) {
      a.load(step * kDepth, stages_a + stage * S::kStageA);
      b.load(step * kDepth, stages_b + stage * S::kStageB);
    }
    commit();  // also when empty: the waits below count groups
  };
  Fragments<S> fragments[S::kBuffers];
  const auto read = [&](int stage, int k, int buffer) {
    read_fragments<S, kContiguousA, kContiguousB>(fragments[buffer], stages_a + stage * S::kStageA,
                                                  stages_b + stage * S::kStageB, m, n, k, lane);
  };

  Accumulator<S> acc = {};
  for (int s = 0; s < kStages - 1; ++s) load(s, s);
  wait<kStages - 2>();
  __syncthreads();
  if (S::kBuffers == 2 && steps > 0) read(0, 0, 0);
  int stage = 0;
  for (int step = 0; step < steps; ++step) {
    // Into the stage before this one: the barrier below stands between its last read and here.
    load(step + kStages - 1, stage == 0 ? kStages - 1 : stage - 1);
#pragma unroll
    for (int i = 0; i < kSteps; ++i) {
      const bool last = i == kSteps - 1;
      if (S::kBuffers == 1) read(stage, i * 16, 0);
      if (last) {
        stage = stage == kStages - 1 ? 0 : stage + 1;
        wait<kStages - 2>();  // the next step's stage is here
        __syncthreads();      // for every thread
      }
      if (S::kBuffers == 2) read(stage, last ? 0 : i * 16 + 16, (i + 1) % 2);
      multiply(acc, fragments[i % S::kBuffers]);
    }
  }
  wait<0>();
  leave<kKind, S, kAligned>(p, t, acc, m, n, lane);
}

template <Kind kKind, class S, bool kAligned>
int launch_as(const MoetrainGemm& p, cudaStream_t stream) {
  const auto kernel = &gemm_kernel<kKind, S, kAligned>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kSharedBytes)) {
    return error;
  }
  kernel<<<static_cast<unsigned>(blocks_of<kKind>(p, S::kM, S::kN)), kThreads, S::kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

// The large tile reads shared memory less for each product, but needs a tile for every processor.
template <Kind kKind>
bool large_tiles(const MoetrainGemm& p) {
  int device = 0, processors = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  const int64_t row_tiles = kKind == kWgrad ? p.experts * tiles_of(p.n, Large::kM) : p.rows / Large::kM;
  const int64_t columns = columns_of<kKind>(p.n, p.k);
  return row_tiles * (columns / columns_of_tile<kKind>(Large::kN)) >= processors;
}

// Every matrix has rows of N or of K elements (h: of N / 2), so these decide whether all rows start at 16 bytes.
bool aligned(const MoetrainGemm& p) {
  const auto bits = reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b) |
                    reinterpret_cast<uintptr_t>(p.c) | reinterpret_cast<uintptr_t>(p.h);
  return bits % 16 == 0 && p.n % (p.kind == kSwiglu ? 2 * kChunk : kChunk) == 0 && p.k % kChunk == 0;
}

template <Kind kKind>
int launch(const MoetrainGemm& p, cudaStream_t stream) {
  if (!aligned(p)) return launch_as<kKind, Small, false>(p, stream);
  return large_tiles<kKind>(p) ? launch_as<kKind, Large, true>(p, stream) : launch_as<kKind, Small, true>(p, stream);
}

}  // namespace

extern "C" int moetrain_cuda_grouped_gemm_bf16(const MoetrainGemm* gemm, CUstream_st* stream) {
  if (too_large(*gemm)) return cudaErrorInvalidValue;
  if (nothing_to_do(*gemm)) return cudaSuccess;
  if (gemm->kind == kFprop) return launch<kFprop>(*gemm, stream);
  if (gemm->kind == kDgrad) return launch<kDgrad>(*gemm, stream);
  if (gemm->kind == kWgrad) return launch<kWgrad>(*gemm, stream);
  return launch<kSwiglu>(*gemm, stream);
}
