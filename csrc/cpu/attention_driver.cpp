#include "cpu/attention_driver.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace moetrain {
namespace {

#if defined(__x86_64__)
bool allowed(const char* isa) {
  const char* wanted = std::getenv("MOETRAIN_CPU_ISA");
  return !wanted || std::strcmp(wanted, isa) == 0;
}

bool amx_granted() {
#if defined(__linux__)
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  if (!allowed("amx") || !__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vl") ||
      !__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || !(edx & kAmxBf16) || !(edx & kAmxTile)) {
    return false;
  }
  // Linux hands out the tile registers' state on request only, once for the process (arch_prctl(2)).
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

AttentionTile<float> choose_tile() {
#if defined(__x86_64__)
  const bool wide = allowed("amx") || allowed("avx512");
  if (wide && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq")) return attention_tile_avx512();
  if ((wide || allowed("avx2")) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return attention_tile_avx2();
  }
#endif
  return attention_tile_base();
}

}  // namespace

const AttentionTile<float>& float_tile() {
  static const AttentionTile<float> chosen = choose_tile();
  return chosen;
}

const AttentionTile<bf16>* amx_tile() {
#if defined(__x86_64__)
  static const AttentionTile<bf16> tile = attention_tile_amx();
  static const bool granted = amx_granted();
  return granted ? &tile : nullptr;
#else
  return nullptr;
#endif
}

int64_t strips_of_a_task(const AttentionShape& shape, int rows, int threads) {
  const int64_t strips = shape.batch * shape.heads * ((shape.seq + rows - 1) / rows);
  const int64_t share = threads == 1 ? strips : strips / (4 * threads);
  return std::clamp<int64_t>(share, 1, kTaskRows / rows);
}

KeyMask::KeyMask(const AttentionShape& shape, int columns, Carver& carver)
    : padded(round_up(shape.seq, columns)), blocks((shape.seq + kKeyBlock - 1) / kKeyBlock) {
  addend = carver.take<float>(shape.batch * padded);
  block = carver.take<Block>(shape.batch * blocks);
  visible = carver.take<int32_t>(shape.batch * shape.seq);
}

void KeyMask::fill(const AttentionShape& shape, int64_t b) const {
  const bool* valid = valid_from(shape, b, 0);
  int32_t seen = 0;
  for (int64_t j = 0; j < padded; ++j) {
    const bool shown = j < shape.seq && (!valid || valid[j]);
    addend[b * padded + j] = shown ? 0.0f : kHidden;
    seen += shown;
    if (j < shape.seq) visible[b * shape.seq + j] = seen;
  }
  if (!shape.causal) std::fill_n(visible + b * shape.seq, shape.seq, seen);
  for (int64_t i = 0; i < blocks; ++i) {
    const float* first = addend + b * padded + i * kKeyBlock;
    const float* last = addend + b * padded + std::min((i + 1) * kKeyBlock, padded);
    const auto hidden = std::count(first, last, kHidden);
    block[b * blocks + i] = hidden == 0 ? Block::kVisible : hidden < last - first ? Block::kSomeHidden : Block::kHidden;
  }
}

}  // namespace moetrain
