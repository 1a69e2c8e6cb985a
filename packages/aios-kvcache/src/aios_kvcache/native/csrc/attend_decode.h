// Decodes: one new token against a long context. Keys and values are read where they lie, once for all the query heads
// that share them; memory is the limit.
#pragma once

#include "coded_rows.h"

namespace aios {

// The heads of a group are taken in equal parts of at most kMaxRows: how many the part has that begins at head `done`.
inline int rows_of_part(int group, int done) {
  const int left = group - done, parts = (left + kMaxRows - 1) / kMaxRows;
  return (left + parts - 1) / parts;
}

// Queries are scaled when they are laid out: [G, H].
inline void scale_queries(const AttentionCall& call, const float* q, float* out) {
  const int64_t count = static_cast<int64_t>(call.group()) * call.pool.head_dim;
  const f32x16 scale = splat(call.log2_scale());
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, mul(load(q + i), scale));
  for (; i < count; ++i) out[i] = q[i] * call.log2_scale();
}

// Queries of int8 pages are laid out part by part.
inline void code_queries(const AttentionCall& call, const float* q, const CodedQueries& out) {
  const int head_dim = call.pool.head_dim;
  for (int done = 0, rows; done < call.group(); done += rows) {
    rows = rows_of_part(call.group(), done);
    for (int g = done; g < done + rows; ++g) out.put(q + g * head_dim, head_dim, call.log2_scale(), g, done, rows);
  }
}

inline void lay_out_group(const AttentionCall& call, int64_t row, int kv_head, float* out) {
  const float* q = call.query(row, kv_head * call.group());  // the group's heads are neighbours
  if (call.coded()) code_queries(call, q, CodedQueries(out, call.group(), call.pool.head_dim));
  else scale_queries(call, q, out);
}

// scores [rows, kSegment] of the sixteens in `pages`.
template <KvType type, int rows>
inline void score_pages(const SegmentPages<type>& pages, const float* queries, int head_dim, float* scores) {
  constexpr int vectors = key_vectors(rows);
  for (int i = pages.first / vectors * vectors; i < pages.end; i += vectors) {
    const typename Storage<type>::Number* keys[vectors];
    const void* next[vectors];
    for (int v = 0; v < vectors; ++v) {
      const int sixteen = pages.nearest(i + v);  // a neighbour's scores, computed once more, are ignored
      keys[v] = pages.keys[sixteen];
      next[v] = pages.values(sixteen);
    }
    multiply_keys<type, rows, vectors>(keys, next, QueryRows{queries, head_dim}, head_dim, scores + i * kLanes);
  }
}

template <KvType type>
inline void score_pages(int rows, const SegmentPages<type>& pages, const float* queries, int head_dim, float* scores) {
  static_assert(kMaxRows == 4);
  switch (rows) {
    case 1: return score_pages<type, 1>(pages, queries, head_dim, scores);
    case 2: return score_pages<type, 2>(pages, queries, head_dim, scores);
    case 3: return score_pages<type, 3>(pages, queries, head_dim, scores);
    case 4: return score_pages<type, 4>(pages, queries, head_dim, scores);
  }
}

// All query heads of the group over one segment: their partial results, `call.partial()` numbers apart. The parts of a
// large group find the pages in the cache.
template <KvType type>
inline void decode_segment(const AttentionCall& call, const Segment& segment, const Segment& upcoming,
                           const float* queries, float* scores, float* partials) {
  const int head_dim = call.pool.head_dim, width = value_width(call.pool);
  const Range visible = call.visible(segment.sequence->start, segment.index);
  const SegmentPages<type> pages(call.pool, segment, visible, upcoming);
  for (int done = 0, rows; done < call.group(); done += rows) {
    rows = rows_of_part(call.group(), done);
    float* first = partials + done * call.partial();
    float largest[kMaxRows];
    score_pages<type>(rows, pages, queries + static_cast<int64_t>(done) * head_dim, head_dim, scores);
    for (int r = 0; r < rows; ++r) largest[r] = largest_score(scores + r * kSegment, visible);
    for (int r = 0; r < rows; ++r) {
      const Partial partial{first + r * call.partial()};
      weigh_scores<false>(scores + r * kSegment, visible, visible.sixteens(), 1.0f, nullptr, largest[r], partial);
      clear_values(partial, width);
    }
    multiply_all_values<type, true>(rows, pages.runs, pages.num_runs(), width, scores, first + kLanes, call.partial());
  }
}

template <>
inline void decode_segment<KvType::kInt8>(const AttentionCall& call, const Segment& segment, const Segment& upcoming,
                                          const float* memory, float* scores, float* partials) {
  static_assert(kMaxRows == 4);
  const Range visible = call.visible(segment.sequence->start, segment.index), tile = visible.sixteens();
  const Range same[kMaxRows] = {visible, visible, visible, visible};
  const CodedPages pages(call.pool, segment, visible, upcoming);
  const CodedQueries queries(const_cast<float*>(memory), call.group(), call.pool.head_dim);
  for (int done = 0, rows; done < call.group(); done += rows) {
    rows = rows_of_part(call.group(), done);
    float* to = partials + done * call.partial();
    const auto attend = [&]<int count>() {
      attend_rows<count, coded_sixteens(count), true>(call, pages, tile, count, same, queries, done, scores, to);
    };
    switch (rows) {
      case 1: attend.template operator()<1>(); break;
      case 2: attend.template operator()<2>(); break;
      case 3: attend.template operator()<3>(); break;
      case 4: attend.template operator()<4>(); break;
    }
  }
}

inline void decode_segment(const AttentionCall& call, const Segment& segment, const Segment& upcoming,
                           const float* queries, float* scores, float* partials) {
  const auto decode = [&]<KvType type>() {
    decode_segment<type>(call, segment, upcoming, queries, scores, partials);
  };
  switch (static_cast<KvType>(call.pool.type)) {
    case KvType::kBFloat16: return decode.template operator()<KvType::kBFloat16>();
    case KvType::kFp8: return decode.template operator()<KvType::kFp8>();
    case KvType::kInt8: return decode.template operator()<KvType::kInt8>();
    default: return decode.template operator()<KvType::kFloat32>();
  }
}

// One thread's scratch.
struct DecodeScratch {
  float *queries, *scores, *fresh, *merged;

  DecodeScratch(const AttentionCall& call, float* memory) : queries(memory) {
    scores = queries + call.query_size(call.group());
    fresh = scores + kMaxRows * kSegment;
    merged = fresh + call.group() * call.partial();
  }

  // Numbers that it takes.
  static int64_t size(const AttentionCall& call) {
    return call.query_size(call.group()) + kMaxRows * kSegment + 2 * call.group() * call.partial();
  }
};

// One new token and one kv head over one segment; somebody will merge the partial results.
inline void decode_one_segment(const AttentionCall& call, const Segment& segment, const Segment& upcoming,
                               float* memory, float* partials) {
  const DecodeScratch scratch(call, memory);
  lay_out_group(call, segment.sequence->first_row, segment.kv_head, scratch.queries);
  decode_segment(call, segment, upcoming, scratch.queries, scratch.scores, partials);
}

// One new token and one kv head over the whole context; then comes `upcoming`.
inline void decode(const AttentionCall& call, const Sequence& sequence, int kv_head, const Segment& upcoming,
                   float* memory) {
  const DecodeScratch scratch(call, memory);
  const int width = value_width(call.pool), group = call.group(), last = sequence.start / kSegment;
  const auto fresh = [&](int g) { return Partial{scratch.fresh + g * call.partial()}; };
  const auto merged = [&](int g) { return Partial{scratch.merged + g * call.partial()}; };
  lay_out_group(call, sequence.first_row, kv_head, scratch.queries);
  const int first = call.first_visible(sequence.start) / kSegment;
  for (int s = first; s <= last; ++s) {
    const Segment next = s < last ? Segment{&sequence, kv_head, s + 1} : upcoming;
    float* partials = s == first ? scratch.merged : scratch.fresh;
    decode_segment(call, Segment{&sequence, kv_head, s}, next, scratch.queries, scratch.scores, partials);
    for (int g = 0; g < group && s > first; ++g) merge(merged(g), fresh(g), width);
  }
  for (int g = 0; g < group; ++g)
    finish(merged(g), call.pool.head_dim, call.unit(), call.output(sequence.first_row, kv_head * group + g));
}

// One new token and all kv heads; then comes the sequence `next`.
inline void decode_all_heads(const AttentionCall& call, const Sequence& sequence, const Sequence& next, float* memory) {
  const int heads = call.pool.num_kv_heads;
  for (int h = 0; h < heads; ++h) {
    const Sequence& then = h + 1 < heads ? sequence : next;
    const Segment upcoming{&then, (h + 1) % heads, call.first_visible(then.start) / kSegment};
    decode(call, sequence, h, upcoming, memory);
  }
}

}  // namespace aios
