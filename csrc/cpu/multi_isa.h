// For loops that memory bounds: the compiler's own vectors do, once for each instruction set; the clone is chosen at load
// time.
#pragma once

#if defined(__x86_64__)
#define MOETRAIN_MULTI_ISA __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define MOETRAIN_MULTI_ISA
#endif
