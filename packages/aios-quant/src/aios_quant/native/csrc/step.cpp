// C ABI of the fused step.
#include "step.h"

#define AIOS_EXPORT extern "C" __attribute__((visibility("default")))

using namespace aios;

// Bytes of working memory that aios_step needs for a batch.
AIOS_EXPORT int64_t aios_step_bytes(void* pool, const Decoder* model, const AttentionBatch* batch) {
  StepBuffers buffers{};
  return lay_out(*model, *batch, static_cast<Pool*>(pool)->size(), nullptr, buffers);
}

// Runs all layers over x [T, D], which they change, and writes the normalised hidden states [T, D]. `seconds`
// [kNumPhases] is added to, or null.
AIOS_EXPORT void aios_step(void* pool, const Decoder* model, const AttentionBatch* batch, float* x,
                           const int64_t* positions, float* hidden, uint8_t* memory, double* seconds) {
  Pool& threads = *static_cast<Pool*>(pool);
  StepBuffers buffers{};
  lay_out(*model, *batch, threads.size(), memory, buffers);
  threads.run([&](Team& team) { StepRun(team, *model, *batch, buffers, x, positions, seconds).run(hidden); });
}
