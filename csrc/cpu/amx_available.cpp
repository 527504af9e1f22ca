#include <cstdlib>
#include <cstring>

#include "cpu/gemm_amx.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moetrain::amx {
namespace {

bool ask() {
#if defined(__x86_64__) && defined(__linux__)
  const char* wanted = std::getenv("MOETRAIN_CPU_ISA");
  if (wanted && std::strcmp(wanted, "amx") != 0) return false;
  if (!__builtin_cpu_supports("avx512bw") || !__builtin_cpu_supports("avx512vl") ||
      !__builtin_cpu_supports("avx512bf16")) {
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

}  // namespace

bool available() {
  static const bool granted = ask();
  return granted;
}

}  // namespace moetrain::amx
