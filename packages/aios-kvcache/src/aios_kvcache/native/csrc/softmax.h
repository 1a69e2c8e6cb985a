// Softmax in pieces: of one segment of the context, and of several segments merged (the "online" softmax of Milakov and
// Gimelshein, arXiv 1805.02867). Decodes and chunks of prompts share these lines, and so every rounding.
#pragma once

#include <limits>

#include "attention_kernels.h"

namespace aios {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// What a query row knows after some segments: the largest score, the sum of e^(score - largest), and the values
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

// Tokens of a segment.
struct Range {
  int begin, end;
  bool empty() const { return begin >= end; }
  int first_sixteen() const { return begin / kLanes; }
  int end_sixteen() const { return (end + kLanes - 1) / kLanes; }
};

// The first of two passes over one row's scores, [kSegment]: what is not `visible` becomes -infinity; returns the
// largest. With scales (int8), scores are those of the codes, and are multiplied here. The second pass has to wait for
// the result: callers run each pass over a few rows before the next.
inline float mask_scores(float* scores, Range visible, const float* key_scales) {
  const int first = visible.first_sixteen(), end = visible.end_sixteen();
  f32x16 top = splat(-kInfinity);
  for (int i = first; i < end; ++i) {
    const int begins = visible.begin - i * kLanes, ends = visible.end - i * kLanes;
    f32x16 s = load(scores + i * kLanes);
    if (key_scales || begins > 0 || ends < kLanes) {
      if (key_scales) s = mul(s, load(key_scales + i * kLanes));
      // Behind the last token lie leftovers: whatever their scores are, they are replaced.
      s = first_lanes(begins, splat(-kInfinity), first_lanes(ends, s, splat(-kInfinity)));
      store(scores + i * kLanes, s);
    }
    top = max(top, s);
  }
  return largest(top);
}

// The second pass: weights e^(score - largest) within `visible`, zeros elsewhere within the sixteens of `tile`, which
// contains it. With scales (int8), weights are multiplied by those of the values, after they have been summed.
inline void weigh_scores(float* scores, Range visible, Range tile, const float* value_scales, float largest,
                         Partial partial) {
  const int first = visible.first_sixteen(), end = visible.end_sixteen();
  const f32x16 shift = splat(largest);
  f32x16 total = splat(0.0f);
  for (int i = first; i < end; ++i) {
    f32x16 p = exp(sub(load(scores + i * kLanes), shift));
    total = add(total, p);
    if (value_scales) p = mul(p, load(value_scales + i * kLanes));
    store(scores + i * kLanes, p);
  }
  for (int i = tile.first_sixteen(); i < first; ++i) store(scores + i * kLanes, splat(0.0f));
  for (int i = end; i < tile.end_sixteen(); ++i) store(scores + i * kLanes, splat(0.0f));
  partial.largest() = largest;
  partial.sum() = sum(total);
}

// `into` takes in the segment that follows. A score of NaN makes the row NaN: it reaches the sum.
inline void merge(Partial into, Partial segment, int width) {
  const float largest = segment.largest() > into.largest() ? segment.largest() : into.largest();
  float factors[kLanes];
  store(factors, exp(first_lanes(1, splat(into.largest() - largest), splat(segment.largest() - largest))));
  const f32x16 before = splat(factors[0]), now = splat(factors[1]);
  // The first vector holds the sum (and the largest score, which is set behind it).
  for (int i = 0; i < kLanes + width; i += kLanes)
    store(into.numbers + i, fma(load(segment.numbers + i), now, mul(load(into.numbers + i), before)));
  into.largest() = largest;
}

// The row's output. Adding zero turns -0 into 0: a product that underflowed may have left -0, or 0 where the row was
// computed beside rows that see more.
inline void finish(Partial partial, int head_dim, float* out) {
  const f32x16 inverse = splat(1.0f / partial.sum());
  for (int i = 0; i < head_dim; i += kLanes) {
    const f32x16 x = add(mul(load(partial.values() + i), inverse), splat(0.0f));
    if (i + kLanes <= head_dim) store(out + i, x);
    else store_first(out + i, head_dim - i, x);
  }
}

}  // namespace aios
