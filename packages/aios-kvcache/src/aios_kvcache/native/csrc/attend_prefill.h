// Chunks of prompts: many queries meet the same keys. Keys and values are widened to float32 once for a tile of queries
// (some tokens times the query heads that share the kv head); arithmetic is the limit.
#pragma once

#include "coded_rows.h"

namespace aios {

constexpr int kTileQueries = 96;   // about so many rows in a tile
constexpr int kValueSixteens = 4;  // sixteens of values that are widened at a time; they stay in the nearest cache
constexpr int kRowStep = 4;        // rows are padded to a multiple of this

inline int tile_tokens(int group) { return group < kTileQueries ? kTileQueries / group : 1; }
inline int64_t tile_rows(int group) { return round_up(static_cast<int64_t>(tile_tokens(group)) * group, kRowStep); }

// One thread's scratch. Keys and values are those widened last.
struct TileScratch {
  float *queries, *keys, *values, *scores, *fresh, *merged;

  TileScratch(const AttentionCall& call, float* memory) : queries(memory) {
    const int64_t rows = tile_rows(call.group()), head_dim = call.pool.head_dim;
    keys = queries + call.query_size(rows);
    values = keys + kTileVectors * kLanes * head_dim;
    scores = values + kValueSixteens * kLanes * value_width(call.pool);
    fresh = scores + rows * kSegment;
    merged = fresh + rows * call.partial();
  }

  // Numbers that it takes.
  static int64_t size(const AttentionCall& call) {
    const int64_t rows = tile_rows(call.group()), head_dim = call.pool.head_dim;
    return call.query_size(rows) + kTileVectors * kLanes * head_dim +
           kValueSixteens * kLanes * value_width(call.pool) + rows * (kSegment + 2 * call.partial());
  }
};

// Some tokens of a chunk, from the sequence's token number `begin` (a position) to `end`, with one kv head.
struct Tile {
  const Sequence& sequence;
  int kv_head, begin, end;

  Tile(const AttentionCall& call, const Sequence& of, int head, int index) : sequence(of), kv_head(head) {
    const int tokens = tile_tokens(call.group()), last = of.start + of.length;
    begin = of.start + index * tokens;
    end = begin + tokens < last ? begin + tokens : last;
  }
  Segment at(int segment) const { return {&sequence, kv_head, segment}; }
  int rows(const AttentionCall& call) const { return (end - begin) * call.group(); }
  // Row r is one query head of one token.
  int position(const AttentionCall& call, int r) const { return begin + r / call.group(); }
  int64_t packed_row(int position) const { return sequence.first_row + position - sequence.start; }
};

inline int num_tiles(const Sequence& sequence, int group) {
  return (sequence.length + tile_tokens(group) - 1) / tile_tokens(group);
}

// How many rows the block of rows that begins at r has.
inline int rows_of_block(int64_t padded_rows, int64_t r) {
  return static_cast<int>(padded_rows - r < kTileRows ? padded_rows - r : kTileRows);
}

// Queries, scaled and turned round within blocks of rows, as numbers or as codes; zeros where rows are padded.
inline void lay_out_queries(const AttentionCall& call, const Tile& tile, float* queries) {
  const int head_dim = call.pool.head_dim, group = call.group(), rows = tile.rows(call);
  const int64_t padded = round_up(rows, kRowStep);
  const float scale = call.log2_scale();
  const CodedQueries coded(queries, padded, head_dim);
  for (int64_t first = 0; first < padded; first += kTileRows) {
    const int count = rows_of_block(padded, first);
    for (int64_t row = first; row < first + count; ++row) {
      const float* from = row < rows ? call.query(tile.packed_row(tile.position(call, static_cast<int>(row))),
                                                  tile.kv_head * group + static_cast<int>(row % group))
                                     : nullptr;
      float* to = queries + first * head_dim + row - first;
      if (call.coded()) coded.put(from, head_dim, scale, row, first, count);
      else
        for (int h = 0; h < head_dim; ++h) to[h * count] = from ? from[h] * scale : 0.0f;
    }
  }
}

template <KvType type>
inline void widen_keys(const typename Storage<type>::Number* sixteen, int head_dim, float* out) {
  for (int h = 0; h < head_dim; h += 2) {
    f32x16 even, odd;
    Storage<type>::key_pair(sixteen, h, even, odd);
    store(out + h * kLanes, even);
    store(out + (h + 1) * kLanes, odd);
  }
}

template <KvType type>
inline void widen_values(const ValueRun<typename Storage<type>::Number>& run, int width, float* out) {
  for (int j = 0; j < run.count; ++j) {
    const auto* token = run.values + static_cast<int64_t>(j) * width;
    float* wide = out + static_cast<int64_t>(j) * width;
    int h = 0;
    for (; h + kLanes < width; h += 2 * kLanes) {
      f32x16 pair[2];
      Storage<type>::values(token + h, pair);
      store(wide + h, pair[0]);
      store(wide + h + kLanes, pair[1]);
    }
    if (h < width) {
      f32x16 last[1];
      Storage<type>::values(token + h, last);
      store(wide + h, last[0]);
    }
  }
}

// Asks for what will be widened next.
inline void prefetch_bytes(const void* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) prefetch(static_cast<const char*>(p) + i);
}

// All rows of the tile times a few sixteens of widened keys.
inline void multiply_tile(const float* keys, const float* queries, int64_t padded_rows, int head_dim, float* scores) {
  const float* at[kTileVectors];
  for (int v = 0; v < kTileVectors; ++v) at[v] = keys + static_cast<int64_t>(v) * head_dim * kLanes;
  for (int64_t r = 0; r < padded_rows; r += kTileRows) {
    const float* q = queries + r * head_dim;
    float* to = scores + r * kSegment;
    switch (rows_of_block(padded_rows, r)) {
      case 4: multiply_keys<KvType::kFloat32, 4, kTileVectors>(at, nullptr, QueryColumns<4>{q}, head_dim, to); break;
#if defined(AIOS_ISA_AVX512)
      case 8: multiply_keys<KvType::kFloat32, 8, kTileVectors>(at, nullptr, QueryColumns<8>{q}, head_dim, to); break;
      case 12: multiply_keys<KvType::kFloat32, 12, kTileVectors>(at, nullptr, QueryColumns<12>{q}, head_dim, to); break;
#endif
    }
  }
}

// Scores of the tile's rows with the segment's pages, a few sixteens widened at a time.
template <KvType type>
inline void score_tile(const SegmentPages<type>& pages, const TileScratch& scratch, int64_t padded_rows, int head_dim) {
  for (int i = pages.first / kTileVectors * kTileVectors; i < pages.end; i += kTileVectors) {
    for (int v = 0; v < kTileVectors; ++v) {
      const int sixteen = i + v, ahead = sixteen + kTileVectors;
      if (sixteen < pages.first || sixteen >= pages.end) continue;  // its scores are ignored
      widen_keys<type>(pages.keys[sixteen], head_dim, scratch.keys + static_cast<int64_t>(v) * head_dim * kLanes);
      const auto* next = ahead < pages.end ? pages.keys[ahead] : pages.runs[v % pages.num_runs()].values;
      prefetch_bytes(next, head_dim * kLanes * static_cast<int64_t>(sizeof *next));
    }
    multiply_tile(scratch.keys, scratch.queries, padded_rows, head_dim, scratch.scores + i * kLanes);
  }
}

// The rows' weights times the segment's values, a few sixteens widened at a time.
template <KvType type>
inline void weigh_tile(const SegmentPages<type>& pages, const TileScratch& scratch, int rows, int width, float* out,
                       int64_t out_stride) {
  for (int i = 0; i < pages.num_runs(); i += kValueSixteens) {
    const int end = i + kValueSixteens < pages.num_runs() ? i + kValueSixteens : pages.num_runs();
    for (int run = i; run < end; ++run) {
      widen_values<type>(pages.runs[run], width, scratch.values + static_cast<int64_t>(run - i) * kLanes * width);
      const int ahead = run + kValueSixteens;
      if (ahead < pages.num_runs())
        prefetch_bytes(pages.runs[ahead].values, width * kLanes * static_cast<int64_t>(sizeof *pages.runs[0].values));
    }
    const auto &first = pages.runs[i], &last = pages.runs[end - 1];
    const ValueRun<float> wide{scratch.values, first.first, last.first + last.count - first.first, nullptr};
    multiply_all_values<KvType::kFloat32, false>(rows, &wide, 1, width, scratch.scores, out, out_stride);
  }
}

// What the rows from `first` to `end` of a tile see of a segment, and all that any of them sees. A row may see nothing,
// since it stands before the segment or its window begins behind it; what it gets means nothing.
inline Range visible_to(const AttentionCall& call, const Tile& tile, int segment, int first, int end, Range* visible) {
  for (int r = first; r < end; ++r) {
    Range& seen = visible[r - first];
    seen = call.visible(tile.position(call, r), segment);
    if (seen.empty()) seen = {0, 0};
  }
  const int last = tile.position(call, end - 1);
  return {call.visible(tile.position(call, first), segment).begin, call.visible(last, segment).end};
}

// Scores become weights, block of rows by block.
inline void soften_tile(const AttentionCall& call, const Tile& tile, int segment, Range all, const TileScratch& scratch,
                        float* partials) {
  const int rows = tile.rows(call);
  for (int first = 0; first < rows; first += kTileRows) {
    const int end = first + kTileRows < rows ? first + kTileRows : rows;
    float largest[kTileRows];
    Range visible[kTileRows];
    visible_to(call, tile, segment, first, end, visible);
    for (int r = first; r < end; ++r)
      largest[r - first] = largest_score(scratch.scores + r * kSegment, visible[r - first]);
    for (int r = first; r < end; ++r) {
      const Partial partial{partials + r * call.partial()};
      weigh_scores<false>(scratch.scores + r * kSegment, visible[r - first], all.sixteens(), 1.0f, nullptr,
                          largest[r - first], partial);
      clear_values(partial, value_width(call.pool));
    }
  }
}

// A tile over one segment: partial results of its rows, `call.partial()` numbers apart.
template <KvType type>
inline void tile_segment(const AttentionCall& call, const Tile& tile, int segment, const TileScratch& scratch,
                         float* partials) {
  const Range all{call.visible(tile.begin, segment).begin, call.visible(tile.end - 1, segment).end};
  const SegmentPages<type> pages(call.pool, tile.at(segment), all, tile.at(segment + 1));
  score_tile<type>(pages, scratch, round_up(tile.rows(call), kRowStep), call.pool.head_dim);
  soften_tile(call, tile, segment, all, scratch, partials);
  weigh_tile<type>(pages, scratch, tile.rows(call), value_width(call.pool), partials + kLanes, call.partial());
}

// Pages of int8 are not widened: a block of rows goes all the way before the next.
template <>
inline void tile_segment<KvType::kInt8>(const AttentionCall& call, const Tile& tile, int segment,
                                        const TileScratch& scratch, float* partials) {
  static_assert(kCodedRows == kTileRows);
  const int rows = tile.rows(call);
  const int64_t padded = round_up(rows, kRowStep);
  const Range all{call.visible(tile.begin, segment).begin, call.visible(tile.end - 1, segment).end};
  const CodedPages pages(call.pool, tile.at(segment), all, tile.at(segment + 1));
  const CodedQueries queries(scratch.queries, padded, call.pool.head_dim);
  for (int first = 0; first < rows; first += kTileRows) {
    const int end = first + kTileRows < rows ? first + kTileRows : rows;
    Range visible[kTileRows];
    const Range seen = visible_to(call, tile, segment, first, end, visible).sixteens();
    if (seen.empty()) continue;
    const auto attend = [&]<int count>() {
      attend_rows<count, kCodedSixteens, false>(call, pages, seen, end - first, visible, queries, first, scratch.scores,
                                                partials + first * call.partial());
    };
    switch (rows_of_block(padded, first)) {
      case 4: attend.template operator()<4>(); break;
#if defined(AIOS_ISA_AVX512)
      case 8: attend.template operator()<8>(); break;
      case 12: attend.template operator()<12>(); break;
#endif
    }
  }
}

inline void tile_segment(const AttentionCall& call, const Tile& tile, int segment, const TileScratch& scratch,
                         float* partials) {
  switch (static_cast<KvType>(call.pool.type)) {
    case KvType::kBFloat16: return tile_segment<KvType::kBFloat16>(call, tile, segment, scratch, partials);
    case KvType::kFp8: return tile_segment<KvType::kFp8>(call, tile, segment, scratch, partials);
    case KvType::kInt8: return tile_segment<KvType::kInt8>(call, tile, segment, scratch, partials);
    default: return tile_segment<KvType::kFloat32>(call, tile, segment, scratch, partials);
  }
}

// One tile over one segment; somebody will merge the partial results.
inline void prefill_one_segment(const AttentionCall& call, const Tile& tile, int segment, float* memory,
                                float* partials) {
  const TileScratch scratch(call, memory);
  lay_out_queries(call, tile, scratch.queries);
  tile_segment(call, tile, segment, scratch, partials);
}

// One tile over the whole context.
inline void prefill(const AttentionCall& call, const Tile& tile, float* memory) {
  const TileScratch scratch(call, memory);
  const int width = value_width(call.pool), rows = tile.rows(call), group = call.group();
  const auto fresh = [&](int r) { return Partial{scratch.fresh + r * call.partial()}; };
  const auto merged = [&](int r) { return Partial{scratch.merged + r * call.partial()}; };
  lay_out_queries(call, tile, scratch.queries);
  const int first = call.first_visible(tile.begin) / kSegment;
  const auto sees = [&](int r, int segment) { return !call.visible(tile.position(call, r), segment).empty(); };
  tile_segment(call, tile, first, scratch, scratch.merged);
  for (int r = 0; r < rows; ++r)
    if (!sees(r, first)) clear(merged(r), width);
  for (int s = first + 1; s <= (tile.end - 1) / kSegment; ++s) {
    tile_segment(call, tile, s, scratch, scratch.fresh);
    for (int r = 0; r < rows; ++r)
      if (sees(r, s)) merge(merged(r), fresh(r), width);
  }
  for (int r = 0; r < rows; ++r)
    finish(merged(r), call.pool.head_dim, call.unit(),
           call.output(tile.packed_row(tile.position(call, r)), tile.kv_head * group + r % group));
}

}  // namespace aios
