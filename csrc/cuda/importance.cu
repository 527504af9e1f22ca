// Token importance from attention weights, torch-free: p = exp(scale q k^T - lse), block by block, never stored. A block
// keeps kOwn tokens (queries for what a row gives, keys for what a column gets) and walks over the others upwards, so a
// query's value depends on the keys that it sees and nothing else. Sums have a fixed order; heads are added by a second
// kernel. bfloat16 goes through mma.sync, float32 through plain fused multiply-adds.
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cmath>

#include "cuda/launch.h"
#include "cuda/mma.cuh"
#include "cuda/warp.cuh"

namespace {

using namespace moetrain_cuda;
using Call = MoetrainImportance;

constexpr float kLog2E = 1.4426950408889634f;
constexpr int kOther = 64;  // tokens of a step

constexpr bool by_query(int measure) { return measure == kRowMax || measure == kRowEntropy; }

// What one token has gathered so far. Scores arrive as x = log2(p), -inf for a pair that does not see each other.
template <int kMeasure>
struct State {
  float value = kMeasure == kRowEntropy || kMeasure == kColSum ? 0.0f : -INFINITY;
  float seen = 0;  // row_entropy: keys

  __device__ void add(float x) {
    if (kMeasure == kRowMax || kMeasure == kColMax) {
      value = fmaxf(value, x);
    } else if (kMeasure == kColSum) {
      value += exp2f(x);
    } else {
      const float p = exp2f(x);
      value -= p > 0 ? p * x : 0.0f;
      seen += x > -INFINITY ? 1.0f : 0.0f;
    }
  }

  // Joins the states of `lanes` neighboring lanes in a fixed tree.
  __device__ void join(int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      const float other = __shfl_xor_sync(kAllLanes, value, step);
      value = kMeasure == kRowMax || kMeasure == kColMax ? fmaxf(value, other) : value + other;
      if (kMeasure == kRowEntropy) seen += __shfl_xor_sync(kAllLanes, seen, step);
    }
  }

  __device__ float result() const {
    if (kMeasure == kColSum) return value;
    if (kMeasure == kRowEntropy) return seen > 1 ? value / log2f(seen) : 0.0f;  // both logarithms to base 2
    return exp2f(value);
  }
};

// One side of the scores: the queries or the keys of a head.
template <class T>
struct Side {
  const T* data;
  int64_t stride;
};

// A head of a batch: the tokens that the block keeps and those it walks over.
template <int kMeasure, class T>
struct Head {
  const Call& call;
  int64_t row;  // of lse and of per_head
  const bool* valid;
  Side<T> own, other;
  int first, end;  // of the others that any own token may see; first is a multiple of kOther

  __device__ Head(const Call& c, int own0, int own_end) : call(c) {
    const int64_t head = blockIdx.y, batch = blockIdx.z, group = head / (c.heads / c.groups);
    const Side<T> q = {static_cast<const T*>(c.q) + batch * c.q_strides[1] + head * c.q_strides[2], c.q_strides[0]};
    const Side<T> k = {static_cast<const T*>(c.k) + batch * c.k_strides[1] + group * c.k_strides[2], c.k_strides[0]};
    row = (batch * c.heads + head) * c.seq;
    valid = c.valid ? c.valid + batch * c.seq : nullptr;
    own = by_query(kMeasure) ? q : k;
    other = by_query(kMeasure) ? k : q;
    first = by_query(kMeasure) || !c.causal ? 0 : own0 / kOther * kOther;
    end = static_cast<int>(c.seq);
    if (by_query(kMeasure) && c.causal) end = min(end, own_end);
  }

  __device__ bool exists(int token) const { return token < call.seq && (valid == nullptr || valid[token]); }

  // What is added to the scaled score of a pair: -lse of its query, and -inf for a token that nobody sees.
  __device__ float own_bias(int token) const {
    return by_query(kMeasure) && token < call.seq ? -call.lse[row + token] * kLog2E : 0.0f;
  }
  __device__ float other_bias(int token) const {
    if (!exists(token)) return -INFINITY;
    return by_query(kMeasure) ? 0.0f : -call.lse[row + token] * kLog2E;
  }

  __device__ bool sees(int own_token, int other_token) const {
    return !call.causal || (by_query(kMeasure) ? other_token <= own_token : own_token <= other_token);
  }

  __device__ void leave(int token, float value) const {
    if (token < call.seq) call.per_head[row + token] = exists(token) ? value : 0.0f;
  }
};

template <int kMeasure, class T>
__device__ void add(State<kMeasure>& state, const Head<kMeasure, T>& head, float dot, float scale2, float own_bias,
                    float other_bias, int own_token, int other_token) {
  const float x = fmaf(dot, scale2, own_bias + other_bias);
  state.add(head.sees(own_token, other_token) ? x : -INFINITY);
}

// Under a causal mask the last queries see the most keys: they start first.
template <int kMeasure>
__device__ int block_of(const Call& c) {
  return by_query(kMeasure) && c.causal ? gridDim.x - 1 - blockIdx.x : blockIdx.x;
}

// ---------------------------------------------------------------------------------------------- bfloat16

constexpr int kOwnMma = 128;
constexpr int kWarpOwn = 32;
constexpr int kThreadsMma = kOwnMma / kWarpOwn * 32;
constexpr int kPanel = 64;  // tiles lie as panels of 64 columns of the head dimension

// Stages `count` tokens from `token` on into panels [count][kPanel], zero outside.
template <bool kAligned>
__device__ void load_panels(const Side<bf16>& from, int token, int count, int seq, int width, bf16* to) {
  constexpr int kRowChunks = kPanel / kChunk;
  for (int column0 = 0; column0 < width; column0 += kPanel, to += count * kPanel) {
    for (int flat = threadIdx.x; flat < count * kRowChunks; flat += kThreadsMma) {
      const int row = flat / kRowChunks, chunk = flat % kRowChunks;
      const int column = column0 + chunk * kChunk;
      const bool inside = token + row < seq;
      copy_chunk<kAligned>(to + swizzled<kPanel>(row, chunk), from.data + (token + row) * from.stride + column,
                           from.data, inside ? width - column : 0);
    }
  }
}

using Scores = float[kWarpOwn / 16][kOther / 8][4];

__device__ void multiply_panels(Scores& score, const bf16* own, const bf16* other, int own_row, int width, int lane) {
  for (int column0 = 0; column0 < width; column0 += kPanel, own += kOwnMma * kPanel, other += kOther * kPanel) {
#pragma unroll
    for (int k = 0; k < kPanel; k += 16) {
      if (column0 + k >= width) break;
      uint32_t a[kWarpOwn / 16][4], b[4];
#pragma unroll
      for (int i = 0; i < kWarpOwn / 16; ++i) load_a<true, kPanel>(a[i], own, own_row + 16 * i, k, lane);
#pragma unroll
      for (int j = 0; j < kOther / 16; ++j) {
        load_b<true, kPanel>(b, other, 16 * j, k, lane);
#pragma unroll
        for (int i = 0; i < kWarpOwn / 16; ++i) {
          multiply_add(score[i][2 * j], a[i], b[0], b[1]);
          multiply_add(score[i][2 * j + 1], a[i], b[2], b[3]);
        }
      }
    }
  }
}

template <int kMeasure, bool kAligned>
__global__ void __launch_bounds__(kThreadsMma) mma_kernel(const Call call) {
  extern __shared__ __align__(128) bf16 shared[];
  __shared__ float biases[2][kOther];
  const int own0 = block_of<kMeasure>(call) * kOwnMma;
  const Head<kMeasure, bf16> head(call, own0, own0 + kOwnMma);
  const int lane = threadIdx.x % 32, warp_row = threadIdx.x / 32 * kWarpOwn;
  const int seq = static_cast<int>(call.seq), width = static_cast<int>(call.width);
  const int padded = (width + kPanel - 1) / kPanel * kPanel;
  bf16* const own = shared;
  bf16* const others = shared + kOwnMma * padded;
  const float scale2 = call.scale * kLog2E;

  const auto load = [&](int token, int stage) {
    if (token < head.end) {
      load_panels<kAligned>(head.other, token, kOther, seq, width, others + stage * kOther * padded);
      if (threadIdx.x < kOther) biases[stage][threadIdx.x] = head.other_bias(token + threadIdx.x);
    }
    commit();
  };
  // Row v of a thread: 8 rows apart, as the accumulators of mma have them.
  const auto token_of = [&](int v) { return own0 + warp_row + 8 * v + lane / 4; };
  State<kMeasure> state[kWarpOwn / 8];
  float own_bias[kWarpOwn / 8];
#pragma unroll
  for (int v = 0; v < kWarpOwn / 8; ++v) own_bias[v] = head.own_bias(token_of(v));

  load_panels<kAligned>(head.own, own0, kOwnMma, seq, width, own);
  load(head.first, 0);
  int stage = 0;
  for (int token = head.first; token < head.end; token += kOther, stage ^= 1) {
    wait<0>();
    __syncthreads();  // this step's tile is here, and nobody reads the other one any more
    load(token + kOther, stage ^ 1);
    Scores score = {};
    multiply_panels(score, own, others + stage * kOther * padded, warp_row, width, lane);
#pragma unroll
    for (int v = 0; v < kWarpOwn / 8; ++v) {
#pragma unroll
      for (int j = 0; j < kOther / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int at = 8 * j + lane % 4 * 2 + i;
          add(state[v], head, score[v / 2][j][v % 2 * 2 + i], scale2, own_bias[v], biases[stage][at], token_of(v),
              token + at);
        }
      }
    }
  }
  wait<0>();
#pragma unroll
  for (int v = 0; v < kWarpOwn / 8; ++v) {
    state[v].join(4);
    if (lane % 4 == 0) head.leave(token_of(v), state[v].result());
  }
}

template <int kMeasure>
int launch_mma(const Call& call, cudaStream_t stream) {
  const auto bits = reinterpret_cast<uintptr_t>(call.q) | reinterpret_cast<uintptr_t>(call.k);
  bool aligned = bits % 16 == 0 && call.width % kChunk == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && call.q_strides[i] % kChunk == 0 && call.k_strides[i] % kChunk == 0;
  const auto kernel = aligned ? &mma_kernel<kMeasure, true> : &mma_kernel<kMeasure, false>;
  const int padded = static_cast<int>((call.width + kPanel - 1) / kPanel * kPanel);
  const int bytes = (kOwnMma + 2 * kOther) * padded * static_cast<int>(sizeof(bf16));
  if (const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes)) {
    return error;
  }
  const dim3 grid(static_cast<unsigned>((call.seq + kOwnMma - 1) / kOwnMma), static_cast<unsigned>(call.heads),
                  static_cast<unsigned>(call.batch));
  kernel<<<grid, kThreadsMma, bytes, stream>>>(call);
  return cudaGetLastError();
}

// ---------------------------------------------------------------------------------------------- float32

constexpr int kOwnPlain = 64;
constexpr int kDepth = 16;
constexpr int kThreadsPlain = 256;
constexpr int kEach = 4;  // own tokens and others of a thread
static_assert(kOwnPlain == kOther, "one loader serves both sides");

// to[k][i] = component k0 + k of token `token` + i, zero outside.
__device__ void load_components(const Side<float>& from, int token, int seq, int k0, int width,
                                float (*to)[kOther + 4]) {
  for (int flat = threadIdx.x; flat < kOther * kDepth; flat += kThreadsPlain) {
    const int k = flat % kDepth, i = flat / kDepth;
    const bool inside = token + i < seq && k0 + k < width;
    to[k][i] = inside ? from.data[(token + i) * from.stride + k0 + k] : 0.0f;
  }
}

template <int kMeasure>
__global__ void __launch_bounds__(kThreadsPlain) plain_kernel(const Call call) {
  __shared__ float own[kDepth][kOwnPlain + 4], other[kDepth][kOther + 4];
  const int own0 = block_of<kMeasure>(call) * kOwnPlain;
  const Head<kMeasure, float> head(call, own0, own0 + kOwnPlain);
  const int row = threadIdx.x / 16 * kEach, column = threadIdx.x % 16 * kEach;
  const int seq = static_cast<int>(call.seq), width = static_cast<int>(call.width);
  const float scale2 = call.scale * kLog2E;
  State<kMeasure> state[kEach];
  for (int token = head.first; token < head.end; token += kOther) {
    float score[kEach][kEach] = {};
    for (int k0 = 0; k0 < width; k0 += kDepth) {
      load_components(head.own, own0, seq, k0, width, own);
      load_components(head.other, token, seq, k0, width, other);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < kDepth; ++k) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
#pragma unroll
          for (int j = 0; j < kEach; ++j) score[i][j] = fmaf(own[k][row + i], other[k][column + j], score[i][j]);
        }
      }
      __syncthreads();
    }
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float own_bias = head.own_bias(own0 + row + i);
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int at = token + column + j;
        add(state[i], head, score[i][j], scale2, own_bias, head.other_bias(at), own0 + row + i, at);
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    state[i].join(16);
    if (threadIdx.x % 16 == 0) head.leave(own0 + row + i, state[i].result());
  }
}

template <int kMeasure>
int launch_plain(const Call& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((call.seq + kOwnPlain - 1) / kOwnPlain), static_cast<unsigned>(call.heads),
                  static_cast<unsigned>(call.batch));
  plain_kernel<kMeasure><<<grid, kThreadsPlain, 0, stream>>>(call);
  return cudaGetLastError();
}

// ---------------------------------------------------------------------------------------------- the diagonal, heads

constexpr int kThreads = 256;

// One warp a token.
template <class T>
__global__ void self_weight_kernel(const Call call) {
  const int64_t token = blockIdx.x * static_cast<int64_t>(kThreads / 32) + threadIdx.x / 32;
  if (token >= call.seq) return;  // the whole warp
  const Head<kRowMax, T> head(call, 0, 0);
  const T* const q = head.own.data + token * head.own.stride;
  const T* const k = head.other.data + token * head.other.stride;
  const int lane = threadIdx.x % 32;
  float dot = 0;
  for (int64_t i = lane; i < call.width; i += 32) dot = fmaf(widen(q[i]), widen(k[i]), dot);
  for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
  const int at = static_cast<int>(token);
  if (lane == 0) head.leave(at, exp2f(fmaf(dot, call.scale * kLog2E, head.own_bias(at))));
}

template <class T>
int launch_self_weight(const Call& call, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((call.seq + kThreads / 32 - 1) / (kThreads / 32)),
                  static_cast<unsigned>(call.heads), static_cast<unsigned>(call.batch));
  self_weight_kernel<T><<<grid, kThreads, 0, stream>>>(call);
  return cudaGetLastError();
}

__global__ void sum_heads_kernel(const float* per_head, int64_t seq, int64_t heads, int64_t batch, float* out) {
  const int64_t token = blockIdx.x * static_cast<int64_t>(kThreads) + threadIdx.x, b = blockIdx.y;
  if (token >= seq) return;
  float sum = 0;
  for (int64_t h = 0; h < heads; ++h) sum += per_head[(b * heads + h) * seq + token];
  out[token * batch + b] = sum;
}

int launch_heads(const Call& call, cudaStream_t stream) {
  const bool plain = call.dtype == 0;
  switch (call.measure) {
    case kSelfWeight: return plain ? launch_self_weight<float>(call, stream) : launch_self_weight<bf16>(call, stream);
    case kRowMax: return plain ? launch_plain<kRowMax>(call, stream) : launch_mma<kRowMax>(call, stream);
    case kRowEntropy: return plain ? launch_plain<kRowEntropy>(call, stream) : launch_mma<kRowEntropy>(call, stream);
    case kColMax: return plain ? launch_plain<kColMax>(call, stream) : launch_mma<kColMax>(call, stream);
    default: return plain ? launch_plain<kColSum>(call, stream) : launch_mma<kColSum>(call, stream);
  }
}

}  // namespace

extern "C" int moetrain_cuda_importance(const MoetrainImportance* call, CUstream_st* stream) {
  if (call->seq == 0 || call->batch == 0) return cudaSuccess;
  if (call->heads > 0) {
    if (const int error = launch_heads(*call, stream)) return error;
  }
  const dim3 grid(static_cast<unsigned>((call->seq + kThreads - 1) / kThreads), static_cast<unsigned>(call->batch));
  sum_heads_kernel<<<grid, kThreads, 0, stream>>>(call->per_head, call->seq, call->heads, call->batch, call->out);
  return cudaGetLastError();
}
