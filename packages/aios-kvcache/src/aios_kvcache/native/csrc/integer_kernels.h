// The two products of attention over int8 pages: codes of queries times codes of keys, weights times codes of values.
//
// Both are exact. A score is at most 255 * 127 * H, H up to 1,024. A weight has sixteen unsigned bits, in two planes of
// bytes, and 256 of them times 127 stay below 2^31. So the order of these sums is nobody's concern.
//
// Eight bits would not do for weights: beside a token that takes nearly all the attention, as the first often does,
// they would round the others to nothing.
#pragma once

#include "attention_call.h"

namespace aios {

// What fits into the registers.
#if defined(AIOS_ISA_AVX512)
constexpr int kCodedRows = 12;  // queries that meet keys at once, and how many sixteens of those
constexpr int kCodedSixteens = 2;
constexpr int coded_sixteens(int rows) { return rows <= 3 ? 8 : 4; }  // of a page's keys at once
constexpr int kWeightRows = 3;  // rows of weights that meet four tokens' values at once, and how many vectors of those
constexpr int kWeightVectors = 4;
#else
constexpr int kCodedRows = 4;
constexpr int kCodedSixteens = 1;
constexpr int coded_sixteens(int rows) { return rows == 1 ? 2 : 1; }
constexpr int kWeightRows = 3;  // the more rows, the less often AVX2 widens a value
constexpr int kWeightVectors = 1;
#endif

using CodedPages = SegmentPages<KvType::kInt8>;

// scores[r * kSegment + 16 * i + lane] = query r times key `lane` of sixteen i, times the key's scale, for `vectors`
// sixteens from i on; those outside `tile` (in sixteens) mean nothing. Queries are [Hp/4, rows, 4], and each sum begins
// with what takes the 128 in the keys' codes away.
template <int rows, int vectors, bool prefetching>
inline void multiply_key_codes(const CodedPages& pages, Range tile, int i, const int8_t* queries,
                               const int32_t* starts, int head_dim, float* scores) {
  const int8_t *keys[vectors], *next[vectors];
  i32x16 sums[rows][vectors];
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    keys[v] = pages.keys[tile.nearest(i + v)];
    next[v] = pages.values(tile.nearest(i + v));
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[r][v] = splat(starts[r]);
  for (int h = 0; h < head_dim; h += 4) {
    bytes64 key[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      key[v] = load_bytes(keys[v] + h * kLanes);
      if (prefetching) prefetch_once(next[v] + h * kLanes);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const bytes64 query = splat_quad(queries + h * rows + 4 * r);
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[r][v] = dot4(sums[r][v], key[v], query);
    }
  }
#pragma GCC unroll 8
  for (int v = 0; v < vectors; ++v) {
    const f32x16 scale = load(pages.key_scales + tile.nearest(i + v) * kLanes);
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r)
      store(scores + r * kSegment + (i + v) * kLanes, mul(to_float(sums[r][v]), scale));
  }
}

// Weights of a row as bytes, in the place of the floats: for each two sixteens, and of them for each four tokens, the
// low bytes of the first's, their high bytes, and those of the second's.
constexpr int kWeightBytes = kSegment * static_cast<int>(sizeof(float));  // from one row to the next
inline int64_t weights_at(int sixteen) { return sixteen / 2 * 64 + sixteen % 2 * 8; }

// Sixteen-bit numbers in the lanes' low halves, taken apart into bytes.
inline void store_planes(uint8_t* to, i32x16 first, i32x16 second) {
#if defined(AIOS_ISA_AVX512)
  const __m512i order = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
  store_bytes(to, _mm512_unpacklo_epi64(_mm512_shuffle_epi8(first, order), _mm512_shuffle_epi8(second, order)));
#elif defined(AIOS_ISA_AVX2)
  const __m256i order = _mm256_broadcastsi128_si256(
      _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, -1, -1, -1, -1, -1, -1, -1, -1));
  store_bytes(to, {_mm256_unpacklo_epi64(_mm256_shuffle_epi8(first.a, order), _mm256_shuffle_epi8(second.a, order)),
                   _mm256_unpacklo_epi64(_mm256_shuffle_epi8(first.b, order), _mm256_shuffle_epi8(second.b, order))});
#else
  for (int i = 0; i < kLanes; ++i) {
    uint8_t* lane = to + i / 4 * 16 + i % 4;
    lane[0] = static_cast<uint8_t>(first.v[i]);
    lane[4] = static_cast<uint8_t>(first.v[i] >> 8);
    lane[8] = static_cast<uint8_t>(second.v[i]);
    lane[12] = static_cast<uint8_t>(second.v[i] >> 8);
  }
#endif
}

// round(weight * scale), at most 65,535, of one row: adding 2^23 leaves whole numbers in a float's lowest bits. `tile`,
// in sixteens, begins and ends with even ones.
inline void round_weights(float* weights, Range tile, float scale) {
  const f32x16 scales = splat(scale), bias = splat(8388608.0f);
  auto* bytes = reinterpret_cast<uint8_t*>(weights);
  for (int i = tile.begin; i < tile.end; i += 2) {
    const f32x16 first = fma(load(weights + i * kLanes), scales, bias);
    const f32x16 second = fma(load(weights + (i + 1) * kLanes), scales, bias);
    store_planes(bytes + weights_at(i), to_bits(first), to_bits(second));
  }
}

// out[r * out_stride + 16 * v + lane] = units[r] * the sum, over the tile's tokens, of weights times values.
template <int rows, int vectors, bool prefetching>
inline void multiply_value_codes(const CodedPages& pages, Range tile, int column, int width, const uint8_t* weights,
                                 const float* units, float* out, int64_t out_stride) {
  i32x16 low[rows][vectors], high[rows][vectors];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) low[r][v] = high[r][v] = splat(int32_t{0});
  for (int i = tile.begin; i < tile.end; ++i) {
    const auto& run = pages.runs[i - pages.first];
    const int8_t* values = run.values + 4 * column;
    const char* next = static_cast<const char*>(run.next) + 4 * column;
    const auto* p = reinterpret_cast<const int8_t*>(weights + weights_at(i));
    for (int quad = 0; quad < 4; ++quad, values += 4 * width, next += 4 * width, p += 16) {
      bytes64 value[vectors];
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        value[v] = load_bytes(values + v * 64);
        if (prefetching) prefetch_once(next + v * 64);
      }
#pragma GCC unroll 4
      for (int r = 0; r < rows; ++r) {
        const bytes64 lows = splat_quad(p + r * kWeightBytes), highs = splat_quad(p + r * kWeightBytes + 4);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) low[r][v] = dot4(low[r][v], lows, value[v]);
#pragma GCC unroll 4
        for (int v = 0; v < vectors; ++v) high[r][v] = dot4(high[r][v], highs, value[v]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      const f32x16 total = to_float(add(lanes_left<8>(high[r][v]), low[r][v]));
      store(out + r * out_stride + v * kLanes, mul(total, splat(units[r])));
    }
}

template <int vectors, bool prefetching, class... Arguments>
inline void multiply_value_codes(int rows, Arguments... arguments) {
  static_assert(kWeightRows <= 3);
  switch (rows) {
    case 1: return multiply_value_codes<1, vectors, prefetching>(arguments...);
    case 2: return multiply_value_codes<2, vectors, prefetching>(arguments...);
    case 3: return multiply_value_codes<3, vectors, prefetching>(arguments...);
  }
}

// The same for any number of rows, and all of the width.
template <bool prefetching>
inline void multiply_all_value_codes(int rows, const CodedPages& pages, Range tile, int width, const float* weights,
                                     const float* units, float* out, int64_t stride) {
  for (int column = 0; column < width;) {
    const int left = (width - column) / kLanes, vectors = left >= kWeightVectors ? kWeightVectors : left >= 2 ? 2 : 1;
    for (int r = 0; r < rows; r += kWeightRows) {
      const int n = rows - r < kWeightRows ? rows - r : kWeightRows;
      const auto* p = reinterpret_cast<const uint8_t*>(weights + r * kSegment);
      float* o = out + r * stride + column;
      const auto multiply = [&]<int count>() {
        multiply_value_codes<count, prefetching>(n, pages, tile, column, width, p, units + r, o, stride);
      };
      if (vectors == 1) multiply.template operator()<1>();
      else if (vectors == 2) multiply.template operator()<2>();
      else multiply.template operator()<kWeightVectors>();
    }
    column += vectors * kLanes;
  }
}

}  // namespace aios
