// Sums over ranks, in their order: an element's sum depends on nothing but its own summands, so it has the same bits on
// every rank, wherever in a tensor it lies. Numbers of 16 bits are added up in float32 and rounded once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace aios {

// Numbers that are added up as they are stored.
template <class T>
struct Plain {
  using Stored = T;
  using Sum = T;
  static Sum widen(Stored x) { return x; }
  static Stored narrow(Sum x) { return x; }
};

struct Bfloat16 {
  using Stored = uint16_t;
  using Sum = float;
  static Sum widen(Stored x) { return bf16_to_float(x); }
  static Stored narrow(Sum x) { return float_to_bf16(x); }
};

// IEEE 754 half precision, in selections instead of branches: so the compiler uses vectors, which the processor's own
// conversions of single numbers do not (they took four times as long).
struct Float16 {
  using Stored = uint16_t;
  using Sum = float;
  static Sum widen(Stored x) {
    const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16, rest = x & 0x7fffu;
    const float subnormal = static_cast<float>(rest) * 0x1p-24f;
    const uint32_t other = rest >= 0x7c00u ? (rest << 13 | 0x7f800000u) : (rest << 13) + (112u << 23);
    return float_of((rest < 0x400u ? bits_of(subnormal) : other) | sign);
  }
  static Stored narrow(Sum x) {
    const uint32_t sign = bits_of(x) >> 16 & 0x8000u, rest = bits_of(x) & 0x7fffffffu;
    const uint32_t subnormal = bits_of(float_of(rest) + 0.5f) - bits_of(0.5f);  // rounds to multiples of 2^-24
    const uint32_t normal = (rest + 0xfffu + (rest >> 13 & 1u) - (112u << 23)) >> 13;
    const uint32_t special = rest > 0x7f800000u ? 0x7e00u : 0x7c00u;
    return static_cast<uint16_t>((rest >= 0x47800000u ? special : rest < 0x38800000u ? subnormal : normal) | sign);
  }

 private:
  static uint32_t bits_of(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
  }
  static float float_of(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
  }
};

// out[i] = parts[0][i] + parts[1][i] + …; `out` may be one of the parts. Blocks go through an array of their own, which
// nothing else can point into: that is what lets the compiler use vectors.
template <class Number>
void add_in_order(const typename Number::Stored* const* parts, int num_parts, int64_t count,
                  typename Number::Stored* out) {
  constexpr int64_t kBlock = 256;
  typename Number::Sum sums[kBlock];
  for (int64_t at = 0; at < count; at += kBlock) {
    const int64_t block = std::min(kBlock, count - at);
    const typename Number::Stored* part = parts[0] + at;
    for (int64_t i = 0; i < block; ++i) sums[i] = Number::widen(part[i]);
    for (int rank = 1; rank < num_parts; ++rank) {
      part = parts[rank] + at;
      for (int64_t i = 0; i < block; ++i) sums[i] += Number::widen(part[i]);
    }
    for (int64_t i = 0; i < block; ++i) out[at + i] = Number::narrow(sums[i]);
  }
}

}  // namespace aios
