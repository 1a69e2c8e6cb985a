// The noise of `aios_model/sampling/noise.py`: a pure function of (seed, position, token), sixteen tokens at once.
//
// The hash is that one's bit for bit; the logarithm behind the exponential numbers may differ in the last bits.
#pragma once

#include <cstdint>

#include "simd_math.h"

namespace aios {

struct NoiseKeys { int32_t first, second; };

// The finaliser of splitmix64 (Steele, Lea, Flood, 2014).
inline uint64_t mix64(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

inline NoiseKeys noise_keys(int64_t seed, int64_t position) {
  constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
  const uint64_t by_seed = mix64(static_cast<uint64_t>(seed) + kGolden);
  const uint64_t mixed = mix64(by_seed + static_cast<uint64_t>(position) * kGolden);
  return {static_cast<int32_t>(mixed), static_cast<int32_t>(mixed >> 32)};
}

// 31 random bits per token ("lowbias32", the second key entering halfway): 2^31 times a uniform number.
inline i32x16 noise_bits(NoiseKeys keys, i32x16 tokens) {
  i32x16 bits = add(tokens, splat(keys.first));
  bits = mul(bits_xor(bits, lanes_right<16>(bits)), splat(int32_t{0x21f0aaad}));
  bits = bits_xor(bits, splat(keys.second));
  bits = mul(bits_xor(bits, lanes_right<15>(bits)), splat(int32_t{0x735a2d97}));
  return lanes_and(bits_xor(bits, lanes_right<15>(bits)), splat(int32_t{0x7fffffff}));
}

// Exponential numbers of mean one: -log1p(-u), written as Kahan did, since small results decide the race.
inline f32x16 exponential_noise(i32x16 bits) {
  constexpr float kLargestBelowOne = 0x1.fffffep-1f, kUniformScale = 0x1.fffffep-32f;  // 2^-31 times the former
  const f32x16 uniform = mul(add(to_float(bits), splat(0.5f)), splat(kUniformScale));
  const f32x16 rounded = min(sub(splat(1.0f), uniform), splat(kLargestBelowOne));
  return mul(div(log(rounded), sub(rounded, splat(1.0f))), uniform);
}

}  // namespace aios
