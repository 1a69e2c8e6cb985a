// Drawing one token from a row of logits: what `aios_model/sampling/truncation.py` defines, without sorting the row.
//
// A row is read two or three times, in pieces of fixed size that any thread may take:
//
//   measure     the largest logit; the largest of every lane of every block, which bound what a block can hold
//   greedy:     the first token that has the largest logit
//   random:     a race over the whole row (race.h)
//   truncated:  with top-p alone the row's mass; from it, or from the maxima where there is top-k, a threshold below
//               which no token is kept; what is above it is collected, cut exactly (ranking.h), and races
//
// Every number depends on its row alone: pieces are summed in their order, whoever has computed them.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdint>

#include "draw_scratch.h"
#include "race.h"
#include "ranking.h"

namespace aios {

// Mirrored by aios_model/sampling/native_draw.py; C layout.
struct DrawRow {
  int64_t seed, position;
  double top_p;       // 1: off
  int32_t index;      // which row of the logits
  int32_t top_k;      // 0: off
  float temperature;  // 0: greedy
  float max_depth;    // -log(min_p); infinity: off
};

// A thread of its own, in place of a team.
struct Alone {
  template <class Body>
  void for_each(int64_t count, Body&& body) {
    for (int64_t i = 0; i < count; ++i) body(i);
  }
};

class RowDraw {
 public:
  RowDraw(const float* logits, int64_t vocab, const DrawRow& row, const DrawScratch& scratch)
      : logits_(logits), vocab_(vocab), row_(row), scratch_(scratch), shared_(*scratch.row) {}

  // Draws into `token`, -1 if the largest logit is not finite, and writes that logit. Collective if `team` is a Team.
  template <class Team>
  void run(Team& team, int32_t* token, float* largest) const {
    const bool greedy = row_.temperature <= 0.0f, truncated = row_.top_p < 1.0 || has_top_k();
    const int64_t pieces = DrawScratch::num_pieces(vocab_);
    team.for_each(pieces, [&](int64_t i) { measure(i); });
    team.for_each(1, [&](int64_t) {
      settle_largest();
      *largest = shared_.largest;
      *token = shared_.top_token;
      if (!greedy && *token >= 0) shared_.least = least_kept();
    });
    if (greedy) return;
    if (truncated && !has_top_k()) {
      team.for_each(pieces, [&](int64_t i) { if (is_sound()) weigh(i); });
      team.for_each(1, [&](int64_t) { if (is_sound()) settle_mass(); });
    }
    team.for_each(pieces, [&](int64_t i) { if (is_sound()) truncated ? collect(i) : race(i); });
    team.for_each(1, [&](int64_t) { if (is_sound()) *token = truncated ? draw_from_collected() : first_of_pieces(); });
  }

 private:
  bool has_top_k() const { return row_.top_k > 0 && row_.top_k < vocab_; }
  bool is_sound() const { return shared_.top_token >= 0; }
  int64_t end_of(int64_t piece) const { return std::min((piece + 1) * kPieceTokens, vocab_); }
  NoiseKeys keys() const { return noise_keys(row_.seed, row_.position); }

  // Sixteen logits from `token` on; -inf past the end of the row.
  f32x16 read(int64_t token) const {
    const int64_t left = vocab_ - token;
    if (left >= kLanes) return load(logits_ + token);
    const int live = left > 0 ? static_cast<int>(left) : 0;
    return first_lanes(live, load_first(logits_ + token, live), splat(-INFINITY));
  }

  f32x16 depth(f32x16 logits) const {
    return div(sub(splat(shared_.largest), logits), splat(row_.temperature));
  }
  uint32_t above_min_p(f32x16 depth) const { return lanes_at_least(splat(row_.max_depth), depth); }

  void measure(int64_t piece) const {
    f32x16 largest = splat(-INFINITY);
    bool has_nan = false;
    for (int64_t token = piece * kPieceTokens; token < end_of(piece); token += kBlockTokens) {
      f32x16 block = splat(-INFINITY);
      for (int64_t i = token; i < token + kBlockTokens; i += 2 * kLanes) {
        const f32x16 a = read(i), b = read(i + kLanes);
        has_nan |= any_nan(a, b);
        block = max(block, max(a, b));
      }
      store(scratch_.maxima + token / kLanes, block);
      largest = max(largest, block);
    }
    scratch_.pieces[piece].largest = aios::largest(largest);
    scratch_.pieces[piece].has_nan = has_nan;
  }

  void settle_largest() const {
    float largest = -INFINITY;
    bool has_nan = false;
    for (int64_t i = 0; i < DrawScratch::num_pieces(vocab_); ++i) {
      largest = std::max(largest, scratch_.pieces[i].largest);
      has_nan |= scratch_.pieces[i].has_nan;
    }
    shared_.largest = has_nan ? NAN : largest;
    shared_.top_token = std::isfinite(shared_.largest) ? first_with(largest) : -1;
  }

  int32_t first_with(float largest) const {
    const f32x16 wanted = splat(largest);
    int64_t block = 0;
    while (!lanes_at_least(load(scratch_.maxima + block * kLanes), wanted)) ++block;
    int64_t token = block * kBlockTokens;
    uint32_t lanes = lanes_at_least(read(token), wanted);
    for (; !lanes; lanes = lanes_at_least(read(token), wanted)) token += kLanes;
    return static_cast<int32_t>(token + std::countr_zero(lanes));
  }

  // A logit below which min-p and top-k keep nothing; not quite the highest.
  float least_kept() const {
    double reach = static_cast<double>(row_.max_depth) * row_.temperature;
    if (has_top_k()) reach = std::min(reach, reach_of_top_k());
    return least_within(reach);
  }

  // Below the largest logit by `reach` and by as much as logits differ that are equally deep, once rounded.
  float least_within(double reach) const {
    const double least = shared_.largest - reach * (1.0 + 1e-6);
    return least > -FLT_MAX ? std::nextafter(static_cast<float>(least), -FLT_MAX) : -FLT_MAX;
  }

  // So far below the largest lies the k-th of the lanes' maxima: k tokens at least are no further.
  double reach_of_top_k() const {
    const int64_t count = DrawScratch::num_blocks(vocab_) * kLanes;
    if (row_.top_k >= count) return INFINITY;
    for (int64_t i = 0; i < count; i += kLanes)
      store(scratch_.values + i, sub(splat(shared_.largest), load(scratch_.maxima + i)));
    return HeadFinder(scratch_.spare).find(scratch_.values, count, row_.top_k, false).depth;
  }

  void weigh(int64_t piece) const {
    double mass = 0.0;
    for (int64_t token = piece * kPieceTokens; token < end_of(piece); token += kBlockTokens) {
      f32x16 even = splat(0.0f), odd = splat(0.0f);
      for (int64_t i = token; i < token + kBlockTokens; i += 2 * kLanes) {
        even = add(even, kept_weight(read(i)));
        odd = add(odd, kept_weight(read(i + kLanes)));
      }
      mass += sum(add(even, odd));
    }
    scratch_.pieces[piece].mass = mass;
  }

  f32x16 kept_weight(f32x16 logits) const {
    const f32x16 below = sub(splat(0.0f), depth(logits));
    return zero_where_less(below, -row_.max_depth, exp(below));
  }

  void settle_mass() const {
    shared_.mass = 0.0;
    for (int64_t i = 0; i < DrawScratch::num_pieces(vocab_); ++i) shared_.mass += scratch_.pieces[i].mass;
    // Tokens deeper than this hold less than 1 - top_p all together, so top-p keeps none of them. Less a millionth, for
    // sums are rounded.
    const double spare = (1.0 - row_.top_p - 1e-6) * shared_.mass / static_cast<double>(vocab_);
    if (spare > 0.0) shared_.least = std::max(shared_.least, least_within(-std::log(spare) * row_.temperature));
  }

  void race(int64_t piece) const {
    const WeightBound bound(shared_.largest, row_.temperature);
    const f32x16 least = splat(shared_.least);
    Race race(keys());
    race.run(splat(shared_.top_token), splat(1.0f), 1);
    i32x16 tokens = add(splat(static_cast<int32_t>(piece * kPieceTokens)), lane_numbers());
    for (int64_t i = piece * kPieceTokens; i < end_of(piece); i += kLanes) {
      const f32x16 logits = read(i);
      uint32_t lanes = race.contenders(tokens, bound(logits)) & lanes_at_least(logits, least);
      if (lanes) {
        const f32x16 depths = depth(logits);
        lanes &= above_min_p(depths);
        race.run(tokens, weight_of(depths), lanes);
      }
      tokens = add(tokens, splat(int32_t{kLanes}));
    }
    scratch_.pieces[piece].winner = race.winner();
  }

  int32_t first_of_pieces() const {
    Winner best;
    for (int64_t i = 0; i < DrawScratch::num_pieces(vocab_); ++i)
      if (beats(scratch_.pieces[i].winner, best)) best = scratch_.pieces[i].winner;
    return best.token;
  }

  void collect(int64_t piece) const {
    const f32x16 least = splat(shared_.least);
    int64_t at = DrawScratch::piece_start(piece);
    for (int64_t token = piece * kPieceTokens; token < end_of(piece); token += kBlockTokens) {
      if (!lanes_at_least(load(scratch_.maxima + token / kLanes), least)) continue;
      for (int64_t i = token; i < token + kBlockTokens; i += kLanes) {
        const f32x16 logits = read(i);
        const uint32_t lanes = lanes_at_least(logits, least);
        if (!lanes) continue;
        pack_lanes(scratch_.values + at, logits, lanes);
        pack_lanes(scratch_.tokens + at, add(splat(static_cast<int32_t>(i)), lane_numbers()), lanes);
        at += std::popcount(lanes);
      }
    }
    scratch_.pieces[piece].num_collected = at - DrawScratch::piece_start(piece);
  }

  int32_t draw_from_collected() const {
    int64_t n = rank_collected();
    HeadFinder head(scratch_.spare);
    if (has_top_k() && row_.top_k < n) n = keep(head.find(scratch_.values, n, row_.top_k, false), n);
    if (row_.top_p < 1.0) {
      const double mass = has_top_k() ? mass_of_collected(n) : shared_.mass;
      n = keep(head.find(scratch_.values, n, row_.top_p * mass, true), n);
    }
    Race race(keys());
    for (int64_t i = 0; i < n; i += kLanes) {
      const i32x16 tokens = load(scratch_.tokens + i);
      const f32x16 weights = weight_of(load(scratch_.values + i));
      const uint32_t lanes = race.contenders(tokens, weights) & first_live(n - i);
      if (lanes) race.run(tokens, weights, lanes);
    }
    return race.winner().token;
  }

  double mass_of_collected(int64_t n) const {
    double mass = 0.0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const int live = static_cast<int>(std::min<int64_t>(n - i, kLanes));
      mass += sum(first_lanes(live, weight_of(load(scratch_.values + i)), splat(0.0f)));
    }
    return mass;
  }

  // Moves the collections of all pieces together, as depths, without what min-p excludes; how many.
  // Nothing is overwritten before it is read: what is written never lies behind it.
  int64_t rank_collected() const {
    int64_t n = 0;
    for (int64_t piece = 0; piece < DrawScratch::num_pieces(vocab_); ++piece) {
      const int64_t start = DrawScratch::piece_start(piece), count = scratch_.pieces[piece].num_collected;
      for (int64_t i = 0; i < count; i += kLanes) {
        const f32x16 depths = depth(load(scratch_.values + start + i));
        const i32x16 tokens = load(scratch_.tokens + start + i);
        n += append(n, depths, tokens, above_min_p(depths) & first_live(count - i));
      }
    }
    return n;
  }

  // Drops all but the head; how many are left.
  int64_t keep(const Cut& cut, int64_t n) const {
    const f32x16 deepest = splat(cut.depth);
    int64_t ties = cut.ties, kept = 0;
    for (int64_t i = 0; i < n; i += kLanes) {
      const f32x16 depths = load(scratch_.values + i);
      uint32_t lanes = lanes_at_least(deepest, depths) & first_live(n - i);
      for (uint32_t tied = lanes & lanes_at_least(depths, deepest); tied; tied &= tied - 1)
        if (ties-- <= 0) lanes &= ~(tied & (~tied + 1));
      kept += append(kept, depths, load(scratch_.tokens + i), lanes);
    }
    return kept;
  }

  int64_t append(int64_t at, f32x16 depths, i32x16 tokens, uint32_t lanes) const {
    pack_lanes(scratch_.values + at, depths, lanes);
    pack_lanes(scratch_.tokens + at, tokens, lanes);
    return std::popcount(lanes);
  }

  const float* logits_;
  const int64_t vocab_;
  const DrawRow& row_;
  const DrawScratch& scratch_;
  DrawScratch::Row& shared_;
};

}  // namespace aios
