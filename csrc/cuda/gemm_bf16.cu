// Grouped GEMM in bfloat16 with float accumulators, torch-free: mma.sync m16n8k16 fed by ldmatrix from tiles that
// cp.async brings in three stages. Runs on sm_80 and later. One block computes 128 x 128 of one expert's product.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include "cuda/groups.cuh"
#include "cuda/launch.h"

namespace {

using namespace moetrain_cuda;
using bf16 = __nv_bfloat16;

constexpr int kTile = 128;   // of m and of n
constexpr int kDepth = 32;   // of k, a stage
constexpr int kStages = 3;
constexpr int kThreads = 256;  // 2 x 4 warps of 64 x 32 outputs
constexpr int kChunk = 8;      // elements of a 16-byte copy
constexpr int kWarpM = 64, kWarpN = 32;

// Rows of a staged tile are padded by 16 bytes: the eight rows that one ldmatrix reads then lie in distinct banks.
constexpr int kContiguousStride = kDepth + 8;  // tile [128][32]
constexpr int kStridedStride = kTile + 8;      // tile [32][128]
constexpr int kStageElements = kTile * kContiguousStride;  // the larger of the two shapes
constexpr int kSharedBytes = 2 * kStages * kStageElements * static_cast<int>(sizeof(bf16));
static_assert(kDepth * kStridedStride <= kStageElements, "both shapes of a tile must fit a stage");

__device__ uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, or zeros (then nothing is read).
__device__ void copy_async(bf16* to, const bf16* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

__device__ void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Eight elements one by one, for matrices whose rows do not start at multiples of 16 bytes. `left` of them exist.
__device__ void copy_plain(bf16* to, const bf16* from, int64_t left) {
  alignas(16) bf16 value[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) value[i] = i < left ? from[i] : __ushort_as_bfloat16(0);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(value);
}

// Stages elements (outer0.., k0..) of an operand: as [outer][k] when its reduction axis is contiguous, else as
// [k][outer]; zero outside of the operand.
template <bool kContiguous, bool kAligned>
__device__ void load_tile(const bf16* from, int64_t stride, int64_t outer0, int64_t outer, int64_t k0, int64_t depth,
                          bf16* to) {
  constexpr int kRowChunks = (kContiguous ? kDepth : kTile) / kChunk;
  constexpr int kStride = kContiguous ? kContiguousStride : kStridedStride;
  const int64_t row0 = kContiguous ? outer0 : k0, rows = kContiguous ? outer : depth;
  const int64_t column0 = kContiguous ? k0 : outer0, columns = kContiguous ? depth : outer;
#pragma unroll
  for (int step = 0; step < kTile * kDepth / kChunk / kThreads; ++step) {
    const int flat = step * kThreads + threadIdx.x;
    const int row = flat / kRowChunks, column = flat % kRowChunks * kChunk;
    const int64_t left = row0 + row < rows ? columns - (column0 + column) : 0;
    const bool inside = left > 0;
    const bf16* source = inside ? from + (row0 + row) * stride + column0 + column : from;
    bf16* target = to + row * kStride + column;
    if (kAligned) {
      copy_async(target, source, inside);  // rows hold a multiple of 8 elements: all of a chunk exists, or none
    } else {
      copy_plain(target, source, left);
    }
  }
}

template <bool kTranspose>
__device__ void load_matrices(uint32_t (&fragment)[4], const bf16* p) {
  if (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(p))
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
                 : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
                 : "r"(shared_address(p))
                 : "memory");
  }
}

// The 16 x 16 fragment of a at (m, k): matrices (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8).
template <bool kContiguous>
__device__ void load_a(uint32_t (&fragment)[4], const bf16* tile, int m, int k, int lane) {
  if (kContiguous) {
    load_matrices<false>(fragment, tile + (m + lane % 16) * kContiguousStride + k + lane / 16 * 8);
  } else {
    load_matrices<true>(fragment, tile + (k + lane % 8 + lane / 16 * 8) * kStridedStride + m + lane / 8 % 2 * 8);
  }
}

// Two 8 x 16 fragments of b at (n, k) and (n + 8, k): matrices (n, k), (n, k + 8), (n + 8, k), (n + 8, k + 8).
template <bool kContiguous>
__device__ void load_b(uint32_t (&fragment)[4], const bf16* tile, int n, int k, int lane) {
  if (kContiguous) {
    load_matrices<false>(fragment, tile + (n + lane % 8 + lane / 16 * 8) * kContiguousStride + k + lane / 8 % 2 * 8);
  } else {
    load_matrices<true>(fragment, tile + (k + lane % 16) * kStridedStride + n + lane / 16 * 8);
  }
}

__device__ void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// One stage: acc[i][j] += a[16 rows i] * b[8 columns j], k upwards in steps of 16.
template <bool kContiguousA, bool kContiguousB>
__device__ void multiply_stage(float (&acc)[kWarpM / 16][kWarpN / 8][4], const bf16* a, const bf16* b, int m, int n,
                               int lane) {
#pragma unroll
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t fragment_a[kWarpM / 16][4], fragment_b[kWarpN / 16][4];
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) load_a<kContiguousA>(fragment_a[i], a, m + 16 * i, k, lane);
#pragma unroll
    for (int j = 0; j < kWarpN / 16; ++j) load_b<kContiguousB>(fragment_b[j], b, n + 16 * j, k, lane);
#pragma unroll
    for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kWarpN / 8; ++j) {
        multiply_add(acc[i][j], fragment_a[i], fragment_b[j / 2][j % 2 * 2], fragment_b[j / 2][j % 2 * 2 + 1]);
      }
    }
  }
}

// Lane l holds rows l / 4 and l / 4 + 8, columns 2 * (l % 4) and the next, of every 16 x 8 piece.
__device__ void store(const Tile<bf16>& t, const float (&acc)[kWarpM / 16][kWarpN / 8][4], int m, int n, int lane) {
#pragma unroll
  for (int i = 0; i < kWarpM / 16; ++i) {
#pragma unroll
    for (int j = 0; j < kWarpN / 8; ++j) {
#pragma unroll
      for (int v = 0; v < 4; ++v) {
        const int64_t row = t.m0 + m + 16 * i + lane / 4 + v / 2 * 8;
        const int64_t column = t.n0 + n + 8 * j + lane % 4 * 2 + v % 2;
        if (row < t.m && column < t.n) t.c[row * t.c_stride + column] = __float2bfloat16_rn(acc[i][j][v]);
      }
    }
  }
}

template <Kind kKind, bool kAligned>
__global__ void __launch_bounds__(kThreads) gemm_kernel(Problem<bf16> problem) {
  constexpr bool kContiguousA = kKind != kWgrad, kContiguousB = kKind == kFprop;
  extern __shared__ __align__(16) bf16 shared[];
  bf16* const stages_a = shared;
  bf16* const stages_b = shared + kStages * kStageElements;
  const Tile<bf16> t = locate<kKind, bf16, kTile, kTile>(problem);
  if (!t.present) return;  // the whole block
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int m = warp / 4 * kWarpM, n = warp % 4 * kWarpN;

  const int64_t steps = (t.k + kDepth - 1) / kDepth;
  const auto load = [&](int64_t step) {
    if (step < steps) {
      const int64_t stage = step % kStages * kStageElements;
      load_tile<kContiguousA, kAligned>(t.a, t.a_stride, t.m0, t.m, step * kDepth, t.k, stages_a + stage);
      load_tile<kContiguousB, kAligned>(t.b, t.b_stride, t.n0, t.n, step * kDepth, t.k, stages_b + stage);
    }
    commit();  // also when empty: the waits below count groups
  };

  float acc[kWarpM / 16][kWarpN / 8][4] = {};
  for (int s = 0; s < kStages - 1; ++s) load(s);
  for (int64_t step = 0; step < steps; ++step) {
    wait<kStages - 2>();  // this step's group is complete
    __syncthreads();      // for every thread; and the stage that is refilled next is no longer read
    load(step + kStages - 1);
    const int64_t stage = step % kStages * kStageElements;
    multiply_stage<kContiguousA, kContiguousB>(acc, stages_a + stage, stages_b + stage, m, n, lane);
  }
  wait<0>();
  store(t, acc, m, n, lane);
}

template <Kind kKind, bool kAligned>
int launch_as(const Problem<bf16>& p, cudaStream_t stream) {
  const auto kernel = &gemm_kernel<kKind, kAligned>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedBytes)) {
    return error;
  }
  kernel<<<grid_of<kKind>(p, kTile, kTile), kThreads, kSharedBytes, stream>>>(p);
  return cudaGetLastError();
}

template <Kind kKind>
int launch(const Problem<bf16>& p, cudaStream_t stream) {
  // Every matrix has rows of N or of K elements, so these two decide whether all rows start at 16 bytes.
  const auto bits = reinterpret_cast<uintptr_t>(p.a) | reinterpret_cast<uintptr_t>(p.b);
  const bool aligned = bits % 16 == 0 && p.n % kChunk == 0 && p.k % kChunk == 0;
  return aligned ? launch_as<kKind, true>(p, stream) : launch_as<kKind, false>(p, stream);
}

}  // namespace

extern "C" int moetrain_cuda_grouped_gemm_bf16(int kind, const void* a, const void* b, void* c,
                                               const int64_t* tokens_per_expert, int64_t rows, int64_t experts,
                                               int64_t n, int64_t k, CUstream_st* stream) {
  const Problem<bf16> p = {static_cast<const bf16*>(a), static_cast<const bf16*>(b), static_cast<bf16*>(c),
                           tokens_per_expert, static_cast<int>(experts), rows, n, k};
  if (nothing_to_do(kind, p)) return cudaSuccess;
  if (kind == kFprop) return launch<kFprop>(p, stream);
  if (kind == kDgrad) return launch<kDgrad>(p, stream);
  return launch<kWgrad>(p, stream);
}
