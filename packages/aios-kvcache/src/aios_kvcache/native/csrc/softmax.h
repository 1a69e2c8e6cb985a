// Softmax in pieces: of one segment of the context, and of several segments merged (the "online" softmax of Milakov and
// Gimelshein, arXiv 1805.02867). Decodes and chunks of prompts share these lines, and so every rounding.
//
// Scores are exponents of two: queries are multiplied by log2(e) when they are laid out, which saves every weight two
// steps.
#pragma once

#include <limits>

#include "attention_kernels.h"
#include "simd_integer.h"

namespace aios {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504088896341f;

// 2^x for scores less the largest, within 2 ulp: x exceeds zero by a rounding at most. What lies far below zero becomes
// 0, or 2^-126, which nothing notices beside the largest; NaN stays NaN. The polynomials of degree 5 have the least
// relative error among those with p(0) = 1.
inline f32x16 exp2(f32x16 x) {
#if defined(AIOS_ISA_AVX512)
  const f32x16 r = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x), 0 for -infinity
  f32x16 p = splat(1.8671305698e-3f);
  p = fma(p, r, splat(9.0170292533e-3f));
  p = fma(p, r, splat(5.5799913880e-2f));
  p = fma(p, r, splat(2.4016444994e-1f));
  p = fma(p, r, splat(6.9315131182e-1f));
  return _mm512_scalef_ps(fma(p, r, splat(1.0f)), x);  // times 2^floor(x)
#else
  const f32x16 clamped = max(splat(-126.0f), x);
  const f32x16 n = round(clamped), r = sub(clamped, n);
  f32x16 p = splat(1.3264727214e-3f);
  p = fma(p, r, splat(9.6715128125e-3f));
  p = fma(p, r, splat(5.5507337448e-2f));
  p = fma(p, r, splat(2.4022242083e-1f));
  p = fma(p, r, splat(6.9314697760e-1f));
  return scale_by_power_of_two(fma(p, r, splat(1.0f)), n);
#endif
}

// What a query row knows after some segments: the largest score, the sum of 2^(score - largest), and the values
// weighted with those. In memory: [largest, sum, 14 unused, W values].
struct Partial {
  float* numbers;
  float& largest() { return numbers[0]; }
  float& sum() { return numbers[1]; }
  float* values() { return numbers + kLanes; }
};
inline int64_t partial_size(int width) { return kLanes + width; }

inline void clear_values(Partial partial, int width) {
  for (int i = 0; i < width; i += kLanes) store(partial.values() + i, splat(0.0f));
}

inline void clear(Partial partial, int width) {
  store(partial.numbers, splat(0.0f));
  partial.largest() = -kInfinity;
  clear_values(partial, width);
}

// Tokens of a segment, or its sixteens.
struct Range {
  int begin, end;
  bool empty() const { return begin >= end; }
  Range sixteens() const { return {begin / kLanes, (end + kLanes - 1) / kLanes}; }
  int nearest(int i) const { return i < begin ? begin : i < end ? i : end - 1; }
  bool holds_all_of(int sixteen) const { return begin <= sixteen * kLanes && end >= (sixteen + 1) * kLanes; }
  // x in the lanes of a sixteen that are within, `other` elsewhere.
  f32x16 choose(int sixteen, f32x16 x, float other) const {
    return first_lanes(begin - sixteen * kLanes, splat(other), first_lanes(end - sixteen * kLanes, x, splat(other)));
  }
};

// The first of two passes over one row's scores, [kSegment]. The second has to wait for the result: callers run each
// pass over a few rows before the next.
inline float largest_score(const float* scores, Range visible) {
  const auto [first, end] = visible.sixteens();
  f32x16 top = splat(-kInfinity), other = top;
  // Behind the last token lie leftovers: whatever their scores are, they do not count.
  const auto part = [&](int i) { top = max(top, visible.choose(i, load(scores + i * kLanes), -kInfinity)); };
  int i = first;
  if (i < end && !visible.holds_all_of(i)) part(i++);
  for (; visible.holds_all_of(i + 1); i += 2) {  // two chains hide each other's latency
    top = max(top, load(scores + i * kLanes));
    other = max(other, load(scores + (i + 1) * kLanes));
  }
  for (; i < end; ++i) part(i);
  return largest(max(top, other));
}

// The larger of numbers that are not negative; NaN wins.
inline f32x16 larger_or_nan(f32x16 a, f32x16 b) {
#if defined(AIOS_ISA_AVX512)
  return from_bits(_mm512_max_epu32(to_bits(a), to_bits(b)));
#else
  return max_magnitude(a, b);
#endif
}

// The second pass: weights 2^(factor * score - largest) within `visible`, zeros elsewhere within `tile`, which contains
// it and is counted in sixteens. With scales (int8), weights are multiplied by those of the values after they have been
// summed; returns the largest of the products then.
template <bool scaled>
inline float weigh_scores(float* scores, Range visible, Range tile, float factor, const float* value_scales,
                          float largest, Partial partial) {
  const auto [first, end] = visible.sixteens();
  const f32x16 factors = splat(factor), shift = splat(-largest);
  f32x16 total = splat(0.0f), top = splat(0.0f);
  for (int i = first; i < end; ++i) {
    const bool whole = visible.holds_all_of(i);
    f32x16 x = fma(load(scores + i * kLanes), factors, shift);
    if (!whole) x = visible.choose(i, x, 0.0f);
    f32x16 p = exp2(x);
    if (!whole) p = visible.choose(i, p, 0.0f);
    total = add(total, p);
    if constexpr (scaled) {
      p = mul(p, load(value_scales + i * kLanes));
      if (!whole) p = visible.choose(i, p, 0.0f);
      top = larger_or_nan(top, p);
    }
    store(scores + i * kLanes, p);
  }
  for (int i = tile.begin; i < first; ++i) store(scores + i * kLanes, splat(0.0f));
  for (int i = end; i < tile.end; ++i) store(scores + i * kLanes, splat(0.0f));
  partial.largest() = largest;
  partial.sum() = sum(total);
  return scaled ? largest_magnitude(top) : 0.0f;
}

// `into` takes in the segment that follows. A score of NaN makes the row NaN: it reaches the sum.
inline void merge(Partial into, Partial segment, int width) {
  const float largest = segment.largest() > into.largest() ? segment.largest() : into.largest();
  float factors[kLanes];
  store(factors, exp2(first_lanes(1, splat(into.largest() - largest), splat(segment.largest() - largest))));
  const f32x16 before = splat(factors[0]), now = splat(factors[1]);
  // The first vector holds the sum (and the largest score, which is set behind it).
  for (int i = 0; i < kLanes + width; i += kLanes)
    store(into.numbers + i, fma(load(segment.numbers + i), now, mul(load(into.numbers + i), before)));
  into.largest() = largest;
}

// The row's output, values being multiples of `unit`. Adding zero turns -0 into 0: a product that underflowed may have
// left -0, or 0 where the row was computed beside rows that see more.
inline void finish(Partial partial, int head_dim, float unit, float* out) {
  const f32x16 inverse = splat(unit / partial.sum());
  for (int i = 0; i < head_dim; i += kLanes) {
    const f32x16 x = add(mul(load(partial.values() + i), inverse), splat(0.0f));
    if (i + kLanes <= head_dim) store(out + i, x);
    else store_first(out + i, head_dim - i, x);
  }
}

}  // namespace aios
