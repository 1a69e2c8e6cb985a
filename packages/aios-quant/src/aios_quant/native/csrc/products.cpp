// C ABI of weights: packing them, reading them back, products with them.
#include <cstring>
#include <vector>

#include "linear.h"
#include "matmul_a16.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using namespace aios;

Pool& as_pool(void* pool) { return *static_cast<Pool*>(pool); }

// Working memory that a calling thread keeps between products.
uint8_t* kept_memory(int64_t bytes) {
  thread_local std::vector<uint8_t> memory;
  if (static_cast<int64_t>(memory.size()) < bytes + 64) memory.resize(bytes + 64);
  return memory.data() + (64 - reinterpret_cast<uintptr_t>(memory.data()) % 64) % 64;
}

void pack_row(const Matrix& w, uint8_t* strip, int lane, const uint8_t* codes) {
  const int64_t whole = w.columns / kBlock;
  for (int64_t block = 0; block < whole; ++block)
    pack_block(w.type, block_at(w, strip, block), lane, codes + block * kBlock);
  if (w.columns % kBlock == 0) return;
  uint8_t rest[kBlock] = {};
  std::memcpy(rest, codes + whole * kBlock, w.columns % kBlock);
  pack_block(w.type, block_at(w, strip, whole), lane, rest);
}

}  // namespace

AIOS_EXPORT int64_t aios_strip_bytes(const Matrix* w) { return packed_strip_bytes(*w); }

// codes [N, K] one byte each; scales and mins [N, K / group] of the matrix's scale type; where they are coded, steps and
// min_steps [N, K / 256] float16. `strips` is zeroed memory of num_strips * strip_bytes.
AIOS_EXPORT void aios_pack(void* pool, const Matrix* matrix, const uint8_t* codes, const uint8_t* scales,
                           const uint8_t* mins, const uint16_t* steps, const uint16_t* min_steps, uint8_t* strips) {
  const Matrix& w = *matrix;
  const int64_t width = scale_width(w), groups = w.group ? w.columns / w.group : 0;
  const int64_t runs = has_coded_scales(w) ? w.columns / (kStepBlocks * kBlock) : 0;
  as_pool(pool).run([&](Team& team) {
    team.for_each(num_strips(w), [&](int64_t index) {
      uint8_t* strip = strips + index * w.strip_bytes;
      for (int lane = 0; lane < kLanes && index * kLanes + lane < w.rows; ++lane) {
        const int64_t row = index * kLanes + lane;
        pack_row(w, strip, lane, codes + row * w.columns);
        for (int64_t g = 0; g < groups; ++g) {
          uint8_t* at = scales_of(w, strip, g * w.group) + lane * width;
          std::memcpy(at, scales + (row * groups + g) * width, width);
          if (w.has_mins) std::memcpy(at + scale_bytes(w), mins + (row * groups + g) * width, width);
        }
        for (int64_t r = 0; r < runs; ++r) {
          uint8_t* at = steps_of(w, strip, r) + lane * sizeof(uint16_t);
          std::memcpy(at, steps + row * runs + r, sizeof(uint16_t));
          if (w.has_mins) std::memcpy(at + kLanes * sizeof(uint16_t), min_steps + row * runs + r, sizeof(uint16_t));
        }
      }
    });
  });
}

// The matrix as float32 [N, K].
AIOS_EXPORT void aios_widen(void* pool, const Matrix* matrix, float* out) {
  const Matrix& w = *matrix;
  as_pool(pool).run([&](Team& team) {
    std::vector<float> columns(padded_columns(w) * kLanes);
    team.for_each(num_strips(w), [&](int64_t index) {
      widen_strip(w, index, columns.data());
      for (int lane = 0; lane < kLanes && index * kLanes + lane < w.rows; ++lane)
        for (int64_t k = 0; k < w.columns; ++k)
          out[(index * kLanes + lane) * w.columns + k] = columns[k * kLanes + lane];
    });
  });
}

// out [T, N] = x [T, K] Wᵀ.
AIOS_EXPORT void aios_linear(void* pool, const Linear* linear, const float* x, int64_t x_stride, int64_t tokens,
                             float* out, int64_t out_stride) {
  Pool& threads = as_pool(pool);
  const int64_t scratch = linear_scratch_bytes(*linear);
  Activations inputs{};
  if (linear->group) inputs = shape_activations(linear->columns, linear->group, linear->step);
  uint8_t* memory = kept_memory(scratch * threads.size() + (linear->group ? activation_bytes(inputs, tokens) : 0));
  if (linear->group) place_activations(inputs, tokens, memory + scratch * threads.size());
  threads.run([&](Team& team) {
    if (linear->group)
      team.for_each_in_runs(tokens, [&](int64_t t) { quantize_token(inputs, t, x + t * x_stride); });
    matmul(team, *linear, {x, x_stride, &inputs, tokens}, memory + team.rank() * scratch, {out, out_stride, false});
  });
}

// Quantises activations as the products do: codes [T, padded], scales [T, steps]; for tests.
AIOS_EXPORT void aios_quantize_activations(int32_t columns, int32_t group, int32_t step, const float* x, int64_t tokens,
                                           int8_t* codes, float* scales) {
  Activations inputs = shape_activations(columns, group, step);
  std::vector<uint8_t> memory(activation_bytes(inputs, tokens) + 64);
  place_activations(inputs, tokens, memory.data());
  for (int64_t t = 0; t < tokens; ++t) quantize_token(inputs, t, x + t * columns);
  std::memcpy(codes, inputs.codes, tokens * inputs.padded);
  std::memcpy(scales, inputs.scales, tokens * inputs.num_steps * sizeof(float));
}
