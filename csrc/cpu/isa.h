// Which instructions this process may use: what the CPU has and, for AMX, what the kernel grants; MOETRAIN_CPU_ISA
// lowers it, for tests.
#pragma once

namespace moetrain {

enum class Isa { kBase, kAvx2, kAvx512, kAmx };

// The widest. Looked up once.
Isa widest_isa();

const char* isa_name(Isa isa);

}  // namespace moetrain
