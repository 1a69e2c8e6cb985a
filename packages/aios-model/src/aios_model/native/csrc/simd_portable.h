// Plain C++ that a compiler may vectorise: for ARM (which has fused multiply-add) and as the last resort elsewhere.
// See simd.h for what the names mean.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "half.h"

namespace aios {

struct f32x16 { float v[16]; };
struct i32x16 { int32_t v[16]; };
struct bytes64 { uint8_t v[64]; };

#define AIOS_LANES(expression)                \
  f32x16 out;                                 \
  for (int i = 0; i < 16; ++i) out.v[i] = (expression); \
  return out

inline f32x16 load(const float* p) { f32x16 out; std::memcpy(out.v, p, sizeof out.v); return out; }
inline void store(float* p, const f32x16& x) { std::memcpy(p, x.v, sizeof x.v); }
inline f32x16 splat(float x) { AIOS_LANES(x); }
inline f32x16 add(const f32x16& x, const f32x16& y) { AIOS_LANES(x.v[i] + y.v[i]); }
inline f32x16 sub(const f32x16& x, const f32x16& y) { AIOS_LANES(x.v[i] - y.v[i]); }
inline f32x16 mul(const f32x16& x, const f32x16& y) { AIOS_LANES(x.v[i] * y.v[i]); }
inline f32x16 div(const f32x16& x, const f32x16& y) { AIOS_LANES(x.v[i] / y.v[i]); }
inline f32x16 fma(const f32x16& x, const f32x16& y, const f32x16& z) {
#if defined(__FP_FAST_FMAF)
  AIOS_LANES(std::fmaf(x.v[i], y.v[i], z.v[i]));
#else
  AIOS_LANES(x.v[i] * y.v[i] + z.v[i]);  // without the instruction a fused product would be a call into libm
#endif
}
inline f32x16 max(const f32x16& x, const f32x16& y) { AIOS_LANES(x.v[i] > y.v[i] ? x.v[i] : y.v[i]); }
inline f32x16 min(const f32x16& x, const f32x16& y) { AIOS_LANES(x.v[i] < y.v[i] ? x.v[i] : y.v[i]); }
inline f32x16 round(const f32x16& x) { AIOS_LANES(std::nearbyintf(x.v[i])); }
inline f32x16 abs(const f32x16& x) { AIOS_LANES(std::fabs(x.v[i])); }

inline f32x16 scale_by_power_of_two(const f32x16& x, const f32x16& n) {
  f32x16 out;
  for (int i = 0; i < 16; ++i) {
    // NaN has no exponent to compute with; x is NaN too then, and stays so.
    const int32_t exponent = n.v[i] == n.v[i] ? (static_cast<int32_t>(n.v[i]) + 127) << 23 : 127 << 23;
    float power;
    std::memcpy(&power, &exponent, sizeof power);
    out.v[i] = x.v[i] * power;
  }
  return out;
}
inline f32x16 zero_where_less(const f32x16& x, float bound, const f32x16& value) {
  AIOS_LANES(x.v[i] < bound ? 0.0f : value.v[i]);
}
inline f32x16 first_lanes(int n, const f32x16& x, const f32x16& y) { AIOS_LANES(i < n ? x.v[i] : y.v[i]); }
inline f32x16 load_first(const float* p, int n) { AIOS_LANES(i < n ? p[i] : 0.0f); }
inline void store_first(float* p, int n, const f32x16& x) {
  for (int i = 0; i < 16 && i < n; ++i) p[i] = x.v[i];
}

inline float sum(f32x16 x) {
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) x.v[i] += x.v[i + half];
  return x.v[0];
}
inline float largest(const f32x16& x) {
  float top = x.v[0];
  for (int i = 1; i < 16; ++i) top = top > x.v[i] ? top : x.v[i];
  return top;
}
inline f32x16 max_magnitude(const f32x16& x, const f32x16& y) {
  f32x16 out;
  for (int i = 0; i < 16; ++i) {
    uint32_t a, b;
    std::memcpy(&a, &x.v[i], sizeof a);
    std::memcpy(&b, &y.v[i], sizeof b);
    a &= 0x7fffffffu;
    b &= 0x7fffffffu;
    const uint32_t top = a > b ? a : b;
    std::memcpy(&out.v[i], &top, sizeof top);
  }
  return out;
}
inline float largest_magnitude(f32x16 x) {
  f32x16 folded = max_magnitude(x, x);
  uint32_t top = 0;
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &folded.v[i], sizeof bits);
    top = top > bits ? top : bits;
  }
  float value;
  std::memcpy(&value, &top, sizeof value);
  return value;
}

inline f32x16 load_bf16(const uint16_t* p) {
  f32x16 out;
  for (int i = 0; i < 16; ++i) {
    const uint32_t bits = static_cast<uint32_t>(p[i]) << 16;
    std::memcpy(&out.v[i], &bits, sizeof bits);
  }
  return out;
}
inline f32x16 load_f16(const uint16_t* p) { AIOS_LANES(half_to_float(p[i])); }
inline f32x16 load_i8(const int8_t* p) { AIOS_LANES(static_cast<float>(p[i])); }
inline f32x16 load_u8(const uint8_t* p) { AIOS_LANES(static_cast<float>(p[i])); }
inline f32x16 load_e4m3(const uint8_t* p) {
  AIOS_LANES(256.0f * half_to_float(static_cast<uint16_t>((p[i] & 0x80) << 8 | (p[i] & 0x7f) << 7)));
}
inline void store_bf16(uint16_t* p, const f32x16& x) {
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &x.v[i], sizeof bits);
    const bool nan = x.v[i] != x.v[i];
    p[i] = static_cast<uint16_t>((nan ? bits | 0x400000u : bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
  }
}

inline i32x16 splat(int32_t x) { i32x16 out; for (int32_t& lane : out.v) lane = x; return out; }
inline i32x16 add(const i32x16& x, const i32x16& y) {
  i32x16 out;
  for (int i = 0; i < 16; ++i)  // unsigned, since hashes overflow
    out.v[i] = static_cast<int32_t>(static_cast<uint32_t>(x.v[i]) + static_cast<uint32_t>(y.v[i]));
  return out;
}
inline f32x16 to_float(const i32x16& x) { AIOS_LANES(static_cast<float>(x.v[i])); }
inline i32x16 round_to_int(const f32x16& x) {
  i32x16 out;
  for (int i = 0; i < 16; ++i) out.v[i] = x.v[i] == x.v[i] ? static_cast<int32_t>(std::nearbyintf(x.v[i])) : INT32_MIN;
  return out;
}
inline void store(int32_t* p, const i32x16& x) { std::memcpy(p, x.v, sizeof x.v); }
inline i32x16 load(const int32_t* p) { i32x16 out; std::memcpy(out.v, p, sizeof out.v); return out; }
inline void store_low_bytes(int8_t* p, const i32x16& x) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(x.v[i]);
}
inline int32_t sum(const i32x16& x) {
  int32_t total = 0;
  for (int32_t lane : x.v) total += lane;
  return total;
}

inline bytes64 load_bytes(const void* p) { bytes64 out; std::memcpy(out.v, p, sizeof out.v); return out; }
inline void store_bytes(void* p, const bytes64& x) { std::memcpy(p, x.v, sizeof x.v); }
inline bytes64 splat_bytes(uint8_t x) { bytes64 out; std::memset(out.v, x, sizeof out.v); return out; }
inline bytes64 bits_and(bytes64 x, const bytes64& y) { for (int i = 0; i < 64; ++i) x.v[i] &= y.v[i]; return x; }
inline bytes64 bits_or(bytes64 x, const bytes64& y) { for (int i = 0; i < 64; ++i) x.v[i] |= y.v[i]; return x; }
template <int n>
inline bytes64 shift_right(const bytes64& x) {
  bytes64 out;
  for (int i = 0; i < 64; ++i) out.v[i] = static_cast<uint8_t>(x.v[i] >> n);
  return out;
}
template <int n>
inline bytes64 shift_left(const bytes64& x) {
  bytes64 out;
  for (int i = 0; i < 64; ++i) out.v[i] = static_cast<uint8_t>(x.v[i] << n);
  return out;
}

inline bytes64 splat_quad(const int8_t* p) {
  bytes64 out;
  for (int i = 0; i < 64; ++i) out.v[i] = static_cast<uint8_t>(p[i % 4]);
  return out;
}
inline i32x16 dot4(i32x16 acc, const bytes64& u, const bytes64& s) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 4; ++j) acc.v[i] += static_cast<int32_t>(u.v[4 * i + j]) * static_cast<int8_t>(s.v[4 * i + j]);
  return acc;
}

template <int i>
inline f32x16 byte_to_float(const bytes64& x) {
  f32x16 out;
  for (int lane = 0; lane < 16; ++lane) out.v[lane] = static_cast<float>(x.v[4 * lane + i]);
  return out;
}

#undef AIOS_LANES

inline void prefetch(const void* p) { __builtin_prefetch(p); }
inline void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

}  // namespace aios
