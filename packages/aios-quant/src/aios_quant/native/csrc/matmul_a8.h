// Products of integer weights with 8-bit activations: two kernels that give the same numbers.
//
// Few tokens are bound by memory (matmul_a8_rows.cpp), many by arithmetic (matmul_a8_tiles.cpp).
#pragma once

#include "activations.h"
#include "weight_strip.h"

namespace aios {

// Tokens that meet a strip as it streams by, and tokens that meet a panel at once. AVX-512 keeps 6 x 2 integer and 6 x 2
// float sums in 24 of its 32 registers. Half as many registers of half the width hold 2 x 2 integer sums: in the loop
// that counts, floats wait in memory. Without VNNI a product takes so many instructions that the loads hardly matter.
#if defined(AIOS_ISA_AVX512)
constexpr int kFewTokens = 8, kTileTokens = 6;
#elif defined(__AVXVNNI__)
constexpr int kFewTokens = 4, kTileTokens = 2;
#else
constexpr int kFewTokens = 4, kTileTokens = 6;
#endif

// One strip times `tokens` (at most kFewTokens) tokens.
void rows_strip(const Matrix& w, const Activations& x, int64_t strip, int64_t tokens, const Epilogue& to);

constexpr int kPanelStrips = 2;

// Two strips, unpacked: one byte a code, scales and minimums of every step as floats.
struct Panel {
  const uint8_t* codes[kPanelStrips];  // [K/4][64]
  const float* scales[kPanelStrips];   // [steps][16], null if scaled by row
  const float* mins[kPanelStrips];     // [steps][16] or null
};

inline int64_t panel_bytes(const Matrix& w, const Activations& x) {
  const int64_t scales = w.group ? 64LL * x.num_steps * (w.has_mins ? 2 : 1) : 0;
  return kPanelStrips * (16LL * x.padded + scales) + 64;
}

// Unpacks the panel that begins at `strip` into `memory` [panel_bytes]; an odd last strip stands in for its neighbour.
Panel unpack_panel(const Matrix& w, const Activations& x, int64_t strip, uint8_t* memory);

// Tokens [first, last) times one panel. Meanwhile the `next_bytes` bytes of weights at `next` are asked for.
void a8_panel(const Matrix& w, const Activations& x, const Panel& panel, int64_t strip, int64_t first, int64_t last,
              const uint8_t* next, int64_t next_bytes, const Epilogue& to);

}  // namespace aios
