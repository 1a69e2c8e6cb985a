// Shares a product out to the threads of a team, and picks the kernel for each of its matrices.
#include "linear.h"

#include <algorithm>

#include "matmul_a16.h"

namespace aios {
namespace {

constexpr int64_t kTokensPerItem = 192;  // whole tiles

void matmul_a8(Team& team, const Matrix& w, const Activations& x, int64_t tokens, uint8_t* scratch,
                      const Epilogue& to) {
  const int64_t strips = num_strips(w);
  if (tokens <= kFewTokens) {
    const int64_t step = strips_per_item(strips, w.strip_bytes, team.size());
    return team.for_each((strips + step - 1) / step, [&](int64_t item) {
      const int64_t end = std::min(strips, (item + 1) * step);
      for (int64_t strip = item * step; strip < end; ++strip) rows_strip(w, x, strip, tokens, to);
    });
  }
  const int64_t panels = (strips + kPanelStrips - 1) / kPanelStrips;
  const int64_t pieces = (tokens + kTokensPerItem - 1) / kTokensPerItem;
  const int64_t step = pieces > 1 ? 1 : strips_per_item(panels, kPanelStrips * w.strip_bytes, team.size());
  const int64_t groups = (panels + step - 1) / step;
  team.for_each(groups * pieces, [&](int64_t item) {
    const int64_t begin = item % groups * step, end = std::min(panels, begin + step);
    const int64_t first = item / groups * kTokensPerItem, last = std::min(tokens, first + kTokensPerItem);
    for (int64_t p = begin; p < end; ++p) {
      const int64_t strip = p * kPanelStrips, after = strip + kPanelStrips;
      const int64_t upcoming = p + 1 < end ? std::min<int64_t>(kPanelStrips, strips - after) : 0;
      const Panel panel = unpack_panel(w, x, strip, scratch);
      a8_panel(w, x, panel, strip, first, last, strip_at(w, after), upcoming * w.strip_bytes, to);
    }
  });
}

void matmul_a16(Team& team, const Matrix& w, const Inputs& x, uint8_t* scratch, const Epilogue& to) {
  const int64_t strips = num_strips(w);
  const int64_t step = (strips_per_item(strips, w.strip_bytes, team.size()) + 1) / 2 * 2;
  team.for_each((strips + step - 1) / step, [&](int64_t item) {
    a16_item(w, item * step, std::min(strips, (item + 1) * step), x.floats, x.stride, x.tokens,
             reinterpret_cast<float*>(scratch), to);
  });
}

}  // namespace

void matmul(Team& team, const Linear& linear, const Inputs& x, uint8_t* scratch, Epilogue to) {
  for (int i = 0; i < linear.num_matrices; ++i) {
    const Matrix& w = linear.matrices[i];
    if (w.type < 4) matmul_float(team, w, x.floats, x.stride, x.tokens, to);
    else if (w.quantize_inputs) matmul_a8(team, w, *x.quantized, x.tokens, scratch, to);
    else matmul_a16(team, w, x, scratch, to);
    to.out += w.rows;
  }
}

}  // namespace aios
