// bfloat16 without torch: the upper half of a float, rounded to nearest even.
#pragma once

#include <cstdint>
#include <cstring>

namespace moetrain {

struct bf16 {
  uint16_t bits;
};

inline float to_float(float value) { return value; }

inline float to_float(bf16 value) {
  const uint32_t wide = static_cast<uint32_t>(value.bits) << 16;
  float result;
  std::memcpy(&result, &wide, sizeof result);
  return result;
}

template <class T>
T from_float(float value);

template <>
inline float from_float<float>(float value) {
  return value;
}

template <>
inline bf16 from_float<bf16>(float value) {
  uint32_t wide;
  std::memcpy(&wide, &value, sizeof wide);
  const uint32_t rounded = (wide + 0x7fffu + ((wide >> 16) & 1u)) >> 16;
  // A NaN must stay one: rounding could carry its mantissa into infinity.
  return {static_cast<uint16_t>(value != value ? 0x7fc0u : rounded)};
}

}  // namespace moetrain
