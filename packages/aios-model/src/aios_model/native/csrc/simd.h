// Vectors of sixteen numbers, the unit every kernel is written in.
//
// One header per instruction set implements the same names, so a kernel is written once and read once:
//
//   f32x16, i32x16        sixteen floats, sixteen 32-bit integers
//   bytes64               64 bytes: sixteen lanes of four, one operand of `dot4`
//   load, store, splat, fma, …
//
// AVX-512 holds sixteen floats in a register; AVX2 uses two registers, the portable version an array that the compiler
// may vectorise (NEON, or no SIMD at all). Sums over lanes are taken in the same tree everywhere, so that the order of
// a reduction does not depend on the instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(AIOS_ISA_AVX512)
#include "simd_avx512.h"
#elif defined(AIOS_ISA_AVX2)
#include "simd_avx2.h"
#else
#include "simd_portable.h"
#endif

namespace aios {

constexpr int kLanes = 16;

// e^x, within 2 ulp. Below -87.33 it is 0 (so e^-inf is exactly 0), above 88.37 it saturates, NaN stays NaN.
// Range reduction to |r| <= ln2/2 and a polynomial of degree 6, as in Cephes' expf.
inline f32x16 exp(f32x16 x) {
  const f32x16 clamped = max(splat(-87.336544f), min(splat(88.3762626647949f), x));
  const f32x16 n = round(mul(clamped, splat(1.44269504088896341f)));
  f32x16 r = fma(n, splat(-0.693359375f), clamped);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = add(fma(p, mul(r, r), r), splat(1.0f));
  return zero_where_less(x, -87.336544f, scale_by_power_of_two(p, n));
}

// x * sigmoid(x).
inline f32x16 silu(f32x16 x) { return div(x, add(splat(1.0f), exp(sub(splat(0.0f), x)))); }

inline float bf16_to_float(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}

// Rounds to nearest, ties to even, as torch does; NaN stays NaN.
inline uint16_t float_to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

}  // namespace aios
