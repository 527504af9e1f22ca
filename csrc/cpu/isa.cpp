#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moetrain {
namespace {

constexpr const char* kNames[] = {"base", "avx2", "avx512", "amx"};

bool amx_granted() {
#if defined(__x86_64__) && defined(__linux__)
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512bf16")) {
    return false;
  }
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kAmxBf16) || !(edx & kAmxTile)) return false;
  // Linux hands out the tile registers' state on request only, once for the process (arch_prctl(2)).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

Isa look() {
  Isa limit = Isa::kAmx;
  if (const char* wanted = std::getenv("MOETRAIN_CPU_ISA")) {
    limit = Isa::kBase;  // what nobody knows must not pass for wide
    for (const Isa isa : {Isa::kAvx2, Isa::kAvx512, Isa::kAmx}) {
      if (std::strcmp(wanted, isa_name(isa)) == 0) limit = isa;
    }
  }
#if defined(__x86_64__)
  if (limit >= Isa::kAmx && amx_granted()) return Isa::kAmx;
  if (limit >= Isa::kAvx512 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) {
    return Isa::kAvx512;
  }
  if (limit >= Isa::kAvx2 && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::kAvx2;
#endif
  return Isa::kBase;
}

}  // namespace

Isa widest_isa() {
  static const Isa widest = look();
  return widest;
}

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

}  // namespace moetrain
