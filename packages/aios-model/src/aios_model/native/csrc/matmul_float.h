// y = x Wᵀ for weights kept as floats (FP32, BF16, FP16, FP8), widened to float32 as they are read.
//
// BF16 dot-product instructions are slower than float32 FMAs on Sapphire Rapids, twice as fast on Zen 5, and would round
// the activations too.
// Every output is one chain of FMAs along K, in the order of the columns: the same for one row of x and for many.
#pragma once

#include "matrix.h"
#include "pool.h"

namespace aios {

template <WeightType type>
struct FloatColumn;
template <>
struct FloatColumn<WeightType::kFloat32> {
  static constexpr int kBytes = 64;
  static f32x16 read(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
};
template <>
struct FloatColumn<WeightType::kBFloat16> {
  static constexpr int kBytes = 32;
  static f32x16 read(const uint8_t* p) { return load_bf16(reinterpret_cast<const uint16_t*>(p)); }
};
template <>
struct FloatColumn<WeightType::kFloat16> {
  static constexpr int kBytes = 32;
  static f32x16 read(const uint8_t* p) { return load_f16(reinterpret_cast<const uint16_t*>(p)); }
};
template <>
struct FloatColumn<WeightType::kFp8> {
  static constexpr int kBytes = 16;
  static f32x16 read(const uint8_t* p) { return load_e4m3(p); }
};

constexpr int kPrefetchBytes = 2048;  // how far ahead of the reads memory is asked for
constexpr int kFewRows = 4;           // up to so many rows of x, every weight is read once, as it streams by
#if defined(AIOS_ISA_AVX512)
constexpr int kTileRowsOfX = 8;  // of many rows, so many meet two strips at once: what the registers hold
#else
constexpr int kTileRowsOfX = 2;
#endif
constexpr int kAskEvery = 32;  // columns

// `strips` neighbouring strips times `tokens` rows of x, all sums in registers.
template <WeightType type, int strips, int tokens>
inline void float_tile(const Matrix& w, int64_t strip, const float* x, int64_t x_stride, int64_t token,
                       Upcoming& upcoming, const Epilogue& to) {
  using Column = FloatColumn<type>;
  constexpr bool streaming = tokens <= kFewRows;
  f32x16 sums[tokens][strips];
  for (auto& row : sums)
    for (f32x16& sum : row) sum = splat(0.0f);
  const uint8_t* weights = strip_at(w, strip);
  const float* rows = x + token * x_stride;
  for (int begin = 0; begin < w.columns; begin += kAskEvery) {
    upcoming.ask();
    const int end = begin + kAskEvery < w.columns ? begin + kAskEvery : w.columns;
    for (int k = begin; k < end; ++k) {
      f32x16 column[strips];
#pragma GCC unroll 8
      for (int s = 0; s < strips; ++s) {
        const uint8_t* at = weights + s * w.strip_bytes + static_cast<int64_t>(k) * Column::kBytes;
        if (streaming && k * Column::kBytes % 64 == 0) prefetch(at + kPrefetchBytes);
        column[s] = Column::read(at);
      }
#pragma GCC unroll 16
      for (int t = 0; t < tokens; ++t) {
        const f32x16 value = splat(rows[t * x_stride + k]);
#pragma GCC unroll 8
        for (int s = 0; s < strips; ++s) sums[t][s] = fma(value, column[s], sums[t][s]);
      }
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int s = 0; s < strips; ++s) write_strip(w, to, token + t, strip + s, sums[t][s]);
}

// All tokens of x times `strips` strips, `most` tokens at a time.
template <WeightType type, int strips, int most>
inline void float_strips(const Matrix& w, int64_t strip, const float* x, int64_t x_stride, int64_t first, int64_t last,
                         Upcoming& upcoming, const Epilogue& to) {
  int64_t token = first;
  for (; token + most <= last; token += most)
    float_tile<type, strips, most>(w, strip, x, x_stride, token, upcoming, to);
  if constexpr (most > 1)
    if (token < last) float_strips<type, strips, most / 2>(w, strip, x, x_stride, token, last, upcoming, to);
}

// Few tokens: four strips at once, so that four chains of FMAs hide each other's latency. Many: two, each weight
// widened once for a tile of tokens; meanwhile the next two are asked for.
template <WeightType type>
inline void float_item(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t x_stride, int64_t first,
                       int64_t last, const Epilogue& to) {
  int64_t strip = begin;
  Upcoming nothing(nullptr, 0, 0);
  if (last - first <= kFewRows)
    for (; strip + 4 <= end; strip += 4)
      float_strips<type, 4, kFewRows>(w, strip, x, x_stride, first, last, nothing, to);
  for (; strip + 2 <= end; strip += 2) {
    const int64_t next = end - strip - 2 < 2 ? end - strip - 2 : 2;
    const int64_t passes = (last - first + kTileRowsOfX - 1) / kTileRowsOfX;
    Upcoming upcoming(strip_at(w, strip + 2), next * w.strip_bytes, passes * ((w.columns + kAskEvery - 1) / kAskEvery));
    float_strips<type, 2, kTileRowsOfX>(w, strip, x, x_stride, first, last, upcoming, to);
  }
  for (; strip < end; ++strip) float_strips<type, 1, kTileRowsOfX>(w, strip, x, x_stride, first, last, nothing, to);
}

inline void float_item(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t x_stride, int64_t first,
                       int64_t last, const Epilogue& to) {
  switch (static_cast<WeightType>(w.type)) {
    case WeightType::kBFloat16: return float_item<WeightType::kBFloat16>(w, begin, end, x, x_stride, first, last, to);
    case WeightType::kFloat16: return float_item<WeightType::kFloat16>(w, begin, end, x, x_stride, first, last, to);
    case WeightType::kFp8: return float_item<WeightType::kFp8>(w, begin, end, x, x_stride, first, last, to);
    default: return float_item<WeightType::kFloat32>(w, begin, end, x, x_stride, first, last, to);
  }
}

// Collective: out [T, N] = x [T, K] Wᵀ.
inline void matmul_float(Team& team, const Matrix& w, const float* x, int64_t x_stride, int64_t num_tokens,
                         const Epilogue& to) {
  constexpr int64_t kTokensPerItem = 128;
  const int64_t strips = num_strips(w);
  const int64_t step = (strips_per_item(strips, w.strip_bytes, team.size()) + 3) / 4 * 4;
  const int64_t pieces = (strips + step - 1) / step;
  const int64_t token_pieces = (num_tokens + kTokensPerItem - 1) / kTokensPerItem;
  team.for_each(pieces * token_pieces, [&](int64_t item) {
    const int64_t begin = item % pieces * step, first = item / pieces * kTokensPerItem;
    const int64_t end = begin + step < strips ? begin + step : strips;
    const int64_t last = first + kTokensPerItem < num_tokens ? first + kTokensPerItem : num_tokens;
    float_item(w, begin, end, x, x_stride, first, last, to);
  });
}

}  // namespace aios
