// The memory of one draw: all that outlives a phase of it. Used again for the next row.
#pragma once

#include <cstdint>

#include "race.h"

namespace aios {

constexpr int64_t kBlockTokens = 16 * kLanes, kPieceTokens = 64 * kBlockTokens;

class DrawScratch {
 public:
  struct Row {
    float largest;      // NaN if any logit is
    int32_t top_token;  // the first with that logit; -1 if it is not finite
    float least;        // no logit below it is kept
    double mass;        // of all tokens that min-p leaves, the largest weighing 1; for top-p alone
  };
  struct Piece {
    float largest;
    bool has_nan;
    double mass;
    Winner winner;
    int64_t num_collected;
  };

  DrawScratch(void* memory, int64_t vocab) : next_(reinterpret_cast<uintptr_t>(memory)) {
    const int64_t tokens_and_gaps = piece_start(num_pieces(vocab));
    row = take<Row>(1);
    pieces = take<Piece>(num_pieces(vocab));
    maxima = take<float>(num_blocks(vocab) * kLanes);
    values = take<float>(tokens_and_gaps);
    tokens = take<int32_t>(tokens_and_gaps);
    spare = take<float>(tokens_and_gaps);
  }

  // How many bytes of memory that takes.
  static int64_t bytes(int64_t vocab) { return static_cast<int64_t>(DrawScratch(nullptr, vocab).next_); }

  static int64_t num_blocks(int64_t vocab) { return (vocab + kBlockTokens - 1) / kBlockTokens; }
  static int64_t num_pieces(int64_t vocab) { return (vocab + kPieceTokens - 1) / kPieceTokens; }
  // Where a piece's collection begins: `pack_lanes` may write past its end.
  static int64_t piece_start(int64_t piece) { return piece * (kPieceTokens + kLanes); }

  Row* row;
  Piece* pieces;
  float* maxima;     // [blocks, 16]: the largest of every lane
  float* values;     // what is collected: logits, piece by piece; then depths, all side by side
  int32_t* tokens;   // likewise
  float* spare;      // for `HeadFinder`

 private:
  template <class Item>
  Item* take(int64_t count) {
    auto* const array = reinterpret_cast<Item*>(next_);
    next_ += (static_cast<uintptr_t>(count) * sizeof(Item) + 63) / 64 * 64;
    return array;
  }

  uintptr_t next_;
};

}  // namespace aios
