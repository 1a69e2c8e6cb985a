// How integer weights lie in a strip of sixteen rows, and how they are taken out again.
//
// Columns come in blocks of 32, eight quads of four. A quad of all sixteen rows is one `bytes64`, the operand of `dot4`:
// lane = row, four bytes = four columns. A block holds
//
//   8 bits   512 bytes: eight quads
//   4 bits   256 bytes: byte i of 64 j holds quad 2j in its low and quad 2j + 1 in its high nibble
//   5 bits   256 bytes as for 4 bits, then 64 bytes: bit q of byte i is the fifth bit of quad q
//   6 bits   256 bytes as for 4 bits, then 2 x 64 bytes: bits 2q, 2q + 1 of byte i are the upper bits of quad q (q + 4)
//
// In front of each scale group (of 32 columns or more) stand its sixteen scales, then its sixteen minimums, if it has
// any; groups of 16 columns stand in pairs, scales of both in front of the block they share. Coded scales are bytes, and
// in front of each 256 columns stand the sixteen float16 that they are multiplied with, then those of the minimums.
// Whatever is read next is next in memory: a product reads one stream per strip.
#pragma once

#include <cstring>

#include "matrix.h"

namespace aios {

constexpr int kBlock = 32;      // columns
constexpr int kQuads = 8;       // of a block
constexpr int kStepBlocks = 8;  // blocks whose coded scales share a step

inline int64_t block_bytes(int bits) { return bits == 8 ? 512 : 256 + 64 * (bits - 4); }
inline bool has_coded_scales(const Matrix& w) { return w.scale_type == static_cast<int32_t>(ScaleType::kCoded); }
inline int64_t scale_width(const Matrix& w) {
  return has_coded_scales(w) ? 1 : w.scale_type == static_cast<int32_t>(ScaleType::kFloat32) ? 4 : 2;
}
inline int64_t scale_bytes(const Matrix& w) { return kLanes * scale_width(w); }
inline int64_t padded_columns(const Matrix& w) { return (w.columns + kBlock - 1) / kBlock * kBlock; }

// Scales and minimums of one group.
inline int64_t set_bytes(const Matrix& w) { return scale_bytes(w) * (w.has_mins ? 2 : 1); }
// Of the groups that begin with one block: one set, or two for groups of 16 columns.
inline int64_t header_bytes(const Matrix& w) { return w.group == 0 ? 0 : set_bytes(w) * (w.group == 16 ? 2 : 1); }
inline int64_t blocks_per_header(const Matrix& w) {
  if (w.group == 0) return padded_columns(w) / kBlock;
  return w.group <= kBlock ? 1 : w.group / kBlock;
}
// What codes of scales, and of minimums, are multiplied with.
inline int64_t steps_bytes(const Matrix& w) { return has_coded_scales(w) ? 2 * kLanes * (w.has_mins ? 2 : 1) : 0; }

// Where the blocks from `block` on begin, with all that stands in front of the first of them.
inline int64_t offset_of(const Matrix& w, int64_t block) {
  const int64_t per_header = blocks_per_header(w);
  return block * block_bytes(w.type) + (block + per_header - 1) / per_header * header_bytes(w) +
         (block + kStepBlocks - 1) / kStepBlocks * steps_bytes(w);
}
inline int64_t packed_strip_bytes(const Matrix& w) { return offset_of(w, padded_columns(w) / kBlock); }

// The scales of the group that a walk along a strip is in; of both groups of a block where they have 16 columns.
class GroupScales {
 public:
  f32x16 scale[2], min[2];

  GroupScales() {
    for (int half = 0; half < 2; ++half) scale[half] = min[half] = splat(0.0f);
    step_ = min_step_ = splat(0.0f);
  }

  // Reads what stands in front of `block`, if anything does, and moves `at` behind it.
  void read(const Matrix& w, int64_t block, const uint8_t*& at) {
    if (w.group == 0) return;
    if (has_coded_scales(w) && block % kStepBlocks == 0) {
      step_ = load_f16(reinterpret_cast<const uint16_t*>(at));
      if (w.has_mins) min_step_ = load_f16(reinterpret_cast<const uint16_t*>(at) + kLanes);
      at += steps_bytes(w);
    }
    if (block % blocks_per_header(w)) return;
    for (int half = 0; half < 2; ++half) {
      const uint8_t* set = at + (w.group == 16 ? half * set_bytes(w) : 0);
      scale[half] = widen(w, set, step_);
      if (w.has_mins) min[half] = widen(w, set + scale_bytes(w), min_step_);
    }
    at += header_bytes(w);
  }

 private:
  static f32x16 widen(const Matrix& w, const uint8_t* p, f32x16 step) {
    switch (static_cast<ScaleType>(w.scale_type)) {
      case ScaleType::kCoded: return mul(load_i8(reinterpret_cast<const int8_t*>(p)), step);
      case ScaleType::kFloat32: return load(reinterpret_cast<const float*>(p));
      default: return load_f16(reinterpret_cast<const uint16_t*>(p));
    }
  }
  f32x16 step_, min_step_;
};

// The eight quads of a block of `bits`-bit codes, one byte per code.
template <int bits>
inline void unpack_block(const uint8_t* block, bytes64 quads[kQuads]) {
  if constexpr (bits == 8) {
#pragma GCC unroll 8
    for (int q = 0; q < kQuads; ++q) quads[q] = load_bytes(block + 64 * q);
    return;
  }
  const bytes64 nibble = splat_bytes(0x0f);
#pragma GCC unroll 4
  for (int j = 0; j < kQuads / 2; ++j) {
    const bytes64 pair = load_bytes(block + 64 * j);
    quads[2 * j] = bits_and(pair, nibble);
    quads[2 * j + 1] = bits_and(shift_right<4>(pair), nibble);
  }
  if constexpr (bits == 5) {
    const bytes64 plane = load_bytes(block + 256), bit = splat_bytes(0x10);
    quads[0] = bits_or(quads[0], bits_and(shift_left<4>(plane), bit));
    quads[1] = bits_or(quads[1], bits_and(shift_left<3>(plane), bit));
    quads[2] = bits_or(quads[2], bits_and(shift_left<2>(plane), bit));
    quads[3] = bits_or(quads[3], bits_and(shift_left<1>(plane), bit));
    quads[4] = bits_or(quads[4], bits_and(plane, bit));
    quads[5] = bits_or(quads[5], bits_and(shift_right<1>(plane), bit));
    quads[6] = bits_or(quads[6], bits_and(shift_right<2>(plane), bit));
    quads[7] = bits_or(quads[7], bits_and(shift_right<3>(plane), bit));
  }
  if constexpr (bits == 6) {
    const bytes64 pair = splat_bytes(0x30);
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const bytes64 plane = load_bytes(block + 256 + 64 * half);
      bytes64* q = quads + 4 * half;
      q[0] = bits_or(q[0], bits_and(shift_left<4>(plane), pair));
      q[1] = bits_or(q[1], bits_and(shift_left<2>(plane), pair));
      q[2] = bits_or(q[2], bits_and(plane, pair));
      q[3] = bits_or(q[3], bits_and(shift_right<2>(plane), pair));
    }
  }
}

// Packs 32 codes of one row into their block, four at a time; the block was zeroed.
inline void pack_block(int bits, uint8_t* block, int row, const uint8_t codes[kBlock]) {
  const auto quad_at = [&](int quad) {
    uint32_t four;
    std::memcpy(&four, codes + 4 * quad, sizeof four);
    return four;
  };
  const auto add_to = [&](int64_t line, uint32_t four) {
    uint32_t there;
    std::memcpy(&there, block + 64 * line + 4 * row, sizeof there);
    there |= four;
    std::memcpy(block + 64 * line + 4 * row, &there, sizeof there);
  };
  for (int quad = 0; quad < kQuads; ++quad) {
    const uint32_t four = quad_at(quad);
    if (bits == 8) {
      add_to(quad, four);
      continue;
    }
    add_to(quad / 2, (four & 0x0f0f0f0fu) << 4 * (quad % 2));
    if (bits == 5) add_to(4, (four >> 4 & 0x01010101u) << quad);
    if (bits == 6) add_to(4 + quad / 4, (four >> 4 & 0x03030303u) << 2 * (quad % 4));
  }
}

// Where a block's codes begin: right in front of the next block and of what stands in front of that.
inline uint8_t* block_at(const Matrix& w, uint8_t* strip, int64_t block) {
  const int64_t header = block % blocks_per_header(w) == 0 ? header_bytes(w) : 0;
  const int64_t steps = block % kStepBlocks == 0 ? steps_bytes(w) : 0;
  return strip + offset_of(w, block) + steps + header;
}

// Where the scales of the group of `column` stand; minimums follow scale_bytes behind.
inline uint8_t* scales_of(const Matrix& w, uint8_t* strip, int64_t column) {
  const int64_t first = column / kBlock / blocks_per_header(w) * blocks_per_header(w);
  const int second = w.group == 16 ? column % kBlock / 16 : 0;
  return block_at(w, strip, first) - header_bytes(w) + second * set_bytes(w);
}

// Where the steps of the coded scales of 256 columns stand; those of the minimums follow.
inline uint8_t* steps_of(const Matrix& w, uint8_t* strip, int64_t index) {
  return strip + offset_of(w, index * kStepBlocks);
}

}  // namespace aios
