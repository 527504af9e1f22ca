// Any CPU: vectors of four floats, which the compiler maps to SSE2, NEON or scalars. Without an FMA
// instruction a step is a product and a sum, rounded twice: other bits than on wider CPUs, the same for every row.
#include <cstring>

#include "cpu/gemm_tile.h"

namespace moetrain {
namespace {

struct Base {
  typedef float type __attribute__((vector_size(16)));
  static constexpr int kWidth = 4;
  static type zero() { return type{}; }
  static type load(const float* p) {
    type v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  static void store(float* p, type v) { std::memcpy(p, &v, sizeof v); }
  static type broadcast(float x) { return type{x, x, x, x}; }
  static type multiply_add(type x, type y, type z) { return x * y + z; }
};

}  // namespace

Tile tile_base() { return {"base", 4, 8, &run_tile<Base, 4, 2>}; }

}  // namespace moetrain
