// Activations as 8-bit integers: what an integer product multiplies its weights with.
//
// Each token is quantised by itself, in groups of A = 32 or 64 columns: scale = max|x| / 127, q = x / scale rounded to
// nearest even. Sums of q per step of columns go with them: with codes stored unsigned, sum (code - zero) q is
// sum code q - zero sum q, and a group's minimum is multiplied with the sum of its inputs.
#pragma once

#include <cstdint>

#include "simd.h"

namespace aios {

// T quantised tokens. A step is what a kernel adds up in integers before it turns to floats: A columns, or 16 where
// some weights have scales for 16 columns.
struct Activations {
  int32_t columns, padded, group, step, num_steps;  // K, K padded to a multiple of the group, A, columns per step
  int8_t* codes;        // [T, padded]
  float* scales;        // [T, num_steps]
  int32_t* sums;        // [T, num_steps]
  float* scaled_sums;   // [T, num_steps]: scale * sum

  const int8_t* codes_of(int64_t token) const { return codes + token * padded; }
  const float* scales_of(int64_t token) const { return scales + token * num_steps; }
  const int32_t* sums_of(int64_t token) const { return sums + token * num_steps; }
  const float* scaled_sums_of(int64_t token) const { return scaled_sums + token * num_steps; }
};

inline Activations shape_activations(int columns, int group, int step) {
  Activations x{};
  x.columns = columns;
  x.group = group;
  x.step = step;
  x.padded = (columns + group - 1) / group * group;
  x.num_steps = x.padded / step;
  return x;
}

inline int64_t activation_bytes(const Activations& x, int64_t tokens) {
  return tokens * (x.padded + 12LL * x.num_steps) + 4 * 64;
}

// Lays the four arrays into `memory`, each on a line of its own.
inline void place_activations(Activations& x, int64_t tokens, uint8_t* memory) {
  const auto next_line = [](uint8_t* p) { return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(p) + 63) & ~uintptr_t{63}); };
  x.codes = reinterpret_cast<int8_t*>(next_line(memory));
  x.scales = reinterpret_cast<float*>(next_line(reinterpret_cast<uint8_t*>(x.codes) + tokens * x.padded));
  x.sums = reinterpret_cast<int32_t*>(x.scales + tokens * x.num_steps);
  x.scaled_sums = reinterpret_cast<float*>(x.sums + tokens * x.num_steps);
}

inline f32x16 load_padded(const float* x, int column, int columns) {
  if (column + kLanes <= columns) return load(x + column);
  return column < columns ? load_first(x + column, columns - column) : splat(0.0f);
}

// Quantises one token, `row` [K].
inline void quantize_token(const Activations& x, int64_t token, const float* row) {
  int8_t* codes = x.codes + token * x.padded;
  float* scales = x.scales + token * x.num_steps;
  int32_t* sums = x.sums + token * x.num_steps;
  float* scaled_sums = x.scaled_sums + token * x.num_steps;
  const int steps_per_group = x.group / x.step, vectors_per_step = x.step / kLanes;
  for (int begin = 0, step = 0; begin < x.padded; begin += x.group) {
    f32x16 top = load_padded(row, begin, x.columns);
    for (int i = kLanes; i < x.group; i += kLanes) top = max_magnitude(top, load_padded(row, begin + i, x.columns));
    const float largest = largest_magnitude(top);
    const float scale = largest / 127.0f;
    // Below 1e-30 the quotient could overflow; such activations count as zeros. NaN makes the scale NaN, and the outputs.
    const f32x16 inverse = splat(largest > 1e-30f ? 127.0f / largest : 0.0f);
    for (int s = 0; s < steps_per_group; ++s, ++step) {
      i32x16 total = splat(int32_t{0});
      for (int v = 0; v < vectors_per_step; ++v) {
        const int column = begin + s * x.step + v * kLanes;
        const i32x16 rounded = round_to_int(mul(load_padded(row, column, x.columns), inverse));
        store_low_bytes(codes + column, rounded);
        total = add(total, rounded);
      }
      scales[step] = scale;
      sums[step] = sum(total);
      scaled_sums[step] = scale * static_cast<float>(sums[step]);
    }
  }
}

}  // namespace aios
