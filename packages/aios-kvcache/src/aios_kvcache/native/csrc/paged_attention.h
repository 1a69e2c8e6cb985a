// PagedAttention (Kwon et al. 2023, arXiv 2309.06180) for a batch of decodes and chunks of prompts.
//
// Bitwise the same for a row alone and in any batch, for a prompt whole and in chunks, and for any number of threads:
// the context is cut into segments of 256 tokens at fixed positions, a segment's numbers are computed in one order by
// whoever computes them, and segments are merged from the first to the last.
//
// A batch is cut into items of work: (sequence, kv head, tile of tokens). An item that is much of all the work is cut
// into its segments too, whose partial results wait in the scratch to be merged.
#pragma once

#include "attend_decode.h"
#include "attend_prefill.h"
#include "pool.h"

namespace aios {

constexpr int kItemsPerThread = 4;  // an item of more than such a share of a thread's work is cut into segments ...
constexpr int kMaxSplitRows = 96;   // ... unless it has more rows, which would leave too many partial results

// One sequence's share of the work.
struct SequencePlan {
  int tiles, first_segment, segments = 1;
  bool one_token, split, all_heads;  // split into segments, or one item for all kv heads
  int64_t work, items, partials = 0;  // of one kv head and tile; number of items; numbers of partial results

  // Splits where an item's work, measured without the window, is more than `limit`. All kv heads of a decode are one
  // item if that is not: they lie side by side in the pages, and while one is read the next can be asked for.
  SequencePlan(const AttentionCall& call, const Sequence& sequence, int64_t limit)
      : tiles(sequence.length == 1 ? 1 : num_tiles(sequence, call.group())),
        first_segment(call.first_visible(sequence.start) / kSegment),
        one_token(sequence.length == 1) {
    const int last_segment = (sequence.start + sequence.length - 1) / kSegment, heads = call.pool.num_kv_heads;
    const int64_t rows = static_cast<int64_t>(sequence.length) * call.group();
    work = static_cast<int64_t>(last_segment + 1) * (tiles == 1 ? sequence.length : tile_tokens(call.group()));
    split = work > limit && tiles == 1 && rows <= kMaxSplitRows && last_segment > first_segment;
    all_heads = one_token && work <= limit / heads;
    items = static_cast<int64_t>(tiles) * (all_heads ? 1 : heads);
    if (!split) return;
    segments = last_segment - first_segment + 1;
    items *= segments;
    partials = rows * segments * heads * call.partial();
  }
};

constexpr int64_t kNoLimit = INT64_MAX;

struct BatchPlan {
  bool chunks = false;
  int64_t limit = kNoLimit, items = 0, partials = 0, merges = 0;

  BatchPlan(const AttentionCall& call, const AttentionBatch& batch, int num_threads) {
    int64_t work = 0;
    for (int i = 0; i < batch.num_sequences; ++i) {
      const SequencePlan plan(call, batch.sequences[i], kNoLimit);
      work += plan.tiles * call.pool.num_kv_heads * plan.work;
      chunks = chunks || !plan.one_token;
    }
    if (num_threads > 1) limit = work / (static_cast<int64_t>(kItemsPerThread) * num_threads);
    for (int i = 0; i < batch.num_sequences; ++i) {
      const SequencePlan plan(call, batch.sequences[i], limit);
      items += plan.items;
      partials += plan.partials;
      if (plan.split) merges += static_cast<int64_t>(batch.sequences[i].length) * call.pool.num_kv_heads;
    }
  }

  // Numbers of working memory that each thread needs.
  int64_t working(const AttentionCall& call) const {
    const int64_t decode = DecodeScratch::size(call), tile = chunks ? TileScratch::size(call) : 0;
    return round_up(decode > tile ? decode : tile, kLanes);
  }
};

inline size_t attention_scratch_bytes(const AttentionBatch& batch, const KvPool& pool, int num_heads, int num_threads) {
  AttentionCall call{};  // without a window: with one, the same sequences are split, into fewer segments
  call.pool = pool;
  call.num_heads = num_heads;
  const BatchPlan plan(call, batch, num_threads);
  return static_cast<size_t>(num_threads * plan.working(call) + plan.partials) * sizeof(float) + 64;
}

// Merges what the segments left of one token and kv head.
inline void merge_segments(const AttentionCall& call, const Sequence& sequence, const SequencePlan& plan, int kv_head,
                           int token, float* partials, float* scratch) {
  const int group = call.group(), width = value_width(call.pool), position = sequence.start + token;
  const int64_t per_segment = static_cast<int64_t>(sequence.length) * group * call.partial();
  const Partial merged{scratch};
  for (int g = 0; g < group; ++g) {
    clear(merged, width);
    for (int s = 0; s < plan.segments; ++s) {
      if (call.visible(position, plan.first_segment + s).empty()) continue;
      const int64_t at = (kv_head * plan.segments + s) * per_segment + (token * group + g) * call.partial();
      merge(merged, Partial{partials + at}, width);
    }
    finish(merged, call.pool.head_dim, call.unit(), call.output(sequence.first_row + token, kv_head * group + g));
  }
}

// Collective: attends from all rows of the batch over what is stored, their own keys and values included.
// q, out: [T, N * H] float32 with q_stride and out_stride numbers between rows. window: a row sees so many tokens,
// itself included; 0: all. scratch: attention_scratch_bytes(...) bytes for team.size() threads, shared by the team.
inline void attend(Team& team, const AttentionBatch& batch, const KvPool& pool, const float* q, int64_t q_stride,
                   int num_heads, float scale, int32_t window, float* out, int64_t out_stride, void* scratch) {
  const AttentionCall call{pool, q, q_stride, num_heads, scale, window, out, out_stride};
  const BatchPlan plan(call, batch, team.size());
  auto* memory = reinterpret_cast<float*>(round_up(reinterpret_cast<intptr_t>(scratch), 64));
  float* working = memory + team.rank() * plan.working(call);
  float* partials = memory + team.size() * plan.working(call);
  // From the last item to the first: chunks of prompts usually stand behind decodes, and what takes long should not be
  // begun last. A thread's items come in this order, so it never has to search for the sequence from the end.
  int at = batch.num_sequences;
  int64_t first = plan.items, first_partial = plan.partials;
  team.for_each(plan.items, [&](int64_t reversed) {
    const int64_t item = plan.items - 1 - reversed;
    while (item < first) {
      const SequencePlan before(call, batch.sequences[--at], plan.limit);
      first -= before.items;
      first_partial -= before.partials;
    }
    const Sequence& sequence = batch.sequences[at];
    const SequencePlan share(call, sequence, plan.limit);
    const int64_t index = item - first, per_head = share.all_heads ? 1 : share.items / pool.num_kv_heads;
    const int kv_head = static_cast<int>(index / per_head), within = static_cast<int>(index % per_head);
    const int segment = share.first_segment + within;
    const Tile tile(call, sequence, kv_head, share.split ? 0 : within);
    float* to = partials + first_partial + index * sequence.length * call.group() * call.partial();
    const auto at_segment = [&](int number) { return Segment{&sequence, kv_head, number}; };
    if (share.all_heads) {
      decode_all_heads(call, sequence, batch.sequences[at < team.size() ? 0 : at - team.size()], working);
    } else if (share.one_token) {
      const Segment here = at_segment(segment), next = at_segment(segment - team.size());
      if (share.split) decode_one_segment(call, here, next, working, to);
      else decode(call, sequence, kv_head, here, working);
    } else if (share.split) {
      prefill_one_segment(call, tile, segment, working, to);
    } else {
      prefill(call, tile, working);
    }
  });
  if (plan.merges == 0) return;
  at = 0;
  first = first_partial = 0;
  team.for_each(plan.merges, [&](int64_t item) {
    for (;; ++at) {
      const SequencePlan share(call, batch.sequences[at], plan.limit);
      const int64_t mine = share.split ? batch.sequences[at].length * pool.num_kv_heads : 0;
      if (item < first + mine) {
        const int token = static_cast<int>(item - first) / pool.num_kv_heads;
        const int kv_head = static_cast<int>(item - first) % pool.num_kv_heads;
        return merge_segments(call, batch.sequences[at], share, kv_head, token, partials + first_partial, working);
      }
      first += mine;
      first_partial += share.partials;
    }
  });
}

}  // namespace aios
