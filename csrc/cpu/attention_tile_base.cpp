// Any CPU: vectors of four floats (see gemm_tile_base.cpp).
#include <cstring>

#include "cpu/attention_tile.h"

namespace moetrain {
namespace {

typedef int32_t Int4 __attribute__((vector_size(16)));
typedef uint32_t Word4 __attribute__((vector_size(16)));

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
  static float first(type x) { return x[0]; }
  static type add(type x, type y) { return x + y; }
  static type multiply(type x, type y) { return x * y; }
  static type multiply_add(type x, type y, type z) { return x * y + z; }
  static type max(type x, type y) { return x > y ? x : y; }
  static float sum_lanes(type x) { return (x[0] + x[2]) + (x[1] + x[3]); }
  static float max_lanes(type x) {
    const float low = x[0] > x[1] ? x[0] : x[1], top = x[2] > x[3] ? x[2] : x[3];
    return low > top ? low : top;
  }
  static type exp2(type x);
};

// The exponent is written into the bits of a float: from -127 (zero) to 128 (infinity). A NaN fails both comparisons.
inline Base::type Base::exp2(type x) {
  const type least = broadcast(-127.0f), most = broadcast(128.0f);
  x = x < least ? least : x;
  x = x > most ? most : x;
  Int4 whole = __builtin_convertvector(x, Int4);
  whole += __builtin_convertvector(whole, type) > x;  // floor: a comparison that holds is -1
  const Word4 bits = (__builtin_convertvector(whole, Word4) + 127u) << 23;
  type factor;
  std::memcpy(&factor, &bits, sizeof factor);
  return exp2_fraction<Base>(x - __builtin_convertvector(whole, type)) * factor;
}

}  // namespace

AttentionTile<float> attention_tile_base() { return float_attention_tile<Base, 4, 2>("base"); }

}  // namespace moetrain
