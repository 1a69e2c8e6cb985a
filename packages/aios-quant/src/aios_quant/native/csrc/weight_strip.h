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
// any; groups of 16 columns stand in pairs, scales of both in front of the block they share. Whatever is read next is
// next in memory: a product reads one stream per strip.
#pragma once

#include <cstring>

#include "matrix.h"

namespace aios {

constexpr int kBlock = 32;  // columns
constexpr int kQuads = 8;   // of a block

inline int64_t block_bytes(int bits) { return bits == 8 ? 512 : 256 + 64 * (bits - 4); }
inline int64_t scale_bytes(const Matrix& w) { return w.wide_scales ? 64 : 32; }
inline int64_t padded_columns(const Matrix& w) { return (w.columns + kBlock - 1) / kBlock * kBlock; }

// Scales and minimums of the groups that begin with one block: one set, or two for groups of 16 columns.
inline int64_t header_bytes(const Matrix& w) {
  if (w.group == 0) return 0;
  return scale_bytes(w) * (w.has_mins ? 2 : 1) * (w.group == 16 ? 2 : 1);
}
inline int64_t blocks_per_header(const Matrix& w) {
  if (w.group == 0) return padded_columns(w) / kBlock;
  return w.group <= kBlock ? 1 : w.group / kBlock;
}
inline int64_t packed_strip_bytes(const Matrix& w) {
  const int64_t blocks = padded_columns(w) / kBlock, per_header = blocks_per_header(w);
  return blocks * block_bytes(w.type) + (blocks + per_header - 1) / per_header * header_bytes(w);
}

inline f32x16 read_scales(const Matrix& w, const uint8_t* p) {
  return w.wide_scales ? load(reinterpret_cast<const float*>(p)) : load_f16(reinterpret_cast<const uint16_t*>(p));
}

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

// Where a block's codes begin, behind the scales of its group.
inline uint8_t* block_at(const Matrix& w, uint8_t* strip, int64_t block) {
  return strip + block * block_bytes(w.type) + (block / blocks_per_header(w) + 1) * header_bytes(w);
}

// Where the scales of the group of `column` stand; minimums follow scale_bytes behind.
inline uint8_t* scales_of(const Matrix& w, uint8_t* strip, int column) {
  const int64_t block = column / kBlock, per_header = blocks_per_header(w);
  uint8_t* header = strip + block / per_header * (per_header * block_bytes(w.type) + header_bytes(w));
  const int second = w.group == 16 ? column % kBlock / 16 : 0;
  return header + second * scale_bytes(w) * (w.has_mins ? 2 : 1);
}

}  // namespace aios
