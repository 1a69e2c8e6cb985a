// The two products of attention in floating point, with sums in registers: queries times keys, weights times values.
//
// Every number is one chain of FMAs in a fixed order: a score runs over the head from its first number to its last, an
// output over the tokens in the order of the sequence. How many rows or vectors a call computes at once changes how
// often a key is read, never a result.
#pragma once

#include "kv_pool.h"

namespace aios {

constexpr int kSegment = 256;  // tokens after which partial results are merged, at fixed positions of the context
constexpr int kSixteens = kSegment / kLanes;

// What fits into the registers: 32 of sixteen lanes in AVX-512, sixteen of eight in AVX2.
constexpr int kMaxRows = 4;  // queries that meet a page at once
#if defined(AIOS_ISA_AVX512)
constexpr int kTileRows = 12;  // queries that meet a tile of widened keys at once, and its width
constexpr int kTileVectors = 2;
constexpr int kValueRows = 4;  // rows of weights that meet the values of a token at once, and how many vectors of those
constexpr int kValueVectors = 4;
constexpr int key_vectors(int rows) { return rows == 1 ? 8 : 4; }  // sixteens of a page's keys at once
#else
constexpr int kTileRows = 4;
constexpr int kTileVectors = 1;
constexpr int kValueRows = 2;
constexpr int kValueVectors = 2;
constexpr int key_vectors(int rows) { return rows == 1 ? 2 : 1; }
#endif

// Queries as they come: number h of row r.
struct QueryRows {
  const float* numbers;
  int64_t stride;
  float at(int r, int h) const { return numbers[r * stride + h]; }
};

// Queries turned round, so that the rows' numbers h stand together and one pointer finds them all.
template <int rows>
struct QueryColumns {
  const float* numbers;
  float at(int r, int h) const { return numbers[h * rows + r]; }
};

// Asks for the cache lines that begin within keys h and h + 1 of a sixteen.
template <int bytes>
inline void prefetch_pair(const void* sixteen, int h) {
  const char* p = static_cast<const char*>(sixteen) + h * kLanes * bytes;
  if (bytes > 1 || h % 4 == 0) prefetch_once(p);
  if constexpr (bytes > 2) prefetch_once(p + 64);
}

// scores[r * kSegment + 16 * v + lane] = query r times key `lane` of sixteen v. While keys are read, as many bytes at
// `next` are asked for.
template <KvType type, int rows, int vectors, class Queries>
inline void multiply_keys(const typename Storage<type>::Number* const* keys, const void* const* next, Queries queries,
                          int head_dim, float* scores) {
  f32x16 sums[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[r][v] = splat(0.0f);
  for (int h = 0; h < head_dim; h += 2) {
    f32x16 even[vectors], odd[vectors];
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) {
      Storage<type>::key_pair(keys[v], h, even[v], odd[v]);
      if (next) prefetch_pair<sizeof(typename Storage<type>::Number)>(next[v], h);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const f32x16 q = splat(queries.at(r, h));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[r][v] = fma(q, even[v], sums[r][v]);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const f32x16 q = splat(queries.at(r, h + 1));
#pragma GCC unroll 8
      for (int v = 0; v < vectors; ++v) sums[r][v] = fma(q, odd[v], sums[r][v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(scores + r * kSegment + v * kLanes, sums[r][v]);
}

// A run of tokens whose values lie one behind the other.
template <class Number>
struct ValueRun {
  const Number* values;
  int first, count;  // tokens of the segment
  const void* next;  // asked for while these are read
};

// out[r * out_stride + 16 * v + lane] += the sum, over the runs' tokens j, of weights[r * kSegment + j] * value j.
// Between one token's values and the next's stand `width` numbers.
template <KvType type, bool prefetching, int rows, int vectors>
inline void multiply_values(const ValueRun<typename Storage<type>::Number>* runs, int num_runs, int column, int width,
                            const float* weights, float* out, int64_t out_stride) {
  constexpr int kBytes = vectors * kLanes * static_cast<int>(sizeof(typename Storage<type>::Number));
  f32x16 sums[rows][vectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) sums[r][v] = load(out + r * out_stride + v * kLanes);
  for (int i = 0; i < num_runs; ++i) {
    const auto* values = runs[i].values + column;
    const char* next = static_cast<const char*>(runs[i].next) + column * sizeof *values;
    const float* p = weights + runs[i].first;
    for (int j = 0; j < runs[i].count; ++j) {
      f32x16 value[vectors];
      Storage<type>::values(values + static_cast<int64_t>(j) * width, value);
#pragma GCC unroll 8
      for (int byte = 0; byte < kBytes && prefetching; byte += 64)
        prefetch_once(next + static_cast<int64_t>(j) * width * sizeof *values + byte);
#pragma GCC unroll 12
      for (int r = 0; r < rows; ++r) {
        const f32x16 weight = splat(p[r * kSegment + j]);
#pragma GCC unroll 8
        for (int v = 0; v < vectors; ++v) sums[r][v] = fma(weight, value[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < vectors; ++v) store(out + r * out_stride + v * kLanes, sums[r][v]);
}

template <KvType type, bool prefetching, int vectors, class Run>
inline void multiply_values(int rows, const Run* runs, int count, int column, int width, const float* weights,
                            float* out, int64_t stride) {
  static_assert(kValueRows <= 4);
  switch (rows) {
    case 1: return multiply_values<type, prefetching, 1, vectors>(runs, count, column, width, weights, out, stride);
    case 2: return multiply_values<type, prefetching, 2, vectors>(runs, count, column, width, weights, out, stride);
    case 3: return multiply_values<type, prefetching, 3, vectors>(runs, count, column, width, weights, out, stride);
    case 4: return multiply_values<type, prefetching, 4, vectors>(runs, count, column, width, weights, out, stride);
  }
}

// The same for any number of rows, and all of the width.
template <KvType type, bool prefetching, class Run>
inline void multiply_all_values(int rows, const Run* runs, int count, int width, const float* weights, float* out,
                                int64_t stride) {
  for (int column = 0; column < width;) {
    const int left = (width - column) / kLanes, vectors = left >= kValueVectors ? kValueVectors : left >= 2 ? 2 : 1;
    for (int r = 0; r < rows; r += kValueRows) {
      const int n = rows - r < kValueRows ? rows - r : kValueRows;
      const float* p = weights + r * kSegment;
      float* o = out + r * stride + column;
      if (vectors == 1) multiply_values<type, prefetching, 1>(n, runs, count, column, width, p, o, stride);
      else if (vectors == 2) multiply_values<type, prefetching, 2>(n, runs, count, column, width, p, o, stride);
      else multiply_values<type, prefetching, kValueVectors>(n, runs, count, column, width, p, o, stride);
    }
    column += vectors * kLanes;
  }
}

}  // namespace aios
