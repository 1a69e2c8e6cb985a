// FP8 E4M3 (Micikevicius et al. 2022, arXiv 2209.05433): a sign, four bits of exponent with a bias of 7, three of
// fraction. The largest number is 448, the smallest 2^-9; there is no infinity; 0x7f and 0xff are NaN.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd.h"

namespace aios {

constexpr float kLargestE4m3 = 448.0f;

// Rounds to nearest, ties to even. What is larger than 448, infinity included, becomes 448; NaN stays NaN. No branches:
// compilers make vectors of it.
inline uint8_t float_to_e4m3(float x) {
  constexpr uint32_t kBias = 120 << 3;   // float32's exponents have a bias of 127
  constexpr float kWhole = 16384.0f;     // one unit in its last place is 2^-9
  constexpr float kNormal = 0.015625f;   // 2^-6; what is smaller has no leading one
  uint32_t bits, magnitude, whole, low;
  std::memcpy(&bits, &x, sizeof bits);
  const float size = std::fabs(x), kept = size < kLargestE4m3 ? size : kLargestE4m3, sum = kept + kWhole;
  std::memcpy(&magnitude, &kept, sizeof magnitude);
  std::memcpy(&whole, &kWhole, sizeof whole);
  std::memcpy(&low, &sum, sizeof low);
  const uint32_t normal = ((magnitude + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20) - kBias;
  const uint32_t code = size < kNormal ? low - whole : normal;
  return static_cast<uint8_t>((size == size ? code : 0x7fu) | (bits >> 24 & 0x80u));
}

// What is read, times this, is the number, exactly; attention makes up for it once per row. The seven bits under the
// sign become exponent and fraction of a half, whose conversion takes numbers without a leading one in its stride.
constexpr float kE4m3Unit = 256.0f;

#if defined(AIOS_ISA_AVX512)

// Two times sixteen numbers, one behind the other.
inline void load_e4m3_units(const uint8_t* p, f32x16& first, f32x16& second) {
  const __m512i wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  const __m512i kept = _mm512_and_si512(wide, _mm512_set1_epi16(0x017f));  // the lowest of the sign bits, and the rest
  // Where all seven bits are ones, adding one clears them.
  const __m512i next = _mm512_add_epi16(wide, _mm512_set1_epi16(1));
  const __mmask32 number = _mm512_test_epi16_mask(next, _mm512_set1_epi16(0x7f));
  const __m512i halves = _mm512_mask_slli_epi16(_mm512_set1_epi16(0x7e00), number, kept, 7);
  first = _mm512_cvtph_ps(_mm512_castsi512_si256(halves));
  second = _mm512_cvtph_ps(_mm512_extracti64x4_epi64(halves, 1));
}
inline f32x16 load_e4m3_units(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i kept = _mm256_and_si256(wide, _mm256_set1_epi16(0x017f));
  const __m256i next = _mm256_add_epi16(wide, _mm256_set1_epi16(1));
  const __mmask16 number = _mm256_test_epi16_mask(next, _mm256_set1_epi16(0x7f));
  const __m256i halves = _mm256_mask_slli_epi16(_mm256_set1_epi16(0x7e00), number, kept, 7);
  return _mm512_cvtph_ps(halves);
}

#else

#if defined(AIOS_ISA_AVX2)

inline f32x16 load_e4m3_units(const uint8_t* p) {
  const __m256i wide = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  const __m256i rest = _mm256_and_si256(wide, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_cmpeq_epi16(rest, _mm256_set1_epi16(0x7f));  // all ones, which are a NaN of halves too
  const __m256i kept = _mm256_and_si256(wide, _mm256_set1_epi16(0x017f));
  const __m256i halves = _mm256_or_si256(_mm256_slli_epi16(kept, 7), nan);
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1))};
}

#else

// As bits of a float the number is 2^120 too small; 2^8 of those are left.
inline f32x16 load_e4m3_units(const uint8_t* p) {
  f32x16 out;
  for (int i = 0; i < kLanes; ++i) {
    const uint32_t rest = p[i] & 0x7fu, bits = rest == 0x7fu ? 0x7fc00000u : rest << 20;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    const float size = value * 0x1p112f;
    out.v[i] = p[i] & 0x80u ? -size : size;
  }
  return out;
}

#endif

inline void load_e4m3_units(const uint8_t* p, f32x16& first, f32x16& second) {
  first = load_e4m3_units(p);
  second = load_e4m3_units(p + kLanes);
}

#endif

}  // namespace aios
