// How a weight matrix lies in memory for the kernels.
//
// The N rows are cut into strips of sixteen, one row per lane of a vector: a kernel walks along the K columns of a strip
// and never has to add up lanes. A strip is one stretch of memory, read from front to back.
//
//   float types   [K][16 rows], each number as wide as its type
//   integer types see aios_quant's weight_strip.h: blocks of 32 columns, scales in front of their block
//
// Rows are padded to a multiple of sixteen with zeros.
#pragma once

#include <cstdint>

#include "simd.h"

namespace aios {

enum class WeightType : int32_t {
  kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2, kFp8 = 3, kInt4 = 4, kInt5 = 5, kInt6 = 6, kInt8 = 8
};

// How the scales and minimums of groups are kept.
enum class ScaleType : int32_t {
  kFloat16 = 0, kFloat32 = 1,
  kCoded = 2  // 8-bit integers times a float16 per 256 columns, as in GGUF's K encodings
};

// Mirrored by aios_model/native/kernels.py; C layout.
struct Matrix {
  int32_t type;               // WeightType
  int32_t rows, columns;      // N, K
  int32_t group;              // columns per scale; 0: one scale per row, in row_scales
  int32_t zero;               // subtracted from every code
  int32_t has_mins;           // groups carry a minimum beside their scale
  int32_t scale_type;         // ScaleType
  int32_t quantize_inputs;    // activations become 8-bit integers (a8) or stay float32 (a16)
  const uint8_t* strips;
  int64_t strip_bytes;
  const float* row_scales;    // [N padded to 16] or null
  const float* bias;          // [N] or null
};

inline int64_t num_strips(const Matrix& w) { return (w.rows + kLanes - 1) / kLanes; }
inline const uint8_t* strip_at(const Matrix& w, int64_t strip) { return w.strips + strip * w.strip_bytes; }

// What becomes of a strip's sums: scaled by row, biased, written or added to the output.
struct Epilogue {
  float* out;          // [T, N]
  int64_t out_stride;  // in floats
  bool accumulate;     // add to what `out` holds (the residual stream)
};

inline void write_strip(const Matrix& w, const Epilogue& to, int64_t token, int64_t strip, f32x16 sums) {
  const int64_t row = strip * kLanes;
  const int live = static_cast<int>(w.rows - row < kLanes ? w.rows - row : kLanes);
  float* out = to.out + token * to.out_stride + row;
  if (w.row_scales) sums = mul(sums, load(w.row_scales + row));
  if (live == kLanes) {
    if (w.bias) sums = add(sums, load(w.bias + row));
    if (to.accumulate) sums = add(sums, load(out));
    store(out, sums);
    return;
  }
  if (w.bias) sums = add(sums, load_first(w.bias + row, live));
  if (to.accumulate) sums = add(sums, load_first(out, live));
  store_first(out, live, sums);
}

// Pieces of work for `count` strips: small enough to share out evenly, large enough (`bytes` of weights) to stream. A
// thread that changes its place in memory every 16 KB gets 36 GB/s where one that stays for 256 KB gets 51 to 53.
inline int64_t strips_per_item(int64_t count, int64_t strip_bytes, int threads, int64_t bytes = 262144) {
  const int64_t by_size = bytes / (strip_bytes > 0 ? strip_bytes : 1);
  const int64_t by_share = count / (2 * threads);
  const int64_t strips = by_size < by_share ? by_size : by_share;
  return strips < 1 ? 1 : strips;
}

// Weights that will be wanted soon: asked for in `times` small parts while something else is computed, so that memory
// is never idle and never waited for.
class Upcoming {
 public:
  Upcoming(const uint8_t* begin, int64_t bytes, int64_t times)
      : at_(begin), end_(begin + bytes), lines_(times > 0 ? (bytes / 64 + times) / times : 0) {}
  void ask() {
    for (int64_t i = 0; i < lines_ && at_ < end_; ++i, at_ += 64) prefetch(at_);
  }

 private:
  const uint8_t *at_, *end_;
  int64_t lines_;
};

}  // namespace aios
