// C ABI of paged attention.
#include "paged_attention.h"
#include "store_kv.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

using aios::AttentionBatch;
using aios::KvPool;
using aios::Pool;
using aios::Team;

AIOS_EXPORT void aios_store_kv(void* pool, const AttentionBatch* batch, const KvPool* kv, const float* k,
                               const float* v, int64_t stride) {
  static_cast<Pool*>(pool)->run([&](Team& team) { aios::store_kv(team, *batch, *kv, k, v, stride); });
}

AIOS_EXPORT void aios_attend(void* pool, const AttentionBatch* batch, const KvPool* kv, const float* q,
                             int64_t q_stride, int32_t num_heads, float scale, int32_t window, float* out,
                             int64_t out_stride, void* scratch) {
  static_cast<Pool*>(pool)->run([&](Team& team) {
    aios::attend(team, *batch, *kv, q, q_stride, num_heads, scale, window, out, out_stride, scratch);
  });
}

AIOS_EXPORT int64_t aios_attention_scratch_bytes(const AttentionBatch* batch, const KvPool* kv, int32_t num_heads,
                                                 int32_t num_threads) {
  return static_cast<int64_t>(aios::attention_scratch_bytes(*batch, *kv, num_heads, num_threads));
}
