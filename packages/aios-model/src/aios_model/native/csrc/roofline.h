// The limits of a machine, for one thread: how fast it reads, multiplies floats and multiplies bytes.
//
// Each function keeps one unit busy and nothing else, with enough independent chains that latency does not show. Callers
// take the time, and run one per thread to see what the threads have together.
#pragma once

#include <cstdint>

#include "simd.h"

namespace aios {

// A multiply-add takes 4 to 5 cycles and two of them start in each; with the 10 chains that this makes, Sapphire Rapids
// reaches 600 GOP/s of byte products, with 12 it reaches 700. On AVX2 a chain is two of the sixteen registers.
#if defined(AIOS_ISA_AVX512)
constexpr int kChains = 12;
#else
constexpr int kChains = 5;
#endif

// Multiplications and additions, counted apart, of one round of the chains.
constexpr int64_t kFloatOperations = int64_t{2} * kChains * kLanes;
constexpr int64_t kByteOperations = int64_t{2} * kChains * kLanes * 4;

// Reads `num_bytes` (the last few of 512 are left out) once, front to back; returns something that depends on them all.
inline int32_t read_once(const void* data, int64_t num_bytes) {
  constexpr int kStreams = 8;
  const uint8_t* bytes = static_cast<const uint8_t*>(data);
  bytes64 seen[kStreams];
  for (bytes64& each : seen) each = splat_bytes(0);
  for (int64_t i = 0; i + 64 * kStreams <= num_bytes; i += 64 * kStreams) {
    for (int s = 0; s < kStreams; ++s) seen[s] = bits_or(seen[s], load_bytes(bytes + i + 64 * s));
  }
  for (int s = 1; s < kStreams; ++s) seen[0] = bits_or(seen[0], seen[s]);
  return sum(dot4(splat(int32_t{0}), seen[0], splat_bytes(1)));
}

// At least `operations` float32 operations as fused multiply-adds; returns how many.
inline int64_t multiply_floats(int64_t operations) {
  f32x16 chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = splat(1.0f + 0.01f * static_cast<float>(c));
  // Converges to 1: never denormal, never infinite.
  const f32x16 factor = splat(0.999f), summand = splat(0.001f);
  int64_t done = 0;
  for (; done < operations; done += kFloatOperations) {
    for (f32x16& each : chain) each = fma(each, factor, summand);
  }
  volatile float sink = 0.0f;
  for (const f32x16& each : chain) sink = sink + sum(each);
  return done;
}

// At least `operations` operations of 8-bit dot products with 32-bit sums; returns how many.
inline int64_t multiply_bytes(int64_t operations) {
  i32x16 chain[kChains];
  for (int c = 0; c < kChains; ++c) chain[c] = splat(static_cast<int32_t>(c));
  const bytes64 x = splat_bytes(3), y = splat_bytes(2);
  int64_t done = 0;
  for (; done < operations; done += kByteOperations) {
    for (i32x16& each : chain) each = dot4(each, x, y);
  }
  volatile int32_t sink = 0;
  for (const i32x16& each : chain) sink = sink + sum(each);
  return done;
}

}  // namespace aios
