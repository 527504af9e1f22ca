// bfloat16 on tensor cores, sm_80 and later: asynchronous copies, ldmatrix, mma.sync m16n8k16, and how tiles lie in
// shared memory.
#pragma once

#include <cuda_bf16.h>

#include <cstdint>

#include "cuda/warp.cuh"

namespace moetrain_cuda {

using bf16 = __nv_bfloat16;

constexpr int kChunk = 8;  // elements of 16 bytes, the unit of copies and of ldmatrix rows

// Where chunk `chunk` of row `row` lies in a tile whose rows hold kWidth elements. Eight consecutive rows' chunks of
// one column fall into distinct banks (what one ldmatrix matrix reads), without padding.
template <int kWidth>
__device__ int swizzled(int row, int chunk) {
  constexpr int kChunks = kWidth / kChunk;
  constexpr int kMask = kChunks < 8 ? kChunks - 1 : 7;
  constexpr int kRowsOfALine = kChunks < 8 ? 8 / kChunks : 1;  // 128 bytes pass all banks once
  static_assert(kChunks == 4 || kChunks % 8 == 0, "rows of 64 bytes or of multiples of 128");
  return row * kWidth + (chunk ^ (row / kRowsOfALine & kMask)) * kChunk;
}

__device__ inline uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 16 bytes from global to shared memory, or zeros (then nothing is read).
__device__ inline void copy_async(bf16* to, const bf16* from, bool inside) {
  const int bytes = inside ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}

__device__ inline void commit() { asm volatile("cp.async.commit_group;\n" ::: "memory"); }

template <int kPending>
__device__ void wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kPending) : "memory");
}

// Eight elements one by one, for matrices whose rows do not start at multiples of 16 bytes. `left` of them exist.
__device__ inline void copy_plain(bf16* to, const bf16* from, int64_t left) {
  alignas(16) bf16 value[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) value[i] = i < left ? from[i] : __ushort_as_bfloat16(0);
  *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(value);
}

// A chunk of which `left` elements exist (none or all when aligned); `from` need not be valid when none does.
template <bool kAligned>
__device__ void copy_chunk(bf16* to, const bf16* from, const bf16* anywhere, int64_t left) {
  const bf16* source = left > 0 ? from : anywhere;
  if (kAligned) {
    copy_async(to, source, left > 0);
  } else {
    copy_plain(to, source, left);
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

// Lane l holds of c: rows l / 4 and l / 4 + 8, columns 2 * (l % 4) and the next.
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};\n"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The 16 x 16 fragment of a at (m, k): matrices (m, k), (m + 8, k), (m, k + 8), (m + 8, k + 8). The tile is [outer][k]
// with rows of kWidth elements when the reduction axis is contiguous, else [k][outer].
template <bool kContiguous, int kWidth>
__device__ void load_a(uint32_t (&fragment)[4], const bf16* tile, int m, int k, int lane) {
  if (kContiguous) {
    load_matrices<false>(fragment, tile + swizzled<kWidth>(m + lane % 16, k / kChunk + lane / 16));
  } else {
    load_matrices<true>(fragment, tile + swizzled<kWidth>(k + lane % 8 + lane / 16 * 8, m / kChunk + lane / 8 % 2));
  }
}

// Two 8 x 16 fragments of b at (n, k) and (n + 8, k): matrices (n, k), (n, k + 8), (n + 8, k), (n + 8, k + 8).
template <bool kContiguous, int kWidth>
__device__ void load_b(uint32_t (&fragment)[4], const bf16* tile, int n, int k, int lane) {
  if (kContiguous) {
    load_matrices<false>(fragment, tile + swizzled<kWidth>(n + lane % 8 + lane / 16 * 8, k / kChunk + lane / 8 % 2));
  } else {
    load_matrices<true>(fragment, tile + swizzled<kWidth>(k + lane % 16, n / kChunk + lane / 16));
  }
}

// Transposes 4 x 4 words over the four lanes of a quad: word j of lane q goes to word q of lane j. It turns four
// 8-column pieces of one row, two columns a lane, into 16 neighboring bytes a lane.
__device__ inline void transpose_quad(uint32_t (&word)[4], int lane) {
  const bool odd = lane & 1, high = lane & 2;
#pragma unroll
  for (int pair = 0; pair < 4; pair += 2) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? word[pair] : word[pair + 1], 1);
    word[pair] = odd ? got : word[pair];
    word[pair + 1] = odd ? word[pair + 1] : got;
  }
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, high ? word[j] : word[j + 2], 2);
    word[j] = high ? got : word[j];
    word[j + 2] = high ? word[j + 2] : got;
  }
}

__device__ inline uint32_t pack(float low, float high) {
  return __bfloat16_as_ushort(__float2bfloat16_rn(low)) |
         static_cast<uint32_t>(__bfloat16_as_ushort(__float2bfloat16_rn(high))) << 16;
}

}  // namespace moetrain_cuda
