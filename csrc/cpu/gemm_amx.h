// The grouped GEMM in bf16 by AMX tiles; same products and promises as gemm_kernel.h.
#pragma once

#include <vector>

#include "cpu/gemm_kernel.h"

namespace moetrain::amx {

// Whether this process may use AMX: the CPU has it, the kernel grants it, and MOETRAIN_CPU_ISA does not forbid it.
bool available();

// Out: bf16 or float.
template <class Out>
void grouped_gemm(const std::vector<Gemm<bf16, Out>>& groups, int threads);

}  // namespace moetrain::amx
