// Any CPU: vectors of four floats, which the compiler maps to SSE2, NEON or scalars. Without an FMA
// instruction a step is a product and a sum, rounded twice: other bits than on wider CPUs, the same for every row.
#include <cstring>

#include "cpu/gemm_tile.h"

namespace moetrain {
namespace {

typedef float Float4 __attribute__((vector_size(16)));
typedef int32_t Int4 __attribute__((vector_size(16)));

inline Float4 load4(const float* p) {
  Float4 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

inline Float4 load4(const bf16* p) {
  typedef uint16_t Short4 __attribute__((vector_size(8)));
  typedef uint32_t Word4 __attribute__((vector_size(16)));
  Short4 narrow;
  std::memcpy(&narrow, p, sizeof narrow);
  const Word4 wide = __builtin_convertvector(narrow, Word4) << 16;
  Float4 v;
  std::memcpy(&v, &wide, sizeof v);
  return v;
}

inline void store4(float* p, Float4 v) { std::memcpy(p, &v, sizeof v); }

struct Base {
  using type = Float4;
  static constexpr int kWidth = 4;
  static type zero() { return type{}; }
  static type load(const float* p) { return load4(p); }
  static void store(float* p, type v) { store4(p, v); }
  static type broadcast(float x) { return type{x, x, x, x}; }
  static type multiply_add(type x, type y, type z) { return x * y + z; }
  static type multiply_add(const float* x, type y, type z) { return multiply_add(broadcast(*x), y, z); }
};

struct PackBase {
  static constexpr int64_t kSide = 4;

  template <class T>
  static void transpose(const T* const* rows, int64_t k, float* to, int64_t width) {
    const Float4 r0 = load4(rows[0] + k), r1 = load4(rows[1] + k);
    const Float4 r2 = load4(rows[2] + k), r3 = load4(rows[3] + k);
    const Float4 low01 = __builtin_shuffle(r0, r1, Int4{0, 4, 1, 5});
    const Float4 low23 = __builtin_shuffle(r2, r3, Int4{0, 4, 1, 5});
    const Float4 top01 = __builtin_shuffle(r0, r1, Int4{2, 6, 3, 7});
    const Float4 top23 = __builtin_shuffle(r2, r3, Int4{2, 6, 3, 7});
    store4(to, __builtin_shuffle(low01, low23, Int4{0, 1, 4, 5}));
    store4(to + width, __builtin_shuffle(low01, low23, Int4{2, 3, 6, 7}));
    store4(to + 2 * width, __builtin_shuffle(top01, top23, Int4{0, 1, 4, 5}));
    store4(to + 3 * width, __builtin_shuffle(top01, top23, Int4{2, 3, 6, 7}));
  }

  template <class T>
  static void copy(const T* from, float* to) {
    store4(to, load4(from));
  }
};

}  // namespace

Tile tile_base() {
  return {4, 4, 8, &run_tile<Base, 4, 4, 2>, pack_fns<PackBase, float>(), pack_fns<PackBase, bf16>()};
}

}  // namespace moetrain
