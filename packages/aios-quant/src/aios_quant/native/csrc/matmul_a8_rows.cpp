// Integer products for few tokens: bound by memory, so every strip is read once, front to back, unpacked in registers.
//
// For each step of columns the codes' dot products are exact integers; they are turned into floats and added up in the
// order of the steps, by the same instructions as in matmul_a8_tiles.cpp. That makes a row's result independent of how
// many rows run beside it.
#include "matmul_a8.h"

namespace aios {
namespace {

constexpr int kStreamAhead = 4096;  // bytes ahead of the reads at which memory is asked for

// One strip times `tokens` tokens.
template <int bits, int tokens>
struct RowsKernel {
  const Matrix& w;
  const Activations& x;
  int64_t first_token;
  f32x16 sums[tokens];

  RowsKernel(const Matrix& w, const Activations& x, int64_t first_token) : w(w), x(x), first_token(first_token) {
    for (f32x16& sum : sums) sum = splat(0.0f);
  }

  inline void start(i32x16 dots[tokens], int step) const {
    for (int t = 0; t < tokens; ++t) dots[t] = splat(-w.zero * x.sums_of(first_token + t)[step]);
  }

  template <int first, int last>
  inline void dot(i32x16 dots[tokens], const bytes64 quads[kQuads], int column) const {
    for (int t = 0; t < tokens; ++t) {
      const int8_t* codes = x.codes_of(first_token + t) + column;
#pragma GCC unroll 8
      for (int q = first; q < last; ++q) dots[t] = dot4(dots[t], quads[q], splat_quad(codes + 4 * (q - first)));
    }
  }

  inline void finish(const i32x16 dots[tokens], int step, f32x16 scales, f32x16 mins) {
    for (int t = 0; t < tokens; ++t) {
      const f32x16 scale = splat(x.scales_of(first_token + t)[step]);
      if (w.group == 0) {
        sums[t] = fma(to_float(dots[t]), scale, sums[t]);
        continue;
      }
      sums[t] = fma(to_float(dots[t]), mul(scales, scale), sums[t]);
      if (w.has_mins) sums[t] = fma(mins, splat(x.scaled_sums_of(first_token + t)[step]), sums[t]);
    }
  }

  // Steps of 32 columns or more: whole blocks.
  inline void run_blocks(const uint8_t* strip) {
    const int64_t blocks = padded_columns(w) / kBlock, size = block_bytes(bits);
    const int per_step = x.step / kBlock;
    GroupScales group;
    int step = 0;
    for (int64_t block = 0; block < blocks;) {
      group.read(w, block, strip);
      i32x16 dots[tokens];
      start(dots, step);
      for (int b = 0; b < per_step && block < blocks; ++b, ++block, strip += size) {
        for (int64_t line = 0; line < size; line += 64) prefetch(strip + kStreamAhead + line);
        bytes64 quads[kQuads];
        unpack_block<bits>(strip, quads);
        dot<0, kQuads>(dots, quads, static_cast<int>(block) * kBlock);
      }
      finish(dots, step++, group.scale[0], group.min[0]);
    }
  }

  // Steps of 16 columns: half blocks, which share their scales unless groups are of 16 columns.
  inline void run_half_blocks(const uint8_t* strip) {
    const int64_t blocks = padded_columns(w) / kBlock;
    GroupScales group;
    for (int64_t block = 0; block < blocks; ++block, strip += block_bytes(bits)) {
      group.read(w, block, strip);
      for (int64_t line = 0; line < block_bytes(bits); line += 64) prefetch(strip + kStreamAhead + line);
      bytes64 quads[kQuads];
      unpack_block<bits>(strip, quads);
      const int column = static_cast<int>(block) * kBlock, step = 2 * static_cast<int>(block);
      i32x16 dots[tokens];
      start(dots, step);
      dot<0, kQuads / 2>(dots, quads, column);
      finish(dots, step, group.scale[0], group.min[0]);
      start(dots, step + 1);
      dot<kQuads / 2, kQuads>(dots, quads, column + 16);
      finish(dots, step + 1, group.scale[1], group.min[1]);
    }
  }
};

template <int bits, int tokens>
inline void rows_strip(const Matrix& w, const Activations& x, int64_t strip, int64_t token, const Epilogue& to) {
  RowsKernel<bits, tokens> kernel(w, x, token);
  if (x.step == 16) kernel.run_half_blocks(strip_at(w, strip));
  else kernel.run_blocks(strip_at(w, strip));
  for (int t = 0; t < tokens; ++t) write_strip(w, to, token + t, strip, kernel.sums[t]);
}

template <int bits>
inline void rows_strip(const Matrix& w, const Activations& x, int64_t strip, int64_t tokens, const Epilogue& to) {
  switch (tokens) {
    case 1: return rows_strip<bits, 1>(w, x, strip, int64_t{0}, to);
    case 2: return rows_strip<bits, 2>(w, x, strip, int64_t{0}, to);
    case 3: return rows_strip<bits, 3>(w, x, strip, int64_t{0}, to);
#if defined(AIOS_ISA_AVX512)
    case 5: return rows_strip<bits, 5>(w, x, strip, int64_t{0}, to);
    case 6: return rows_strip<bits, 6>(w, x, strip, int64_t{0}, to);
    case 7: return rows_strip<bits, 7>(w, x, strip, int64_t{0}, to);
    case 8: return rows_strip<bits, 8>(w, x, strip, int64_t{0}, to);
#endif
    default: return rows_strip<bits, 4>(w, x, strip, int64_t{0}, to);
  }
}

}  // namespace

void rows_strip(const Matrix& w, const Activations& x, int64_t strip, int64_t tokens, const Epilogue& to) {
  switch (w.type) {
    case 4: return rows_strip<4>(w, x, strip, tokens, to);
    case 5: return rows_strip<5>(w, x, strip, tokens, to);
    case 6: return rows_strip<6>(w, x, strip, tokens, to);
    default: return rows_strip<8>(w, x, strip, tokens, to);
  }
}

}  // namespace aios
