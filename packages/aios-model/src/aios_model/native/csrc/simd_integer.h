// More of simd.h: sixteen 32-bit numbers as bits (hashes, the inside of a float), and sets of lanes.
//
// A set of lanes is an integer whose bit i stands for lane i, on every instruction set.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace aios {

#if defined(AIOS_ISA_AVX512)

inline i32x16 to_bits(f32x16 x) { return _mm512_castps_si512(x); }
inline f32x16 from_bits(i32x16 x) { return _mm512_castsi512_ps(x); }
inline i32x16 sub(i32x16 a, i32x16 b) { return _mm512_sub_epi32(a, b); }
inline i32x16 mul(i32x16 a, i32x16 b) { return _mm512_mullo_epi32(a, b); }
inline i32x16 bits_xor(i32x16 a, i32x16 b) { return _mm512_xor_si512(a, b); }
inline i32x16 lanes_and(i32x16 a, i32x16 b) { return _mm512_and_si512(a, b); }
template <int n>
inline i32x16 lanes_left(i32x16 x) { return _mm512_slli_epi32(x, n); }
template <int n>
inline i32x16 lanes_right(i32x16 x) { return _mm512_srli_epi32(x, n); }
template <int n>
inline i32x16 lanes_right_signed(i32x16 x) { return _mm512_srai_epi32(x, n); }

inline uint32_t lanes_at_least(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_GE_OQ); }
inline bool any_nan(f32x16 a, f32x16 b) { return _mm512_cmp_ps_mask(a, b, _CMP_UNORD_Q) != 0; }
inline void pack_lanes(float* to, f32x16 x, uint32_t lanes) {
  // In a register first: to compress straight into memory takes AMD's cores over a hundred cycles.
  _mm512_storeu_ps(to, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), x));
}
inline void pack_lanes(int32_t* to, i32x16 x, uint32_t lanes) {
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(static_cast<__mmask16>(lanes), x));
}

#else

#if defined(AIOS_ISA_AVX2)

inline i32x16 to_bits(f32x16 x) { return {_mm256_castps_si256(x.a), _mm256_castps_si256(x.b)}; }
inline f32x16 from_bits(i32x16 x) { return {_mm256_castsi256_ps(x.a), _mm256_castsi256_ps(x.b)}; }
inline i32x16 sub(i32x16 x, i32x16 y) { return {_mm256_sub_epi32(x.a, y.a), _mm256_sub_epi32(x.b, y.b)}; }
inline i32x16 mul(i32x16 x, i32x16 y) { return {_mm256_mullo_epi32(x.a, y.a), _mm256_mullo_epi32(x.b, y.b)}; }
inline i32x16 bits_xor(i32x16 x, i32x16 y) { return {_mm256_xor_si256(x.a, y.a), _mm256_xor_si256(x.b, y.b)}; }
inline i32x16 lanes_and(i32x16 x, i32x16 y) { return {_mm256_and_si256(x.a, y.a), _mm256_and_si256(x.b, y.b)}; }
template <int n>
inline i32x16 lanes_left(i32x16 x) { return {_mm256_slli_epi32(x.a, n), _mm256_slli_epi32(x.b, n)}; }
template <int n>
inline i32x16 lanes_right(i32x16 x) { return {_mm256_srli_epi32(x.a, n), _mm256_srli_epi32(x.b, n)}; }
template <int n>
inline i32x16 lanes_right_signed(i32x16 x) { return {_mm256_srai_epi32(x.a, n), _mm256_srai_epi32(x.b, n)}; }

inline uint32_t lanes_at_least(f32x16 x, f32x16 y) {
  return static_cast<uint32_t>(_mm256_movemask_ps(_mm256_cmp_ps(x.a, y.a, _CMP_GE_OQ)) |
                               _mm256_movemask_ps(_mm256_cmp_ps(x.b, y.b, _CMP_GE_OQ)) << 8);
}
inline bool any_nan(f32x16 x, f32x16 y) {
  return _mm256_movemask_ps(_mm256_or_ps(_mm256_cmp_ps(x.a, y.a, _CMP_UNORD_Q),
                                         _mm256_cmp_ps(x.b, y.b, _CMP_UNORD_Q))) != 0;
}

#else

#define AIOS_INTEGERS(expression)                                                   \
  i32x16 out;                                                                       \
  for (int i = 0; i < 16; ++i) out.v[i] = static_cast<int32_t>(expression); \
  return out
#define AIOS_BITS(lane) static_cast<uint32_t>(lane)  // unsigned numbers may overflow

inline i32x16 to_bits(const f32x16& x) { i32x16 out; std::memcpy(out.v, x.v, sizeof out.v); return out; }
inline f32x16 from_bits(const i32x16& x) { f32x16 out; std::memcpy(out.v, x.v, sizeof out.v); return out; }
inline i32x16 sub(const i32x16& x, const i32x16& y) { AIOS_INTEGERS(AIOS_BITS(x.v[i]) - AIOS_BITS(y.v[i])); }
inline i32x16 mul(const i32x16& x, const i32x16& y) { AIOS_INTEGERS(AIOS_BITS(x.v[i]) * AIOS_BITS(y.v[i])); }
inline i32x16 bits_xor(const i32x16& x, const i32x16& y) { AIOS_INTEGERS(x.v[i] ^ y.v[i]); }
inline i32x16 lanes_and(const i32x16& x, const i32x16& y) { AIOS_INTEGERS(x.v[i] & y.v[i]); }
template <int n>
inline i32x16 lanes_left(const i32x16& x) { AIOS_INTEGERS(AIOS_BITS(x.v[i]) << n); }
template <int n>
inline i32x16 lanes_right(const i32x16& x) { AIOS_INTEGERS(AIOS_BITS(x.v[i]) >> n); }
template <int n>
inline i32x16 lanes_right_signed(const i32x16& x) { AIOS_INTEGERS(x.v[i] >> n); }

inline uint32_t lanes_at_least(const f32x16& x, const f32x16& y) {
  uint32_t lanes = 0;
  for (int i = 0; i < 16; ++i) lanes |= static_cast<uint32_t>(x.v[i] >= y.v[i]) << i;
  return lanes;
}
inline bool any_nan(const f32x16& x, const f32x16& y) {
  int found = 0;
  for (int i = 0; i < 16; ++i) found |= (x.v[i] != x.v[i]) | (y.v[i] != y.v[i]);
  return found != 0;
}

#undef AIOS_INTEGERS
#undef AIOS_BITS

#endif

template <class Number, class Vector>
inline void pack_lanes(Number* to, const Vector& x, uint32_t lanes) {
  Number all[16];
  store(all, x);
  for (; lanes; lanes &= lanes - 1) *to++ = all[std::countr_zero(lanes)];
}

#endif

// What the names above do:
//   lanes_left, lanes_right, lanes_right_signed   shift every lane by n bits, `signed` drawing in copies of the sign
//   lanes_at_least(a, b)       the lanes where a >= b; not where either is NaN
//   any_nan(a, b)              whether any lane of either is NaN
//   pack_lanes(to, x, lanes)   writes the chosen lanes side by side, in order; may write all of sixteen places

inline i32x16 lane_numbers() {
  alignas(64) static constexpr int32_t kNumbers[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return load(kNumbers);
}

}  // namespace aios
