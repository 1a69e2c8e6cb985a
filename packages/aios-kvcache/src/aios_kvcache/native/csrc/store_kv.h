// New tokens' keys and values, rounded or quantised, into their pages.
#pragma once

#include <cstring>

#include "kv_pool.h"
#include "pool.h"
#include "quantize_head.h"

namespace aios {

inline void round_head(const float* x, int head_dim, uint16_t* out) {
  for (int i = 0; i < head_dim; i += kLanes) store_bf16(out + i, load_part(x + i, head_dim - i));
}

inline void store_head_float(const KvPool& pool, int64_t at, int lane, const float* k, const float* v) {
  float* keys = keys_at<float>(pool, at) + lane;
  for (int h = 0; h < pool.head_dim; ++h) keys[h * kLanes] = k[h];
  const int width = value_width(pool);
  float* values = values_at<float>(pool, at) + static_cast<int64_t>(lane) * width;
  for (int h = 0; h < width; h += kLanes) store(values + h, load_part(v + h, pool.head_dim - h));
}

inline void store_head_bf16(const KvPool& pool, int64_t at, int lane, const float* k, const float* v) {
  uint16_t rounded[kMaxHeadDim];
  round_head(k, pool.head_dim, rounded);
  uint16_t* keys = keys_at<uint16_t>(pool, at) + 2 * lane;
  for (int h = 0; h < pool.head_dim; h += 2) std::memcpy(keys + h * kLanes, rounded + h, 2 * sizeof(uint16_t));
  round_head(v, pool.head_dim, rounded);
  const int width = value_width(pool);
  uint16_t* values = values_at<uint16_t>(pool, at) + static_cast<int64_t>(lane) * width;
  int h = 0;
  for (; h + 2 * kLanes <= width; h += 2 * kLanes)
    for (int i = 0; i < kLanes; ++i) {
      values[h + 2 * i] = rounded[h + i];
      values[h + 2 * i + 1] = rounded[h + kLanes + i];
    }
  if (h < width) std::memcpy(values + h, rounded + h, kLanes * sizeof(uint16_t));
}

// Zeros up to the next sixteen.
inline void round_head(const float* x, int head_dim, uint8_t* out) {
  for (int i = 0; i < head_dim; i += kLanes) {
    float part[kLanes];
    store(part, load_part(x + i, head_dim - i));
    for (int j = 0; j < kLanes; ++j) out[i + j] = float_to_e4m3(part[j]);
  }
}

inline void store_head_fp8(const KvPool& pool, int64_t at, int lane, const float* k, const float* v) {
  uint8_t rounded[kMaxHeadDim];
  round_head(k, pool.head_dim, rounded);
  uint8_t* keys = keys_at<uint8_t>(pool, at) + lane;
  for (int h = 0; h < pool.head_dim; ++h) keys[h * kLanes] = rounded[h];
  round_head(v, pool.head_dim, values_at<uint8_t>(pool, at) + static_cast<int64_t>(lane) * value_width(pool));
}

inline void store_head_int8(const KvPool& pool, int64_t at, int lane, const float* k, const float* v) {
  int8_t codes[kMaxHeadDim];
  pool.key_scales[at * kLanes + lane] = quantize_head(k, pool.head_dim, codes);
  uint8_t* keys = keys_at<uint8_t>(pool, at) + 4 * lane;
  for (int h = 0; h < pool.head_dim; h += 4) {
    uint32_t quad;
    std::memcpy(&quad, codes + h, sizeof quad);
    quad ^= 0x80808080u;  // each code + 128
    std::memcpy(keys + h * kLanes, &quad, sizeof quad);
  }
  const int width = value_width(pool);
  pool.value_scales[at * kLanes + lane] = quantize_head(v, pool.head_dim, codes);
  int8_t* values = values_at<int8_t>(pool, at) + lane / 4 * 4 * width + lane % 4;
  for (int h = 0; h < width; ++h) values[4 * h] = codes[h];
}

// One token's key and value of one kv head (k and v point to that head) into the slot of its position. Two threads may
// store different tokens at the same time, but should not take turns within sixteen: those share cache lines.
inline void store_head(const KvPool& pool, const Sequence& sequence, int position, int kv_head, const float* k,
                       const float* v) {
  const int64_t at = sixteen_at(pool, sequence, kv_head, position / kLanes);
  const int lane = position % kLanes;
  switch (static_cast<KvType>(pool.type)) {
    case KvType::kBFloat16: return store_head_bf16(pool, at, lane, k, v);
    case KvType::kFp8: return store_head_fp8(pool, at, lane, k, v);
    case KvType::kInt8: return store_head_int8(pool, at, lane, k, v);
    default: return store_head_float(pool, at, lane, k, v);
  }
}

// Sixteens of its context into which a sequence writes.
inline int64_t num_written_sixteens(const Sequence& sequence) {
  return (sequence.start + sequence.length - 1) / kLanes - sequence.start / kLanes + 1;
}

// The tokens that one sequence puts into one sixteen, for kv heads [first_head, last_head).
inline void store_sixteen(const KvPool& pool, const Sequence& sequence, int64_t sixteen, int first_head, int last_head,
                          const float* k, const float* v, int64_t stride) {
  const int64_t from = (sequence.start / kLanes + sixteen) * kLanes - sequence.start;  // counted in the sequence's rows
  for (int64_t index = from < 0 ? 0 : from; index < from + kLanes && index < sequence.length; ++index)
    for (int head = first_head; head < last_head; ++head) {
      const int64_t at = (sequence.first_row + index) * stride + static_cast<int64_t>(head) * pool.head_dim;
      store_head(pool, sequence, sequence.start + static_cast<int>(index), head, k + at, v + at);
    }
}

// Collective: the batch's new keys and values, [T, K * H] float32 with `stride` numbers between rows, into their pages.
// An item is a sixteen of one sequence, or, where those are few, one head of it.
inline void store_kv(Team& team, const AttentionBatch& batch, const KvPool& pool, const float* k, const float* v,
                     int64_t stride) {
  constexpr int64_t kEnoughPerThread = 4;
  int64_t sixteens = 0;
  for (int i = 0; i < batch.num_sequences; ++i) sixteens += num_written_sixteens(batch.sequences[i]);
  const int pieces = sixteens < kEnoughPerThread * team.size() ? pool.num_kv_heads : 1;
  const int heads = pool.num_kv_heads / pieces;
  int at = 0;  // a thread's items come in ascending order: it never has to search from the start
  int64_t first = 0;
  team.for_each(sixteens * pieces, [&](int64_t item) {
    while (item >= first + num_written_sixteens(batch.sequences[at]) * pieces)
      first += num_written_sixteens(batch.sequences[at++]) * pieces;
    const int head = static_cast<int>((item - first) % pieces) * heads;
    store_sixteen(pool, batch.sequences[at], (item - first) / pieces, head, head + heads, k, v, stride);
  });
}

}  // namespace aios
