// Pages of keys and values as the native kernels keep them. `aios_kvcache/layout.py` describes the same layout.
//
// One layer's pool, X pages of C tokens (C a multiple of sixteen), K kv heads of H numbers (H even):
//
//   keys    [X, K, C/16, H, 16]   sixteen tokens side by side, so that a query meets sixteen keys at once: H FMAs in
//                                 order make sixteen scores, and nothing is ever summed across lanes
//   values  [X, K, C, W]          W = H rounded up to sixteen, zeros behind H
//   scales  [X, K, C]             int8 only: float32, one for keys and one for values
//
// BF16 is kept in pairs, because one 64-byte read, a shift and a mask then widen two vectors. Keys are
// [X, K, C/16, H/2, 16, 2], with numbers 2i and 2i+1 of the head as a pair; in values, numbers i and i+16 of each whole
// 32 are a pair.
//
// FP8 (E4M3, no scale) lies as float32 does, in bytes: one 32-byte read holds two vectors.
//
// INT8 is kept in fours, which is what one instruction multiplies and adds (`dot4`):
//
//   keys    [X, K, C/16, Hp/4, 16, 4]   Hp = H rounded up to four; code + 128, since one operand has to be unsigned
//   values  [X, K, C/4, W, 4]           four tokens side by side; codes with their sign, the weights have none
#pragma once

#include <cstddef>
#include <cstdint>

#include "e4m3.h"
#include "simd.h"

namespace aios {

enum class KvType : int32_t { kFloat32 = 0, kBFloat16 = 1, kInt8 = 2, kFp8 = 3 };

// The structures are C: Python fills them.
struct KvPool {
  void* keys;
  void* values;
  float* key_scales;  // null unless int8
  float* value_scales;
  int32_t type, num_kv_heads, head_dim, block_size;
};

// Tokens [start, start + length) of one sequence are rows first_row.. of the packed batch.
struct Sequence {
  int32_t start, length, first_row, num_blocks;
  const int32_t* block_table;
};

struct AttentionBatch {
  const Sequence* sequences;
  int32_t num_sequences, num_rows;
};

constexpr int64_t round_up(int64_t count, int64_t step) { return (count + step - 1) / step * step; }

// W: numbers between one token's values and the next's.
inline int value_width(const KvPool& pool) { return static_cast<int>(round_up(pool.head_dim, kLanes)); }

// Where the sixteen tokens from 16 * sixteen on of one sequence and kv head lie, counted in sixteens of one head.
inline int64_t sixteen_at(const KvPool& pool, const Sequence& sequence, int kv_head, int sixteen) {
  const int per_block = pool.block_size / kLanes;
  const int block = per_block == 1 ? sixteen : sixteen / per_block;  // a division takes longer than all the rest
  const int64_t share = int64_t{sequence.block_table[block]} * pool.num_kv_heads + kv_head;
  return share * per_block + sixteen - block * per_block;
}

// Numbers that the keys of one sixteen take.
inline int64_t key_size(const KvPool& pool) {
  const bool fours = static_cast<KvType>(pool.type) == KvType::kInt8;
  return (fours ? round_up(pool.head_dim, 4) : pool.head_dim) * kLanes;
}

template <class Number>
inline Number* keys_at(const KvPool& pool, int64_t at) {
  return static_cast<Number*>(pool.keys) + at * key_size(pool);
}
template <class Number>
inline Number* values_at(const KvPool& pool, int64_t at) {
  return static_cast<Number*>(pool.values) + at * value_width(pool) * kLanes;
}

// Asks for what will be read once: pages that pass through need not displace what other caches hold. (Kept only in the
// nearest, they arrive a fifth faster than with `prefetch`.)
inline void prefetch_once(const void* p) { __builtin_prefetch(p, 0, 0); }

// How the numbers of one type are read; those of FP8 times kE4m3Unit are the numbers.
//   key_pair   the keys h and h + 1 of sixteen tokens; h is even
//   values     16 * vectors of one token's values, from a multiple of 32 on; `vectors` is even except at the end of W
template <KvType type>
struct Storage;

template <>
struct Storage<KvType::kFloat32> {
  using Number = float;
  static void key_pair(const float* sixteen, int h, f32x16& even, f32x16& odd) {
    even = load(sixteen + h * kLanes);
    odd = load(sixteen + (h + 1) * kLanes);
  }
  template <int vectors>
  static void values(const float* token, f32x16 (&out)[vectors]) {
#pragma GCC unroll 8
    for (int i = 0; i < vectors; ++i) out[i] = load(token + i * kLanes);
  }
};

template <>
struct Storage<KvType::kFp8> {
  using Number = uint8_t;
  static void key_pair(const uint8_t* sixteen, int h, f32x16& even, f32x16& odd) {
    load_e4m3_units(sixteen + h * kLanes, even, odd);
  }
  template <int vectors>
  static void values(const uint8_t* token, f32x16 (&out)[vectors]) {
#pragma GCC unroll 4
    for (int i = 0; i + 1 < vectors; i += 2) load_e4m3_units(token + i * kLanes, out[i], out[i + 1]);
    if constexpr (vectors % 2 == 1) out[vectors - 1] = load_e4m3_units(token + (vectors - 1) * kLanes);
  }
};

template <>
struct Storage<KvType::kInt8> {
  using Number = int8_t;  // read four at a time, see integer_kernels.h
};

// Sixteen pairs of BF16, apart: the first of each, and the second of each.
inline void load_bf16_pairs(const uint16_t* p, f32x16& first, f32x16& second) {
#if defined(AIOS_ISA_AVX512)
  const __m512i pairs = _mm512_loadu_si512(p);
  first = _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16));
  second = _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
#elif defined(AIOS_ISA_AVX2)
  const __m256i mask = _mm256_set1_epi32(static_cast<int>(0xffff0000u));
  const __m256i a = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  const __m256i b = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 16));
  first = {_mm256_castsi256_ps(_mm256_slli_epi32(a, 16)), _mm256_castsi256_ps(_mm256_slli_epi32(b, 16))};
  second = {_mm256_castsi256_ps(_mm256_and_si256(a, mask)), _mm256_castsi256_ps(_mm256_and_si256(b, mask))};
#else
  for (int i = 0; i < kLanes; ++i) {
    first.v[i] = bf16_to_float(p[2 * i]);
    second.v[i] = bf16_to_float(p[2 * i + 1]);
  }
#endif
}

template <>
struct Storage<KvType::kBFloat16> {
  using Number = uint16_t;
  static void key_pair(const uint16_t* sixteen, int h, f32x16& even, f32x16& odd) {
    load_bf16_pairs(sixteen + h * kLanes, even, odd);
  }
  template <int vectors>
  static void values(const uint16_t* token, f32x16 (&out)[vectors]) {
#pragma GCC unroll 4
    for (int i = 0; i + 1 < vectors; i += 2) load_bf16_pairs(token + i * kLanes, out[i], out[i + 1]);
    if constexpr (vectors % 2 == 1) out[vectors - 1] = load_bf16(token + (vectors - 1) * kLanes);
  }
};

}  // namespace aios
