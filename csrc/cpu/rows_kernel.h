// Row movement on the CPU, torch-free. Rows are contiguous, `width` elements each.
//   T tokens, K expert slots a token, R routed rows, E experts.
// slot_row[t * K + j] is the row of slot j of token t, or -1 when the slot is unused.
// Sums run in slot order with float accumulators: the same bits for any number of threads.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/bf16.h"

namespace moetrain {

// Adds the tokens of each expert to tokens_per_expert[E] (zeroed by the caller). Returns the index of the
// first slot whose expert is not in [-1, E), or -1 when all are legal.
int64_t count_tokens(const int64_t* expert_ids, int64_t slots, int64_t num_experts, int64_t* tokens_per_expert);

// Stable counting sort of the used slots by expert; next_row[E] holds each expert's first row and is consumed.
void place_slots(const int64_t* expert_ids, int64_t tokens, int64_t slots_per_token, int64_t* next_row,
                 int64_t* row_token, int64_t* row_slot, int64_t* slot_row);

// out[i] = x[index[i]] for `count` rows of `row_bytes` bytes.
void gather_rows(const void* x, const int64_t* index, int64_t count, size_t row_bytes, void* out, int threads);

// out[t] = sum over j of weights[t, j] * rows[slot_row[t, j]]; weights may be null (all ones).
template <class T>
void combine_rows(const T* rows, const float* weights, const int64_t* slot_row, int64_t tokens,
                  int64_t slots_per_token, int64_t width, T* out, int threads);

// grad_rows[r] = weight of r * grad[token of r];  grad_weights[t, j] = <grad[t], rows[r]>, 0 for unused slots.
template <class T>
void combine_rows_backward(const T* grad, const T* rows, const float* weights, const int64_t* slot_row,
                           int64_t tokens, int64_t slots_per_token, int64_t width, T* grad_rows,
                           float* grad_weights, int threads);

}  // namespace moetrain
