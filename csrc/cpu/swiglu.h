// SwiGLU and its gradient over rows [gate | up], torch-free. T: float or bf16; F = width. Elementwise, so a row's bits
// depend on the row only; the dot product adds in an order that depends on F only.
#pragma once

#include <cstdint>

#include "cpu/bf16.h"

namespace moetrain {

// hidden[r][f] = silu(z[r][f]) * z[r][F + f]
template <class T>
void swiglu(const T* z, int64_t rows, int64_t width, T* hidden, int threads);

// From dh, the gradient of the activation before the row's weight (weights[row_slot[r]], or 1 where weights is null):
// dz; dh becomes the activation times the weight; dweights[row_slot[r]] = <dh[r], hidden[r]> where not null.
template <class T>
void swiglu_backward(const T* z, const float* weights, const int64_t* row_slot, int64_t rows, int64_t width, T* dh,
                     T* dz, float* dweights, int threads);

}  // namespace moetrain
