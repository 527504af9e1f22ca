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

// z [R, 2F] (fc1's output; null: not kept) and out [R, D] (the experts' outputs, in the order of the rows).
void forward(const ExpertLayer& layer, bf16* z, bf16* out, int threads);

// What backward writes; a null pointer is not computed, except dz and weighted, which it needs itself.
struct ExpertLayerGradients {
  bf16* dz;           // [R, 2F] scratch: gradient of z
  bf16* weighted;     // [R, F] scratch: the activation times the row's weight; null without dfc2
  bf16* dx_rows;      // [R, D]
  float* dweights;    // [T, K], zeroed by the caller
};

// Everything but the two weight gradients, which are grouped products of dz, weighted, x and grad.
void backward(const ExpertLayer& layer, const bf16* grad, const bf16* z, const ExpertLayerGradients& to, int threads);

}  // namespace moetrain::amx
