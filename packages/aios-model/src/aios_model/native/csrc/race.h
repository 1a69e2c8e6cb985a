// A draw in proportion to weights as a race: the token with the largest weight / exponential noise wins.
//
// Few tokens can win at all. A cheap upper bound of a token's score, without logarithm or division, sorts out the
// others; the score of what is left is exact, so the winner does not depend on what else was looked at, or when.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

#include "noise.h"

namespace aios {

struct Winner { float score = 0.0f; int32_t token = std::numeric_limits<int32_t>::max(); };

// Of equal scores the lower token wins.
inline bool beats(const Winner& a, const Winner& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

class Race {
 public:
  explicit Race(NoiseKeys keys) : keys_(keys), limit_(splat(0.0f)) {}

  const Winner& winner() const { return best_; }

  // The lanes whose tokens might still win, given upper bounds of their weights. The exponential number is at least
  // the uniform one, bits / 2^31.
  uint32_t contenders(i32x16 tokens, f32x16 bounds) const {
    return lanes_at_least(bounds, mul(to_float(noise_bits(keys_, tokens)), limit_));
  }

  void run(i32x16 tokens, f32x16 weights, uint32_t lanes) {
    float scores[kLanes];
    int32_t names[kLanes];
    store(scores, div(weights, exponential_noise(noise_bits(keys_, tokens))));
    store(names, tokens);
    for (; lanes; lanes &= lanes - 1) {
      const int lane = std::countr_zero(lanes);
      if (const Winner one{scores[lane], names[lane]}; beats(one, best_)) best_ = one;
    }
    // A part in 512 off, for all that bounds are rounded.
    limit_ = splat(best_.score * (0x1p-31f * (1.0f - 0x1p-9f)));
  }

 private:
  NoiseKeys keys_;
  f32x16 limit_;  // a bound that is less than this times `bits` cannot win
  Winner best_;
};

// Upper bounds of e^(x - largest) / temperature): between powers of two, 2^y lies below its chord, which is what the
// bits of a float interpolate. At most 6% too high.
class WeightBound {
 public:
  WeightBound(float largest, float temperature)
      : largest_(splat(largest)), slope_(splat(1.44269504088896341f * 0x1p23f / temperature)) {}

  f32x16 operator()(f32x16 logits) const {
    const f32x16 bits = fma(sub(logits, largest_), slope_, splat(127.0f * 0x1p23f));
    return from_bits(round_to_int(max(bits, splat(0.0f))));
  }

 private:
  f32x16 largest_, slope_;
};

}  // namespace aios
