// AVX-512 with VNNI: sixteen floats are one register. See simd.h for what the names mean.
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace aios {

using f32x16 = __m512;
using i32x16 = __m512i;
using bytes64 = __m512i;

inline f32x16 load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, f32x16 x) { _mm512_storeu_ps(p, x); }
inline f32x16 splat(float x) { return _mm512_set1_ps(x); }
inline f32x16 add(f32x16 a, f32x16 b) { return _mm512_add_ps(a, b); }
inline f32x16 sub(f32x16 a, f32x16 b) { return _mm512_sub_ps(a, b); }
inline f32x16 mul(f32x16 a, f32x16 b) { return _mm512_mul_ps(a, b); }
inline f32x16 div(f32x16 a, f32x16 b) { return _mm512_div_ps(a, b); }
// a * b + c, rounded once (on every instruction set that has it).
inline f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return _mm512_fmadd_ps(a, b, c); }
// If either is NaN the result is the second operand: callers put what must stay NaN there.
inline f32x16 max(f32x16 a, f32x16 b) { return _mm512_max_ps(a, b); }
inline f32x16 min(f32x16 a, f32x16 b) { return _mm512_min_ps(a, b); }
inline f32x16 round(f32x16 x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline f32x16 abs(f32x16 x) { return _mm512_abs_ps(x); }

// x * 2^n for whole n that leave the result a normal number.
inline f32x16 scale_by_power_of_two(f32x16 x, f32x16 n) { return _mm512_scalef_ps(x, n); }
// 0 in the lanes where x < bound, value elsewhere (also where x is NaN).
inline f32x16 zero_where_less(f32x16 x, float bound, f32x16 value) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_NLT_UQ), value);
}
// The first n lanes of a, the others of b; n may be 0 to 16 and beyond either end.
inline f32x16 first_lanes(int n, f32x16 a, f32x16 b) {
  const __mmask16 mask = n <= 0 ? 0 : n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
  return _mm512_mask_mov_ps(b, mask, a);
}
inline f32x16 load_first(const float* p, int n) {
  const __mmask16 mask = n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
  return _mm512_maskz_loadu_ps(mask, p);
}
inline void store_first(float* p, int n, f32x16 x) {
  const __mmask16 mask = n >= 16 ? 0xffff : static_cast<__mmask16>((1u << n) - 1);
  _mm512_mask_storeu_ps(p, mask, x);
}

// Lanes are added in halves: (i, i + 8), then (i, i + 4), (i, i + 2), (0, 1).
inline float sum(f32x16 x) {
  const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
inline float largest(f32x16 x) { return _mm512_reduce_max_ps(x); }
// The largest magnitude; NaN if any lane is NaN: as bits, magnitudes order like integers with NaN on top.
inline float largest_magnitude(f32x16 x) {
  const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
  const uint32_t top = _mm512_reduce_max_epu32(bits);
  float value;
  __builtin_memcpy(&value, &top, sizeof value);
  return value;
}
// Lane by lane, the operand of larger magnitude, as a magnitude; NaN wins.
inline f32x16 max_magnitude(f32x16 a, f32x16 b) {
  const __m512i mask = _mm512_set1_epi32(0x7fffffff);
  return _mm512_castsi512_ps(_mm512_max_epu32(_mm512_and_si512(_mm512_castps_si512(a), mask),
                                              _mm512_and_si512(_mm512_castps_si512(b), mask)));
}

// Sixteen narrow numbers, widened.
inline f32x16 load_bf16(const uint16_t* p) {
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}
inline f32x16 load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline f32x16 load_i8(const int8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
inline f32x16 load_u8(const uint8_t* p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
}
// FP8 E4M3 (no infinities): shifted into the fields of a half, which is 2^8 too small; NaN (0x7f) is not handled.
inline f32x16 load_e4m3(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x80)), 8);
  const __m256i rest = _mm256_slli_epi16(_mm256_and_si256(wide, _mm256_set1_epi16(0x7f)), 7);
  return _mm512_mul_ps(_mm512_cvtph_ps(_mm256_or_si256(sign, rest)), _mm512_set1_ps(256.0f));
}
// Rounds to nearest, ties to even; NaN stays NaN.
inline void store_bf16(uint16_t* p, f32x16 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  up = _mm512_mask_or_epi32(up, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), bits, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(up, 16)));
}

inline i32x16 splat(int32_t x) { return _mm512_set1_epi32(x); }
inline i32x16 add(i32x16 a, i32x16 b) { return _mm512_add_epi32(a, b); }
inline f32x16 to_float(i32x16 x) { return _mm512_cvtepi32_ps(x); }
inline i32x16 round_to_int(f32x16 x) { return _mm512_cvtps_epi32(x); }
inline void store(int32_t* p, i32x16 x) { _mm512_storeu_si512(p, x); }
inline i32x16 load(const int32_t* p) { return _mm512_loadu_si512(p); }
// The low byte of every lane.
inline void store_low_bytes(int8_t* p, i32x16 x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
}
inline int32_t sum(i32x16 x) { return _mm512_reduce_add_epi32(x); }

inline bytes64 load_bytes(const void* p) { return _mm512_loadu_si512(p); }
inline void store_bytes(void* p, bytes64 x) { _mm512_storeu_si512(p, x); }
inline bytes64 splat_bytes(uint8_t x) { return _mm512_set1_epi8(static_cast<char>(x)); }
inline bytes64 bits_and(bytes64 a, bytes64 b) { return _mm512_and_si512(a, b); }
inline bytes64 bits_or(bytes64 a, bytes64 b) { return _mm512_or_si512(a, b); }
// Shifts within pairs of bytes: callers mask away what crosses from one byte into the other.
template <int n>
inline bytes64 shift_right(bytes64 x) { return _mm512_srli_epi16(x, n); }
template <int n>
inline bytes64 shift_left(bytes64 x) { return _mm512_slli_epi16(x, n); }

// Four bytes repeated in every lane.
inline bytes64 splat_quad(const int8_t* p) {
  int32_t quad;
  __builtin_memcpy(&quad, p, sizeof quad);
  return _mm512_set1_epi32(quad);
}
// acc + the product of four unsigned and four signed bytes per lane, exact.
// Written as assembly since GCC 12 copies the accumulator in front of every use of the intrinsic, and back behind it.
inline i32x16 dot4(i32x16 acc, bytes64 u, bytes64 s) {
  asm("vpdpbusd %2, %1, %0" : "+v"(acc) : "v"(u), "v"(s));
  return acc;
}

// Byte i of every lane, as a float.
template <int i>
inline f32x16 byte_to_float(bytes64 x) {
  return _mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srli_epi32(x, 8 * i), _mm512_set1_epi32(0xff)));
}

inline void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }
inline void pause() { _mm_pause(); }

}  // namespace aios
