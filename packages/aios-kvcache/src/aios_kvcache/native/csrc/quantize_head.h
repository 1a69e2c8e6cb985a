// How numbers of one head become 8-bit codes: those of keys and values when they are stored, of queries when they meet
// them.
#pragma once

#include "simd.h"

namespace aios {

constexpr int kMaxHeadDim = 1024;

// What is smaller than this everywhere counts as zero: 127 / amax would overflow.
constexpr float kSmallestAmax = 1e-30f;

// Sixteen numbers of p, zeros where the head has ended.
inline f32x16 load_part(const float* p, int left) { return left >= kLanes ? load(p) : load_first(p, left); }

// code = round_half_even(x * (127 / amax)), and zeros up to the next sixteen. Returns the scale, amax / 127. NaN and
// infinity make the scale so, and thereby all that uses it.
inline float quantize_head(const float* x, int head_dim, int8_t* codes) {
  f32x16 top = splat(0.0f);
  for (int i = 0; i < head_dim; i += kLanes) top = max_magnitude(top, load_part(x + i, head_dim - i));
  const float amax = largest_magnitude(top);
  const bool zero = amax < kSmallestAmax;
  const f32x16 inverse = splat(zero ? 0.0f : 127.0f / amax);
  for (int i = 0; i < head_dim; i += kLanes)
    store_low_bytes(codes + i, round_to_int(mul(load_part(x + i, head_dim - i), inverse)));
  return zero ? 0.0f : amax / 127.0f;
}

}  // namespace aios
