// Where the head of a ranking ends, found without sorting more than a few hundred of its items.
//
// Items are ranked by depth (how far a logit lies below the largest, over the temperature), the least first, and of
// equal ones the first given. A histogram over depths says in which bucket the head ends; only that one is looked at
// more closely. Each item counts as one, or as its weight, e^-depth.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "simd_integer.h"

namespace aios {

inline f32x16 weight_of(f32x16 depth) { return exp(sub(splat(0.0f), depth)); }
inline uint32_t first_live(int64_t left) { return left >= kLanes ? 0xffff : (1u << left) - 1; }

// The head: all items less deep than `depth`, and the first `ties` of those as deep.
struct Cut { float depth; int64_t ties; };

class HeadFinder {
 public:
  // kept: room for as many depths as will be given, in whole vectors.
  explicit HeadFinder(float* kept) : kept_(kept) {}

  // The head of n > 0 items that reaches `limit` > 0, or all of them: an item belongs to it if those before it sum to
  // less, in float64. Depths are not negative and readable in whole vectors.
  Cut find(const float* depths, int64_t n, double limit, bool by_weight) {
    by_weight_ = by_weight;
    limit_ = limit;
    before_ = 0.0;
    // Within reach of most rows' heads: 64 buckets for every factor e of probability.
    n = narrow(depths, n, [](f32x16 x) { return round(min(mul(x, splat(64.0f)), splat(kLastBucket))); });
    // As bits, numbers that are not negative order like integers.
    if (n > kSorted) n = narrow(kept_, n, [](f32x16 x) { return bit_bucket<20, 11>(x); });
    if (n > kSorted) n = narrow(kept_, n, [](f32x16 x) { return bit_bucket<9, 11>(x); });
    if (n > kSorted) n = narrow(kept_, n, [](f32x16 x) { return bit_bucket<0, 9>(x); });
    if (n <= kSorted) std::sort(kept_, kept_ + n);  // more than that are all equally deep
    return walk(n);
  }

 private:
  static constexpr int64_t kSorted = 256;
  static constexpr int kBuckets = 2048;
  static constexpr float kLastBucket = kBuckets - 1;

  template <int shift, int width>
  static f32x16 bit_bucket(f32x16 x) {
    return to_float(lanes_and(lanes_right<shift>(to_bits(x)), splat(int32_t{(1 << width) - 1})));
  }

  f32x16 amounts(f32x16 depths) const { return by_weight_ ? weight_of(depths) : splat(1.0f); }

  // Keeps the items of the one bucket in which the limit is reached, or else of the last one, in their order.
  template <class BucketOf>
  int64_t narrow(const float* depths, int64_t n, BucketOf&& bucket_of) {
    fill_buckets(depths, n, bucket_of);
    int bucket = 0, last = kBuckets - 1;
    while (last > 0 && sums_[last] == 0.0) --last;
    for (; bucket < last && before_ + sums_[bucket] < limit_; ++bucket) before_ += sums_[bucket];
    const f32x16 wanted = splat(static_cast<float>(bucket));
    int64_t kept = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const f32x16 x = load(depths + i), of = bucket_of(x);
      const uint32_t lanes = lanes_at_least(of, wanted) & lanes_at_least(wanted, of) & first_live(n - i);
      if (!lanes) continue;
      pack_lanes(kept_ + kept, x, lanes);
      kept += std::popcount(lanes);
    }
    return kept;
  }

  template <class BucketOf>
  void fill_buckets(const float* depths, int64_t n, BucketOf&& bucket_of) {
    std::fill_n(sums_, kBuckets, 0.0);
    for (int64_t i = 0; i < n; i += kLanes) {
      int32_t buckets[kLanes];
      float weights[kLanes];
      const f32x16 x = load(depths + i);
      store(buckets, round_to_int(bucket_of(x)));
      store(weights, amounts(x));
      const int live = n - i < kLanes ? static_cast<int>(n - i) : kLanes;
      for (int lane = 0; lane < live; ++lane) sums_[buckets[lane]] += weights[lane];
    }
  }

  // Along sorted items to the first that no longer belongs.
  Cut walk(int64_t n) {
    int64_t size = 0;
    while (size < n && before_ < limit_) {
      float weights[kLanes];
      store(weights, amounts(load(kept_ + size / kLanes * kLanes)));
      do before_ += weights[size++ % kLanes];
      while (size % kLanes && size < n && before_ < limit_);
    }
    const float last = kept_[size - 1];
    int64_t ties = 1;
    while (ties < size && kept_[size - 1 - ties] == last) ++ties;
    return {last, ties};
  }

  float* kept_;
  bool by_weight_ = false;
  double limit_ = 0.0, before_ = 0.0;
  double sums_[kBuckets];
};

}  // namespace aios
