// The fused expert layer in bf16 by AMX tiles, torch-free.
// Legend: T tokens, K slots a token, R routed rows sorted by expert, E experts, D hidden size, F expert width.
#pragma once

#include <cstdint>

#include "cpu/bf16.h"

namespace moetrain::amx {

struct ExpertLayer {
  int64_t tokens, slots, rows, experts, hidden, width;
  const bf16* x;                // [T, D]
  const float* weights;         // [T, K], or null: all ones
  const bf16* fc1;              // [E, 2F, D], gate rows, then up rows
  const bf16* fc2;              // [E, D, F]
  const int64_t* row_token;     // [R]
  const int64_t* row_slot;      // [R]: t * K + j
  const int64_t* first_row;     // [E + 1]
};

// Matrices over rows that only this layer reads (z, dz, weighted) lie as panels: expert by expert, of an expert 32
// columns at a time, of these row by row. Neighboring rows are then neighbors in memory, for a product over a chunk of
// rows and for a sum over all of them; in plain rows of 2F each access would open another page.
inline const int64_t kPanelColumns = 32;

// Whether the layer has whole panels.
inline bool fits(int64_t width) { return width % kPanelColumns == 0; }

// z [R, 2F] (fc1's output in panels; null: not kept) and out [R, D] (the experts' outputs, in the order of the rows).
void forward(const ExpertLayer& layer, bf16* z, bf16* out, int threads);

// Null: not wanted.
struct ExpertLayerGradients {
  bf16* dx_rows;      // [R, D]
  float* dweights;    // [T, K], zeroed by the caller
  bf16* dfc1;         // [E, 2F, D]
  bf16* dfc2;         // [E, D, F]
  bf16* dz;           // scratch of [R, 2F]
  bf16* weighted;     // scratch of [R, F]: the activation times the row's weight; only for dfc2
};

void backward(const ExpertLayer& layer, const bf16* grad, const bf16* z, const ExpertLayerGradients& to, int threads);

}  // namespace moetrain::amx
