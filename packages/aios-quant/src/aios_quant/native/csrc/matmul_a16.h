// Integer weights times float32 activations: strips are turned into floats, then it is a float product.
#pragma once

#include "matmul_float.h"
#include "weight_strip.h"

namespace aios {

// scale * (code - zero) + min for a whole strip: out [K padded to a block][16 rows], as the format defines it.
template <int bits>
inline void widen_strip(const Matrix& w, const uint8_t* strip, int64_t index, float* out) {
  const int64_t blocks = padded_columns(w) / kBlock;
  const f32x16 zero = splat(static_cast<float>(w.zero));
  GroupScales group;
  if (w.group == 0)
    group.scale[0] = group.scale[1] = w.row_scales ? load(w.row_scales + index * kLanes) : splat(1.0f);
  for (int64_t block = 0; block < blocks; ++block, strip += block_bytes(bits)) {
    group.read(w, block, strip);
    bytes64 quads[kQuads];
    unpack_block<bits>(strip, quads);
    for (int q = 0; q < kQuads; ++q, out += 4 * kLanes) {
      const f32x16 s = group.scale[q / 4], m = group.min[q / 4];
      store(out, add(mul(s, sub(byte_to_float<0>(quads[q]), zero)), m));
      store(out + kLanes, add(mul(s, sub(byte_to_float<1>(quads[q]), zero)), m));
      store(out + 2 * kLanes, add(mul(s, sub(byte_to_float<2>(quads[q]), zero)), m));
      store(out + 3 * kLanes, add(mul(s, sub(byte_to_float<3>(quads[q]), zero)), m));
    }
  }
}

inline void widen_strip(const Matrix& w, int64_t index, float* out) {
  const uint8_t* strip = strip_at(w, index);
  switch (w.type) {
    case 4: return widen_strip<4>(w, strip, index, out);
    case 5: return widen_strip<5>(w, strip, index, out);
    case 6: return widen_strip<6>(w, strip, index, out);
    default: return widen_strip<8>(w, strip, index, out);
  }
}

// Strips [begin, end) for all tokens, two strips at a time through `memory` [2 * padded columns * 16].
inline void a16_item(const Matrix& w, int64_t begin, int64_t end, const float* x, int64_t x_stride, int64_t tokens,
                     float* memory, const Epilogue& to) {
  for (int64_t strip = begin; strip < end; strip += 2) {
    const int64_t count = strip + 2 <= end ? 2 : 1;
    const int64_t floats = padded_columns(w) * kLanes;
    for (int64_t s = 0; s < count; ++s) widen_strip(w, strip + s, memory + s * floats);
    Matrix wide = w;
    wide.type = static_cast<int32_t>(WeightType::kFloat32);
    wide.row_scales = nullptr;
    wide.strip_bytes = floats * static_cast<int64_t>(sizeof(float));
    wide.strips = reinterpret_cast<const uint8_t*>(memory) - strip * wide.strip_bytes;
    Upcoming nothing(nullptr, 0, 0);
    if (count == 2)
      float_strips<WeightType::kFloat32, 2, kTileRowsOfX>(wide, strip, x, x_stride, 0, tokens, nothing, to);
    else float_strips<WeightType::kFloat32, 1, kTileRowsOfX>(wide, strip, x, x_stride, 0, tokens, nothing, to);
  }
}

}  // namespace aios
