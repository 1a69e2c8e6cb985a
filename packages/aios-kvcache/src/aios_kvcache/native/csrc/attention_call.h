// What decodes and chunks of prompts have in common: the call, the segments of the context, and where their pages lie.
#pragma once

#include "softmax.h"

namespace aios {

// One call of attention, over one layer's pool.
struct AttentionCall {
  KvPool pool;
  const float* q;  // [T, N * H]
  int64_t q_stride;
  int num_heads;
  float scale;
  int window;  // 0: none
  float* out;  // [T, N * H]
  int64_t out_stride;

  int group() const { return num_heads / pool.num_kv_heads; }
  bool coded() const { return static_cast<KvType>(pool.type) == KvType::kInt8; }
  // Keys and values are read as multiples of this.
  float unit() const { return static_cast<KvType>(pool.type) == KvType::kFp8 ? kE4m3Unit : 1.0f; }
  float log2_scale() const { return scale * kLog2E * unit(); }  // makes scores powers of two
  int64_t partial() const { return partial_size(value_width(pool)); }
  const float* query(int64_t row, int head) const {
    return q + row * q_stride + static_cast<int64_t>(head) * pool.head_dim;
  }
  float* output(int64_t row, int head) const {
    return out + row * out_stride + static_cast<int64_t>(head) * pool.head_dim;
  }

  // Floats that the queries of so many rows take once they are laid out: numbers, or codes and two more each.
  int64_t query_size(int64_t rows) const {
    return round_up(rows * (coded() ? round_up(pool.head_dim, 4) / 4 + 2 : pool.head_dim), kLanes);
  }

  // The first position that the token at `position` sees.
  int first_visible(int position) const { return window > 0 && position >= window ? position - window + 1 : 0; }

  // What the token at `position` sees of a segment, counted from the segment's first token.
  Range visible(int position, int segment) const {
    const int base = segment * kSegment, begin = first_visible(position) - base, end = position + 1 - base;
    return {begin > 0 ? begin : 0, end < kSegment ? end : kSegment};
  }
};

// The part of a sequence's context that is computed in one go, for one kv head.
struct Segment {
  const Sequence* sequence;
  int kv_head, index;
};

// Where the sixteens of `tokens` in a segment lie. While keys are read the values are asked for, and during those the
// keys of `upcoming`, the segment that the thread will probably read next: memory takes longer to answer than the next
// few pages to read. Any segment will do, since it is only a hint.
template <KvType type>
struct SegmentPages {
  using Number = typename Storage<type>::Number;
  const Number* keys[kSixteens];
  ValueRun<Number> runs[kSixteens];  // the values of sixteen i are runs[i - first]
  float key_scales[kSegment], value_scales[kSegment];
  int first, end;  // sixteens of the segment

  SegmentPages(const KvPool& pool, const Segment& segment, Range tokens, const Segment& upcoming)
      : first(tokens.sixteens().begin), end(tokens.sixteens().end) {
    for (int i = first; i < end; ++i) {
      const int64_t at = sixteen_at(pool, *segment.sequence, segment.kv_head, segment.index * kSixteens + i);
      const int64_t ahead = upcoming_sixteen(pool, upcoming, i - first);
      const int left = tokens.end - i * kLanes;
      keys[i] = keys_at<Number>(pool, at);
      runs[i - first] = {values_at<Number>(pool, at), i * kLanes, left < kLanes ? left : kLanes,
                         keys_at<Number>(pool, ahead)};
      if constexpr (type == KvType::kInt8) {
        store(key_scales + i * kLanes, load(pool.key_scales + at * kLanes));
        store(value_scales + i * kLanes, load(pool.value_scales + at * kLanes));
        prefetch_once(pool.key_scales + ahead * kLanes);
        prefetch_once(pool.value_scales + ahead * kLanes);
      }
    }
  }

  int num_runs() const { return end - first; }
  int nearest(int sixteen) const { return Range{first, end}.nearest(sixteen); }
  const Number* values(int sixteen) const { return runs[sixteen - first].values; }

 private:
  static int64_t upcoming_sixteen(const KvPool& pool, const Segment& upcoming, int sixteen) {
    const int last = (upcoming.sequence->start + upcoming.sequence->length - 1) / kLanes;
    const int wanted = (upcoming.index < 0 ? 0 : upcoming.index) * kSixteens + sixteen;
    return sixteen_at(pool, *upcoming.sequence, upcoming.kv_head, wanted < last ? wanted : last);
  }
};

}  // namespace aios
