// What the two passes of attention share: the choice of tiles, the cutting up of one piece of memory, and what is
// known about keys before any product.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

#include "cpu/attention_kernel.h"
#include "cpu/attention_pack.h"

namespace moetrain {

constexpr int64_t kTaskRows = 384;  // rows that one block of keys serves before the next comes into L2
constexpr float kLn2 = 0.69314718055994531f;
constexpr float kLog2E = 1.44269504088896341f;

const AttentionTile<float>& float_tile();
const AttentionTile<bf16>* amx_tile();  // null where the CPU or the system has no AMX

// Calls run(layout, tile) with what suits inputs of T best on this CPU.
template <class T, class Run>
auto with_tile(Run run) {
  if constexpr (std::is_same_v<T, bf16>) {
    if (const AttentionTile<bf16>* tile = amx_tile()) return run(AmxLayout{}, *tile);
  }
  return run(FloatLayout{}, float_tile());
}

// Strips of one task: fewer where threads would run out of tasks. Strips know nothing of each other, so neither do bits.
int64_t strips_of_a_task(const AttentionShape& shape, int rows, int threads);

// What a tile needs around the work of a thread.
template <class P>
class Entered {
 public:
  explicit Entered(const AttentionTile<P>& tile) : tile_(tile) {
    if (tile_.enter) tile_.enter();
  }
  ~Entered() {
    if (tile_.leave) tile_.leave();
  }
  Entered(const Entered&) = delete;
  Entered& operator=(const Entered&) = delete;

 private:
  const AttentionTile<P>& tile_;
};

// Hands out pieces of one piece of memory; without memory it only counts.
class Carver {
 public:
  explicit Carver(void* memory) : memory_(static_cast<char*>(memory)) {}

  template <class X>
  X* take(int64_t count) {
    const size_t at = used_;
    used_ += static_cast<size_t>(round_up(count * static_cast<int64_t>(sizeof(X)), 64));
    return memory_ ? reinterpret_cast<X*>(memory_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* memory_;
  size_t used_ = 0;
};

enum class Block : char { kVisible, kSomeHidden, kHidden };

// The padding mask (and the end of the sequence) as the loops want it.
struct KeyMask {
  int64_t padded, blocks;
  float* addend;      // [B, padded] to a score: 0, or kHidden
  Block* block;       // [B, blocks] of kKeyBlock keys
  int32_t* visible;   // [B, S] keys that a query sees

  KeyMask(const AttentionShape& shape, int columns, Carver& carver);
  void fill(const AttentionShape& shape, int64_t b) const;
};

inline const bool* valid_from(const AttentionShape& shape, int64_t b, int64_t s) {
  return shape.valid ? shape.valid + b * shape.seq + s : nullptr;
}

// `count` positions of one head from `s` on.
template <class T>
Rows<T> rows_of(const Heads<T>& x, const AttentionShape& shape, int64_t b, int64_t head, int64_t s, int64_t count) {
  const int64_t there = std::min(count, shape.seq - s);
  return {x.at(s, b, head), x.stride_s, there, shape.depth, valid_from(shape, b, s)};
}

}  // namespace moetrain
