// Integer products for many tokens: bound by arithmetic, so a panel of two strips is unpacked once, into a buffer that
// stays in the second-level cache, and multiplied with all tokens, six at a time, all sums in registers.
#include "matmul_a8.h"

namespace aios {
namespace {

template <int bits>
inline void unpack_strip(const Matrix& w, const Activations& x, const uint8_t* strip, uint8_t* codes, float* scales,
                         float* mins) {
  const int64_t blocks = padded_columns(w) / kBlock;
  GroupScales group;
  for (int64_t block = 0; block < blocks; ++block, strip += block_bytes(bits)) {
    group.read(w, block, strip);
    bytes64 quads[kQuads];
    unpack_block<bits>(strip, quads);
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) store_bytes(codes + block * 512 + 64 * q, quads[q]);
    if (w.group == 0) continue;
    // A step of 64 columns takes the scale of its first block; one of 16 comes twice a block.
    for (int column = 0; column < kBlock; column += 16) {
      const int64_t at = block * kBlock + column;
      if (at % x.step) continue;
      store(scales + at / x.step * kLanes, group.scale[column / 16]);
      if (w.has_mins) store(mins + at / x.step * kLanes, group.min[column / 16]);
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

// All columns of the panel times `tokens` tokens; a step of columns is `quads` quads.
template <int quads, int tokens>
inline void a8_tile(const Matrix& w, const Activations& x, const Panel& panel, int64_t strip, int64_t token,
                    Upcoming& upcoming, const Epilogue& to) {
  f32x16 sums[tokens][kPanelStrips];
  for (auto& row : sums)
    for (f32x16& sum : row) sum = splat(0.0f);
  const int8_t* codes = x.codes_of(token);
  const uint8_t *left = panel.codes[0], *right = panel.codes[1];
  for (int step = 0; step < x.num_steps; ++step) {
    upcoming.ask();
    i32x16 dots[tokens][kPanelStrips];
#pragma GCC unroll 8
    for (int t = 0; t < tokens; ++t) {
      dots[t][0] = splat(-w.zero * x.sums_of(token + t)[step]);
      dots[t][1] = dots[t][0];
    }
#pragma GCC unroll 16
    for (int q = 0; q < quads; ++q) {
      const bytes64 a = load_bytes(left + 64 * q), b = load_bytes(right + 64 * q);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t) {
        const bytes64 value = splat_quad(codes + t * x.padded + 4 * q);
        dots[t][0] = dot4(dots[t][0], a, value);
        dots[t][1] = dot4(dots[t][1], b, value);
      }
    }
    left += 64 * quads, right += 64 * quads, codes += 4 * quads;
#pragma GCC unroll 2
    for (int s = 0; s < kPanelStrips; ++s) {
      if (!panel.scales[s]) {
#pragma GCC unroll 8
        for (int t = 0; t < tokens; ++t)
          sums[t][s] = fma(to_float(dots[t][s]), splat(x.scales_of(token + t)[step]), sums[t][s]);
        continue;
      }
      const f32x16 scales = load(panel.scales[s] + step * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t)
        sums[t][s] = fma(to_float(dots[t][s]), mul(scales, splat(x.scales_of(token + t)[step])), sums[t][s]);
      if (!panel.mins[s]) continue;
      const f32x16 mins = load(panel.mins[s] + step * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < tokens; ++t)
        sums[t][s] = fma(mins, splat(x.scaled_sums_of(token + t)[step]), sums[t][s]);
    }
  }
  for (int t = 0; t < tokens; ++t)
    for (int s = 0; s < kPanelStrips && strip + s < num_strips(w); ++s)
      write_strip(w, to, token + t, strip + s, sums[t][s]);
}

template <int quads>
inline void a8_tiles(const Matrix& w, const Activations& x, const Panel& panel, int64_t strip, int64_t first,
                     int64_t last, Upcoming& upcoming, const Epilogue& to) {
  int64_t token = first;
  for (; token + kTileTokens <= last; token += kTileTokens)
    a8_tile<quads, kTileTokens>(w, x, panel, strip, token, upcoming, to);
  switch (last - token) {
    case 5: return a8_tile<quads, 5>(w, x, panel, strip, token, upcoming, to);
    case 4: return a8_tile<quads, 4>(w, x, panel, strip, token, upcoming, to);
    case 3: return a8_tile<quads, 3>(w, x, panel, strip, token, upcoming, to);
    case 2: return a8_tile<quads, 2>(w, x, panel, strip, token, upcoming, to);
    case 1: return a8_tile<quads, 1>(w, x, panel, strip, token, upcoming, to);
    default: return;
  }
}

}  // namespace

void a8_panel(const Matrix& w, const Activations& x, const Panel& panel, int64_t strip, int64_t first, int64_t last,
              const uint8_t* next, int64_t next_bytes, const Epilogue& to) {
  const int64_t tiles = (last - first + kTileTokens - 1) / kTileTokens;
  Upcoming upcoming(next, next_bytes, tiles * x.num_steps);
  switch (x.step) {
    case 64: return a8_tiles<16>(w, x, panel, strip, first, last, upcoming, to);
    case 32: return a8_tiles<8>(w, x, panel, strip, first, last, upcoming, to);
    default: return a8_tiles<4>(w, x, panel, strip, first, last, upcoming, to);
  }
}

}  // namespace aios
