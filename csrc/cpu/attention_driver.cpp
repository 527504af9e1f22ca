#include "cpu/attention_driver.h"

#include <algorithm>

#include "cpu/isa.h"

namespace moetrain {
namespace {

AttentionTile<float> choose_tile() {
#if defined(__x86_64__)
  if (widest_isa() >= Isa::kAvx512) return attention_tile_avx512();
  if (widest_isa() == Isa::kAvx2) return attention_tile_avx2();
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
  return widest_isa() == Isa::kAmx ? &tile : nullptr;
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
