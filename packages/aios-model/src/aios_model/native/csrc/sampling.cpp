// C ABI of sampling.
#include "sampling.h"

#include "pool.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

using namespace aios;

// Bytes that one thread needs to draw from `vocab` tokens.
AIOS_EXPORT int64_t aios_draw_scratch_bytes(int64_t vocab) { return DrawScratch::bytes(vocab); }

// One token per row: tokens and largest are [num_rows], scratch `aios_draw_scratch_bytes` for each thread of the pool.
// Returns how many rows have no token (-1), since their largest logit is not finite; it is NaN if any logit is.
AIOS_EXPORT int32_t aios_draw(void* pool, const float* logits, int64_t row_stride, int64_t vocab, const DrawRow* rows,
                              int32_t num_rows, int32_t* tokens, float* largest, void* scratch) {
  const auto draw = [&](auto& team, int64_t i, const DrawScratch& memory) {
    RowDraw(logits + rows[i].index * row_stride, vocab, rows[i], memory).run(team, tokens + i, largest + i);
  };
  static_cast<Pool*>(pool)->run([&](Team& team) {
    const int64_t bytes = DrawScratch::bytes(vocab);
    // Row by row all together while rows are few: then every pass over a row is shared out.
    if (num_rows < team.size()) {
      const DrawScratch memory(scratch, vocab);
      for (int64_t i = 0; i < num_rows; ++i) draw(team, i, memory);
      return;
    }
    const DrawScratch memory(static_cast<uint8_t*>(scratch) + team.rank() * bytes, vocab);
    Alone alone;
    team.for_each(num_rows, [&](int64_t i) { draw(alone, i, memory); });
  });
  return static_cast<int32_t>(std::count(tokens, tokens + num_rows, -1));
}
