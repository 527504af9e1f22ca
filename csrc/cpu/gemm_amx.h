// The grouped GEMM in bf16 by AMX tiles; same products and promises as gemm_kernel.h.
#pragma once

#include <vector>

#include "cpu/gemm_kernel.h"

namespace moetrain::amx {

// Only where widest_isa() is AMX.

// An operand whose outer axis may be cut into panels of 32, `panel` elements apart (0: it is not): element (i, k) is
// data[i / 32 * panel + k * stride + i % 32]. For reductions over rows, which then read memory in order.
struct Source : Operand<bf16> {
  int64_t panel = 0;
  const bf16* start(int64_t outer) const { return data + (panel ? outer / 32 * panel : outer); }
};

// As Gemm; Out: bf16 or float.
template <class Out>
struct Product {
  Source a, b;
  Out* c;
  int64_t c_stride;
  int64_t m, n, k;
  const int64_t* c_index = nullptr;
  bool accumulate = false;

  Out* c_row(int64_t r) const { return c + (c_index ? c_index[r] : r) * c_stride; }
};

template <class Out>
void grouped_gemm(const std::vector<Product<Out>>& groups, int threads);

}  // namespace moetrain::amx
