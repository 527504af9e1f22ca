#include "cpu/rows_kernel.h"

#include <algorithm>

#include "cpu/multi_isa.h"

namespace moetrain {
namespace {

constexpr int64_t kChunk = 512;  // columns whose accumulators stay in L1
constexpr int kLanes = 16;       // partial sums of a dot product, whatever the width of the vectors

MOETRAIN_MULTI_ISA void add_scaled(float* acc, const float* row, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) acc[i] += scale * row[i];
}

MOETRAIN_MULTI_ISA void add_scaled(float* acc, const bf16* row, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) acc[i] += scale * to_float(row[i]);
}

MOETRAIN_MULTI_ISA void store(float* out, const float* values, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = scale * values[i];
}

MOETRAIN_MULTI_ISA void store(bf16* out, const float* values, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<bf16>(scale * values[i]);
}

MOETRAIN_MULTI_ISA void store(bf16* out, const bf16* values, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = from_float<bf16>(scale * to_float(values[i]));
}

float sum_lanes(const float* lane) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += lane[i];
  return sum;
}

MOETRAIN_MULTI_ISA float dot(const float* a, const float* b, int64_t n) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += a[i + l] * b[i + l];
  }
  for (int l = 0; i < n; ++i, ++l) lane[l] += a[i] * b[i];
  return sum_lanes(lane);
}

MOETRAIN_MULTI_ISA float dot(const bf16* a, const bf16* b, int64_t n) {
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int l = 0; l < kLanes; ++l) lane[l] += to_float(a[i + l]) * to_float(b[i + l]);
  }
  for (int l = 0; i < n; ++i, ++l) lane[l] += to_float(a[i]) * to_float(b[i]);
  return sum_lanes(lane);
}

}  // namespace

int64_t count_tokens(const int64_t* expert_ids, int64_t slots, int64_t num_experts, int64_t* tokens_per_expert) {
  for (int64_t i = 0; i < slots; ++i) {
    const int64_t expert = expert_ids[i];
    if (expert == -1) continue;
    if (expert < -1 || expert >= num_experts) return i;
    ++tokens_per_expert[expert];
  }
  return -1;
}

void place_slots(const int64_t* expert_ids, int64_t tokens, int64_t slots_per_token, int64_t* next_row,
                 int64_t* row_token, int64_t* row_slot, int64_t* slot_row) {
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t slot = t * slots_per_token; slot < (t + 1) * slots_per_token; ++slot) {
      if (expert_ids[slot] < 0) {
        slot_row[slot] = -1;
        continue;
      }
      const int64_t row = next_row[expert_ids[slot]]++;
      slot_row[slot] = row;
      row_slot[row] = slot;
      row_token[row] = t;
    }
  }
}

void gather_rows(const void* x, const int64_t* index, int64_t count, size_t row_bytes, void* out, int threads) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * row_bytes, from + index[i] * row_bytes, row_bytes);
}

template <class T>
void combine_rows(const T* rows, const float* weights, const int64_t* slot_row, int64_t tokens,
                  int64_t slots_per_token, int64_t width, T* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t begin = 0; begin < width; begin += kChunk) {
      const int64_t n = std::min(kChunk, width - begin);
      float acc[kChunk] = {};
      for (int64_t slot = t * slots_per_token; slot < (t + 1) * slots_per_token; ++slot) {
        if (slot_row[slot] < 0) continue;
        add_scaled(acc, rows + slot_row[slot] * width + begin, weights ? weights[slot] : 1.0f, n);
      }
      store(out + t * width + begin, acc, 1.0f, n);
    }
  }
}

template <class T>
void combine_rows_backward(const T* grad, const T* rows, const float* weights, const int64_t* slot_row,
                           int64_t tokens, int64_t slots_per_token, int64_t width, T* grad_rows,
                           float* grad_weights, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t t = 0; t < tokens; ++t) {
    for (int64_t slot = t * slots_per_token; slot < (t + 1) * slots_per_token; ++slot) {
      const int64_t row = slot_row[slot];
      if (row < 0) {
        grad_weights[slot] = 0;
        continue;
      }
      store(grad_rows + row * width, grad + t * width, weights[slot], width);
      grad_weights[slot] = dot(grad + t * width, rows + row * width, width);
    }
  }
}

#define MOETRAIN_INSTANTIATE(T)                                                                               \
  template void combine_rows<T>(const T*, const float*, const int64_t*, int64_t, int64_t, int64_t, T*, int);  \
  template void combine_rows_backward<T>(const T*, const T*, const float*, const int64_t*, int64_t, int64_t, \
                                         int64_t, T*, float*, int)
MOETRAIN_INSTANTIATE(float);
MOETRAIN_INSTANTIATE(bf16);

}  // namespace moetrain
