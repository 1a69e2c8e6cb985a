// The small operations between the products, one token (or head) at a time.
#pragma once

#include <cmath>
#include <cstdint>

#include "simd.h"

namespace aios {

// Root-mean-square normalisation (arXiv 1910.07467): out = x / sqrt(mean(x²) + eps) * weight; `out` may be `x`.
inline void rms_norm(const float* x, const float* weight, float* out, int size, float eps) {
  f32x16 squares = splat(0.0f);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const f32x16 v = load(x + i);
    squares = fma(v, v, squares);
  }
  if (i < size) {
    const f32x16 v = load_first(x + i, size - i);
    squares = fma(v, v, squares);
  }
  const f32x16 scale = splat(1.0f / std::sqrt(sum(squares) / static_cast<float>(size) + eps));
  for (i = 0; i + kLanes <= size; i += kLanes) store(out + i, mul(mul(load(x + i), scale), load(weight + i)));
  if (i < size) {
    const f32x16 v = mul(mul(load_first(x + i, size - i), scale), load_first(weight + i, size - i));
    store_first(out + i, size - i, v);
  }
}

// Rotary embedding (arXiv 2104.09864) of one head, in place: the pair (i, i + H/2) is turned by the token's angle i.
// cos and sin are [H/2] each.
inline void rotate(float* head, const float* cos, const float* sin, int head_dim) {
  const int half = head_dim / 2;
  int i = 0;
  for (; i + kLanes <= half; i += kLanes) {
    const f32x16 a = load(head + i), b = load(head + half + i), c = load(cos + i), s = load(sin + i);
    store(head + i, sub(mul(a, c), mul(b, s)));
    store(head + half + i, fma(b, c, mul(a, s)));
  }
  for (; i < half; ++i) {
    const float a = head[i], b = head[half + i];
    head[i] = a * cos[i] - b * sin[i];
    head[half + i] = b * cos[i] + a * sin[i];
  }
}

// The gate of SwiGLU (arXiv 2002.05202): out = silu(gate) * up; `out` may be `gate`.
inline void silu_and_multiply(const float* gate, const float* up, float* out, int size) {
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store(out + i, mul(silu(load(gate + i)), load(up + i)));
  if (i < size) store_first(out + i, size - i, mul(silu(load_first(gate + i, size - i)), load_first(up + i, size - i)));
}

}  // namespace aios
