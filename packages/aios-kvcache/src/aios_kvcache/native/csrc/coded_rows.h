// Some rows over one segment of int8 pages: what decodes and chunks of prompts call alike, so that a row's codes and
// weights are rounded in one way.
//
// Queries are rounded to codes as keys are, one scale per token and head. The weights of a row in a segment, multiplied
// by the values' scales, are rounded to multiples of 1/65535 of the largest.
#pragma once

#include <cstring>

#include "integer_kernels.h"
#include "quantize_head.h"

namespace aios {

constexpr float kLargestWeight = 65535.0f;

// Queries of a number of rows, laid out in blocks of rows: where they lie in memory, of which they take
// `AttentionCall::query_size`.
struct CodedQueries {
  int64_t rows, row_bytes;  // Hp
  int8_t* codes;            // of each block [Hp/4, rows, 4]
  int32_t* starts;          // -128 times the sum of the codes
  float* factors;           // a score is a sum of products of codes, times the key's scale, times this

  CodedQueries(float* memory, int64_t count, int head_dim)
      : rows(count), row_bytes(round_up(head_dim, 4)), codes(reinterpret_cast<int8_t*>(memory)) {
    starts = reinterpret_cast<int32_t*>(codes + rows * row_bytes);
    factors = reinterpret_cast<float*>(starts + rows);
  }

  // Row number `row`, in the block of `count` rows that begins at `first`; zeros if q is null.
  void put(const float* q, int head_dim, float scale, int64_t row, int64_t first, int count) const {
    int8_t head[kMaxHeadDim + 64];
    if (!q) std::memset(head, 0, row_bytes);
    store_bytes(head + round_up(head_dim, kLanes), splat_bytes(0));  // up to the next 64
    factors[row] = q ? quantize_head(q, head_dim, head) * scale : 0.0f;
    i32x16 sums = splat(int32_t{0});
    for (int h = 0; h < row_bytes; h += 64) sums = dot4(sums, splat_bytes(1), load_bytes(head + h));
    starts[row] = -128 * sum(sums);
    int8_t* to = codes + first * row_bytes + (row - first) * 4;
    for (int h = 0; h < row_bytes; h += 4) std::memcpy(to + h * count, head + h, 4);
  }
};

// Scores become weights of sixteen bits, times units[r]. What a row that sees nothing gets means nothing.
inline void soften_rows(int rows, const CodedPages& pages, Range tile, const Range* visible, const float* factors,
                        float* scores, float* units, float* partials, int64_t stride) {
  const Range even{tile.begin / 2 * 2, (tile.end + 1) / 2 * 2};
  float largest[kCodedRows];
  for (int r = 0; r < rows; ++r) largest[r] = largest_score(scores + r * kSegment, visible[r]) * factors[r];
  for (int r = 0; r < rows; ++r)
    units[r] = weigh_scores<true>(scores + r * kSegment, visible[r], even, factors[r], pages.value_scales, largest[r],
                                  Partial{partials + r * stride});
  for (int r = 0; r < rows; ++r) {
    const float top = units[r];
    const bool nothing = top < kSmallestAmax;
    round_weights(scores + r * kSegment, even, nothing ? 0.0f : kLargestWeight / top);
    // A scale that is no number, or infinite, makes the row NaN.
    units[r] = nothing ? 0.0f : top < kInfinity ? top / kLargestWeight : top - top;
  }
}

// `count` of the rows, which are the block of queries that begins at `first`. `tile` is what any of them sees, in
// sixteens. Partial results are `call.partial()` numbers apart.
template <int rows, int vectors, bool prefetching>
inline void attend_rows(const AttentionCall& call, const CodedPages& pages, Range tile, int count, const Range* visible,
                        const CodedQueries& queries, int64_t first, float* scores, float* partials) {
  const int head_dim = call.pool.head_dim, width = value_width(call.pool);
  const int8_t* codes = queries.codes + first * queries.row_bytes;
  for (int i = tile.begin / vectors * vectors; i < tile.end; i += vectors)
    multiply_key_codes<rows, vectors, prefetching>(pages, tile, i, codes, queries.starts + first, head_dim, scores);
  float units[kCodedRows];
  const int64_t stride = call.partial();
  soften_rows(count, pages, tile, visible, queries.factors + first, scores, units, partials, stride);
  multiply_all_value_codes<prefetching>(count, pages, tile, width, scores, units, partials + kLanes, stride);
}

}  // namespace aios
