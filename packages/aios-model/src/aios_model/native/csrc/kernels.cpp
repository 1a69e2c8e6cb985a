// C ABI of the network's kernels: the small operations on rows, and products with float weights.
#include "elementwise.h"
#include "matmul_float.h"
#include "pool.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

using namespace aios;

namespace {

// body(token) for every token, on all threads.
template <class Body>
void for_tokens(void* pool, int64_t num_tokens, Body&& body) {
  static_cast<Pool*>(pool)->run([&](Team& team) { team.for_each(num_tokens, body); });
}

}  // namespace

// Strides are those of rows, in floats.

// x, out [T, size], weight [size]; `out` may be `x`.
AIOS_EXPORT void aios_rms_norm(void* pool, const float* x, int64_t x_stride, const float* weight, float* out,
                               int64_t out_stride, int64_t num_tokens, int32_t size, float eps) {
  for_tokens(pool, num_tokens, [&](int64_t t) { rms_norm(x + t * x_stride, weight, out + t * out_stride, size, eps); });
}

// heads [T, num_heads * head_dim], turned in place; cos, sin [T, head_dim / 2].
AIOS_EXPORT void aios_rotate(void* pool, float* heads, int64_t stride, const float* cos, const float* sin,
                             int64_t num_tokens, int32_t num_heads, int32_t head_dim) {
  for_tokens(pool, num_tokens, [&](int64_t t) {
    const int64_t angles = t * (head_dim / 2);
    for (int64_t head = 0; head < num_heads; ++head)
      rotate(heads + t * stride + head * head_dim, cos + angles, sin + angles, head_dim);
  });
}

// gate, up, out [T, size]; `out` may be `gate`.
AIOS_EXPORT void aios_silu_and_multiply(void* pool, const float* gate, const float* up, int64_t stride, float* out,
                                        int64_t out_stride, int64_t num_tokens, int32_t size) {
  for_tokens(pool, num_tokens, [&](int64_t t) {
    silu_and_multiply(gate + t * stride, up + t * stride, out + t * out_stride, size);
  });
}

// out [T, N] = x [T, K] times a matrix of float weights, added to what `out` holds if `accumulate`.
AIOS_EXPORT void aios_matmul_float(void* pool, const Matrix* matrix, const float* x, int64_t x_stride,
                                   int64_t num_tokens, float* out, int64_t out_stride, int32_t accumulate) {
  const Epilogue to{out, out_stride, accumulate != 0};
  static_cast<Pool*>(pool)->run([&](Team& team) { matmul_float(team, *matrix, x, x_stride, num_tokens, to); });
}
