// Integer products for many tokens: bound by arithmetic, so a panel of two strips is unpacked once, into a buffer that
// stays in the second-level cache, and multiplied with all tokens, six at a time, all sums in registers.
#include "matmul_a8.h"

namespace aios {
namespace {

template <int bits>
inline void unpack_strip(const Matrix& w, const Activations& x, const uint8_t* strip, uint8_t* codes, float* scales,
                         float* mins) {
  const int64_t blocks = padded_columns(w) / kBlock, per_header = blocks_per_header(w);
  const int64_t width = scale_bytes(w), set = width * (w.has_mins ? 2 : 1);
  f32x16 scale[2], min[2];
  for (int64_t block = 0; block < blocks; ++block, strip += block_bytes(bits)) {
    if (w.group != 0 && block % per_header == 0) {
      for (int half = 0; half < 2; ++half) {
        const uint8_t* at = strip + (w.group == 16 ? half * set : 0);
        scale[half] = read_scales(w, at);
        if (w.has_mins) min[half] = read_scales(w, at + width);
      }
      strip += header_bytes(w);
    }
    bytes64 quads[kQuads];
    unpack_block<bits>(strip, quads);
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) store_bytes(codes + block * 512 + 64 * q, quads[q]);
    if (w.group == 0) continue;
    // A step of 64 columns takes the scale of its first block; one of 16 comes twice a block.
    for (int column = 0; column < kBlock; column += 16) {
      const int64_t at = block * kBlock + column;
      if (at % x.step) continue;
      store(scales + at / x.step * kLanes, scale[column / 16]);
      if (w.has_mins) store(mins + at / x.step * kLanes, min[column / 16]);
    }
  }
  for (int64_t at = blocks * 512; at < 16LL * x.padded; at += 64) store_bytes(codes + at, splat_bytes(0));
}

}  // namespace

Panel unpack_panel(const Matrix& w, const Activations& x, int64_t strip, uint8_t* memory) {
  Panel panel{};
  auto* at = reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(memory) + 63) & ~uintptr_t{63});
  for (int s = 0; s < kPanelStrips; ++s) {
    const uint8_t* packed = strip_at(w, strip + s < num_strips(w) ? strip + s : strip);
    if (w.type == 8 && w.group == 0 && padded_columns(w) == x.padded) {
      panel.codes[s] = packed;
      continue;
    }
    uint8_t* codes = at;
    auto* scales = reinterpret_cast<float*>(codes + 16LL * x.padded);
    float* mins = scales + (w.group ? x.num_steps * kLanes : 0);
    at = reinterpret_cast<uint8_t*>(mins + (w.group && w.has_mins ? x.num_steps * kLanes : 0));
    switch (w.type) {
      case 4: unpack_strip<4>(w, x, packed, codes, scales, mins); break;
      case 5: unpack_strip<5>(w, x, packed, codes, scales, mins); break;
      case 6: unpack_strip<6>(w, x, packed, codes, scales, mins); break;
      default: unpack_strip<8>(w, x, packed, codes, scales, mins);
    }
    panel.codes[s] = codes;
    panel.scales[s] = w.group ? scales : nullptr;
    panel.mins[s] = w.group && w.has_mins ? mins : nullptr;
  }
  return panel;
}

namespace {

template <int tokens, bool grouped, bool has_mins>
inline void a8_tile(const Matrix& w, const Activations& x, const Panel& panel, int64_t strip, int64_t token,
                    const Epilogue& to) {
  f32x16 sums[tokens][kPanelStrips];
  for (auto& row : sums)
    for (f32x16& sum : row) sum = splat(0.0f);
  const int8_t* codes = x.codes_of(token);
  const uint8_t *left = panel.codes[0], *right = panel.codes[1];
  const int quads = x.step / 4;
  for (int step = 0; step < x.num_steps; ++step) {
    i32x16 dots[tokens][kPanelStrips];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      dots[t][0] = splat(-w.zero * x.sums_of(token + t)[step]);
      dots[t][1] = dots[t][0];
    }
#pragma GCC unroll 4
    for (int q = 0; q < quads; ++q, left += 64, right += 64, codes += 4) {
      const bytes64 a = load_bytes(left), b = load_bytes(right);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const bytes64 value = splat_quad(codes + t * x.padded);
        dots[t][0] = dot4(dots[t][0], a, value);
        dots[t][1] = dot4(dots[t][1], b, value);
      }
    }
#pragma GCC unroll 2
    for (int s = 0; s < kPanelStrips; ++s) {
      const f32x16 scales = grouped ? load(panel.scales[s] + step * kLanes) : splat(0.0f);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const f32x16 scale = splat(x.scales_of(token + t)[step]);
        sums[t][s] = fma(to_float(dots[t][s]), grouped ? mul(scales, scale) : scale, sums[t][s]);
      }
      if constexpr (has_mins) {
        const f32x16 mins = load(panel.mins[s] + step * kLanes);
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t)
          sums[t][s] = fma(mins, splat(x.scaled_sums_of(token + t)[step]), sums[t][s]);
      }
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int s = 0; s < kPanelStrips && strip + s < num_strips(w); ++s)
      write_strip(w, to, token + t, strip + s, sums[t][s]);
}

template <int tokens>
inline void a8_tile(const Matrix& w, const Activations& x, const Panel& panel, int64_t strip, int64_t token,
                    const Epilogue& to) {
  if (!w.group) a8_tile<tokens, false, false>(w, x, panel, strip, token, to);
  else if (!w.has_mins) a8_tile<tokens, true, false>(w, x, panel, strip, token, to);
  else a8_tile<tokens, true, true>(w, x, panel, strip, token, to);
}

}  // namespace

void a8_panel(const Matrix& w, const Activations& x, const Panel& panel, int64_t strip, int64_t first,
                     int64_t last, const Epilogue& to) {
  int64_t token = first;
  for (; token + kTileTokens <= last; token += kTileTokens) a8_tile<kTileTokens>(w, x, panel, strip, token, to);
  switch (last - token) {
    case 5: return a8_tile<5>(w, x, panel, strip, token, to);
    case 4: return a8_tile<4>(w, x, panel, strip, token, to);
    case 3: return a8_tile<3>(w, x, panel, strip, token, to);
    case 2: return a8_tile<2>(w, x, panel, strip, token, to);
    case 1: return a8_tile<1>(w, x, panel, strip, token, to);
    default: return;
  }
}

}  // namespace aios
