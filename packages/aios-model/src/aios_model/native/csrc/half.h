// One float16 as a float, on every instruction set.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace aios {

inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 0x1f, fraction = half & 0x3ffu;
  float value;
  if (exponent == 0) {
    value = std::ldexp(static_cast<float>(fraction), -24);
  } else {
    const uint32_t bits = (exponent == 31 ? 0xffu : exponent + 112) << 23 | fraction << 13;
    std::memcpy(&value, &bits, sizeof value);
  }
  return sign ? -value : value;
}

}  // namespace aios
