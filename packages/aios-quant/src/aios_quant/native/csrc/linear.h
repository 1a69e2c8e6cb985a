// A Linear layer as the kernels see it: one matrix, or several stacked along their rows (a GGUF may keep V in another
// encoding than Q and K), over one input.
#pragma once

#include <algorithm>

#include "matmul_a8.h"
#include "pool.h"

namespace aios {

// Mirrored by aios_quant/native/matrix.py; C layout.
struct Linear {
  const Matrix* matrices;
  int32_t num_matrices;
  int32_t columns;     // K
  int32_t group, step; // of the quantised activations; 0 if no matrix wants them
};

// Working memory of one thread: an unpacked panel.
inline int64_t linear_scratch_bytes(const Linear& linear) {
  int64_t most = 64;
  for (int i = 0; i < linear.num_matrices; ++i) {
    const Matrix& w = linear.matrices[i];
    if (w.type < 4) continue;
    const Activations x = shape_activations(w.columns, std::max(linear.group, 32), std::max(linear.step, 16));
    most = std::max(most, std::max<int64_t>(panel_bytes(w, x), 2 * sizeof(float) * kLanes * padded_columns(w)));
  }
  return (most + 63) / 64 * 64;
}

// The activations of one product: as floats, and quantised if some matrix wants them so.
struct Inputs {
  const float* floats;  // [T, K]
  int64_t stride;
  const Activations* quantized;
  int64_t tokens;
};

// Collective: out [T, N] (+)= x Wᵀ. `scratch` is this thread's own, linear_scratch_bytes long.
void matmul(Team& team, const Linear& linear, const Inputs& x, uint8_t* scratch, Epilogue to);

}  // namespace aios
