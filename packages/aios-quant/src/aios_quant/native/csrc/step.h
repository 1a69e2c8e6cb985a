// One step of a whole decoder in one call: all layers for T packed tokens, on every thread of the pool.
//
// Called layer by layer from Python, the bundled model would need 400 calls a token and as many wake-ups; here the
// threads stay together from phase to phase. The code mirrors aios_model's decoder.py, which is its oracle:
//
//   x += output(attend(rotate(qkv(norm(x)))))
//   x += down(silu(gate(norm(x))) * up(norm(x)))
//
// Letters of shapes: T tokens, D model, F feed-forward, N query heads, K kv heads, H head size.
#pragma once

#include <algorithm>
#include <chrono>
#include <cstring>

#include "elementwise.h"
#include "linear.h"
#include "paged_attention.h"
#include "store_kv.h"

namespace aios {

// Mirrored by aios_quant/native/step.py; C layout.
struct Layer {
  const float* attention_norm;  // [D]
  const float* mlp_norm;        // [D]
  const float* query_norm;      // [H] or null
  const float* key_norm;        // [H] or null
  Linear qkv, output, gate_up, down;
  KvPool pages;
  float scale;                  // of query-key products
  int32_t window;               // 0: sees everything before it
};

struct Decoder {
  int32_t num_layers, hidden_size, intermediate_size, num_heads, num_kv_heads, head_dim;
  float eps;
  const Layer* layers;
  const float* final_norm;      // [D]; null in an earlier stage of a pipeline: hidden states leave as they are
  const float* rotations;       // [positions, H]: H/2 cosines, then H/2 sines
  // Adds up partial sums [count] over tensor-parallel ranks, in place; null on a single device.
  void (*reduce)(void* context, float* values, int64_t count);
  void* reduce_context;
  int64_t* layers_done;         // counted up after every layer, for whoever watches; or null
};

// What one step spent where, in seconds, as its first thread saw it.
enum Phase { kNorms, kQkv, kRotate, kAttend, kOutput, kGateUp, kActivate, kDown, kNumPhases };

// Buffers of one step. Everything lies in one stretch of memory that the caller provides.
struct StepBuffers {
  float *qkv, *attended, *gate_up;
  Activations model_inputs, attention_inputs, mlp_inputs;
  void* attention_scratch;
  uint8_t* thread_scratch;  // per thread: the products' own, then its own inputs as floats and as codes
  int64_t thread_scratch_bytes, own_floats_at, own_codes_at;
};

constexpr int64_t kOwnTokens = 2;  // up to so many, every thread prepares inputs for itself

class StepMemory {
 public:
  explicit StepMemory(uint8_t* memory) : memory_(memory) {}
  template <class T>
  T* take(int64_t count) {
    T* at = memory_ ? reinterpret_cast<T*>(memory_ + used_) : nullptr;
    used_ += (count * static_cast<int64_t>(sizeof(T)) + 63) / 64 * 64;
    return at;
  }
  int64_t used() const { return used_; }

 private:
  uint8_t* memory_;
  int64_t used_ = 0;
};

// Room for the quantised inputs of one kind of layer. All layers agree on group and step; some may want floats.
inline Activations take_activations(StepMemory& memory, const Decoder& model, Linear Layer::*kind, int64_t tokens) {
  for (int i = 0; i < model.num_layers; ++i) {
    const Linear& linear = model.layers[i].*kind;
    if (linear.group == 0) continue;
    Activations x = shape_activations(linear.columns, linear.group, linear.step);
    uint8_t* at = memory.take<uint8_t>(activation_bytes(x, tokens));
    if (at) place_activations(x, tokens, at);
    return x;
  }
  return {};
}

// Lays out the buffers in `memory`, or only counts (`memory` null); returns the bytes needed.
inline int64_t lay_out(const Decoder& model, const AttentionBatch& batch, int threads, uint8_t* memory,
                       StepBuffers& buffers) {
  StepMemory taken(memory);
  const int64_t tokens = batch.num_rows;
  const int64_t qkv = int64_t{model.num_heads + 2 * model.num_kv_heads} * model.head_dim;
  const int64_t attended = int64_t{model.num_heads} * model.head_dim, hidden = model.hidden_size;
  buffers.qkv = taken.take<float>(tokens * std::max(qkv, hidden));  // later a rank's partial sums
  buffers.attended = taken.take<float>(tokens * std::max(attended, hidden));  // before and after it norm(x)
  buffers.gate_up = taken.take<float>(tokens * 2 * model.intermediate_size);
  buffers.model_inputs = take_activations(taken, model, &Layer::gate_up, tokens);
  if (!buffers.model_inputs.group) buffers.model_inputs = take_activations(taken, model, &Layer::qkv, tokens);
  buffers.attention_inputs = take_activations(taken, model, &Layer::output, tokens);
  buffers.mlp_inputs = take_activations(taken, model, &Layer::down, tokens);
  int64_t attention = 0, scratch = 64;
  for (int i = 0; i < model.num_layers; ++i) {
    const Layer& l = model.layers[i];
    attention = std::max(attention, static_cast<int64_t>(
        attention_scratch_bytes(batch, l.pages, model.num_heads, threads)));
    for (const Linear* linear : {&l.qkv, &l.output, &l.gate_up, &l.down})
      scratch = std::max(scratch, linear_scratch_bytes(*linear));
  }
  buffers.attention_scratch = taken.take<uint8_t>(attention);
  int64_t own_codes = 64;
  for (const Activations* x : {&buffers.model_inputs, &buffers.attention_inputs, &buffers.mlp_inputs})
    own_codes = std::max(own_codes, activation_bytes(*x, kOwnTokens) + 64);
  const int64_t widest = std::max(std::max(attended, hidden), int64_t{model.intermediate_size});
  buffers.own_floats_at = round_up(scratch, 64);
  buffers.own_codes_at = buffers.own_floats_at + round_up(kOwnTokens * widest * sizeof(float), 64);
  buffers.thread_scratch_bytes = round_up(buffers.own_codes_at + own_codes, 64);
  buffers.thread_scratch = taken.take<uint8_t>(buffers.thread_scratch_bytes * threads);
  return taken.used();
}

// Runs the layers on one thread of the team; all threads run it together.
//
// A phase costs about a microsecond of waiting for the others, as much as normalising a token. So with few tokens every
// thread prepares the inputs of a product for itself, in memory of its own. A thread that comes late may prepare them
// from numbers that later phases have changed already; but then the phase has no items left that it could spoil.
class StepRun {
 public:
  StepRun(Team& team, const Decoder& model, const AttentionBatch& batch, const StepBuffers& buffers, float* x_TD,
          const int64_t* positions_T, double* seconds)
      : team_(team), model_(model), batch_(batch), buffers_(buffers), x_(x_TD), positions_(positions_T),
        tokens_(batch.num_rows), seconds_(team.rank() == 0 ? seconds : nullptr),
        scratch_(buffers.thread_scratch + team.rank() * buffers.thread_scratch_bytes),
        own_floats_(reinterpret_cast<float*>(scratch_ + buffers.own_floats_at)),
        own_codes_(scratch_ + buffers.own_codes_at) {}

  void run(float* hidden_TD) {
    mark();
    for (int i = 0; i < model_.num_layers; ++i) {
      attention(model_.layers[i]);
      mlp(model_.layers[i]);
      if (model_.layers_done && team_.rank() == 0) __atomic_fetch_add(model_.layers_done, 1, __ATOMIC_RELAXED);
    }
    const int size = model_.hidden_size;
    team_.for_each_in_runs(tokens_, [&](int64_t t) {
      if (model_.final_norm) rms_norm(x_ + t * size, model_.final_norm, hidden_TD + t * size, size, model_.eps);
      else std::memcpy(hidden_TD + t * size, x_ + t * size, size * sizeof(float));
    });
  }

 private:
  void attention(const Layer& layer) {
    const int heads = model_.num_heads, kv_heads = model_.num_kv_heads, head_dim = model_.head_dim;
    const int64_t width = int64_t{heads + 2 * kv_heads} * head_dim, query_width = int64_t{heads} * head_dim;
    matmul(team_, layer.qkv, normalise(layer.attention_norm, layer.qkv), scratch_, {buffers_.qkv, width, false});
    done(kQkv);
    rotate_and_store(layer, width);
    done(kRotate);
    attend(team_, batch_, layer.pages, buffers_.qkv, width, heads, layer.scale, layer.window, buffers_.attended,
           query_width, buffers_.attention_scratch);
    done(kAttend);
    const Inputs attended = prepare(layer.output, buffers_.attention_inputs, query_width, buffers_.attended, query_width,
                                    [&](int64_t t, float*) { return buffers_.attended + t * query_width; });
    add_product(layer.output, attended);
    done(kOutput);
  }

  void mlp(const Layer& layer) {
    const int64_t features = model_.intermediate_size;
    const Inputs normed = normalise(layer.mlp_norm, layer.gate_up);
    matmul(team_, layer.gate_up, normed, scratch_, {buffers_.gate_up, 2 * features, false});
    done(kGateUp);
    const auto activate = [&](int64_t t, float* out) {
      const float* gate = buffers_.gate_up + t * 2 * features;
      silu_and_multiply(gate, gate + features, out, static_cast<int>(features));
      return out;
    };
    // With many tokens the result takes the place of the gate.
    const Inputs activated =
        prepare(layer.down, buffers_.mlp_inputs, features, buffers_.gate_up, 2 * features, activate);
    done(kActivate);
    add_product(layer.down, activated);
    done(kDown);
  }

  Inputs normalise(const float* weight, const Linear& linear) {
    const int size = model_.hidden_size;
    // `attended` is free whenever something is normalised.
    const Inputs normed = prepare(linear, buffers_.model_inputs, size, buffers_.attended, size, [&](int64_t t, float* out) {
      rms_norm(x_ + t * size, weight, out, size, model_.eps);
      return out;
    });
    done(kNorms);
    return normed;
  }

  // The inputs of a product: row(t, out) gives token t's numbers, computed into `out` or where they already lie.
  template <class Row>
  Inputs prepare(const Linear& linear, const Activations& shared, int64_t width, float* floats, int64_t stride, Row row) {
    if (tokens_ > kOwnTokens) {
      team_.for_each_in_runs(tokens_, [&](int64_t t) {
        const float* numbers = row(t, floats + t * stride);
        if (linear.group) quantize_token(shared, t, numbers);
      });
      return {floats, stride, &shared, tokens_};
    }
    own_inputs_ = shared;
    if (linear.group) place_activations(own_inputs_, kOwnTokens, own_codes_);
    for (int64_t t = 0; t < tokens_; ++t) {
      float* out = own_floats_ + t * width;
      const float* numbers = row(t, out);
      if (linear.group) quantize_token(own_inputs_, t, numbers);
      else if (numbers != out) std::memcpy(out, numbers, width * sizeof(float));
    }
    return {own_floats_, width, &own_inputs_, tokens_};
  }

  void rotate_and_store(const Layer& layer, int64_t width) {
    float* keys = buffers_.qkv + int64_t{model_.num_heads} * model_.head_dim;
    float* values = keys + int64_t{model_.num_kv_heads} * model_.head_dim;
    const bool only_decodes = batch_.num_sequences == batch_.num_rows;  // then row t is sequence t
    team_.for_each_in_runs(tokens_, [&](int64_t t) {
      rotate_token(layer, buffers_.qkv + t * width, positions_[t]);
      if (!only_decodes) return;
      const Sequence& sequence = batch_.sequences[t];
      for (int head = 0; head < model_.num_kv_heads; ++head) {
        const int64_t at = t * width + int64_t{head} * model_.head_dim;
        store_head(layer.pages, sequence, sequence.start, head, keys + at, values + at);
      }
    });
    // Tokens of one prompt share lines of the pages: they are written sixteen by sixteen.
    if (!only_decodes) store_kv(team_, batch_, layer.pages, keys, values, width);
  }

  void rotate_token(const Layer& layer, float* heads, int64_t position) {
    const int head_dim = model_.head_dim;
    const float* cos = model_.rotations + position * head_dim;
    for (int h = 0; h < model_.num_heads + model_.num_kv_heads; ++h, heads += head_dim) {
      const float* norm = h < model_.num_heads ? layer.query_norm : layer.key_norm;
      if (norm) rms_norm(heads, norm, heads, head_dim, model_.eps);
      rotate(heads, cos, cos + head_dim / 2, head_dim);
    }
  }

  // x += product; with tensor parallelism the ranks' partial products are added up first.
  void add_product(const Linear& linear, const Inputs& inputs) {
    const int64_t size = model_.hidden_size;
    if (!model_.reduce) return matmul(team_, linear, inputs, scratch_, {x_, size, true});
    float* partial = buffers_.qkv;  // free by now
    matmul(team_, linear, inputs, scratch_, {partial, size, false});
    team_.for_each(1, [&](int64_t) { model_.reduce(model_.reduce_context, partial, tokens_ * size); });
    team_.for_each_in_runs(tokens_, [&](int64_t t) {
      for (int64_t i = t * size; i < (t + 1) * size; ++i) x_[i] += partial[i];
    });
  }

  void mark() {
    if (seconds_) last_ = std::chrono::steady_clock::now();
  }
  void done(Phase phase) {
    if (!seconds_) return;
    const auto now = std::chrono::steady_clock::now();
    seconds_[phase] += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

  Team& team_;
  const Decoder& model_;
  const AttentionBatch& batch_;
  const StepBuffers& buffers_;
  float* x_;
  const int64_t* positions_;
  int64_t tokens_;
  double* seconds_;
  uint8_t* scratch_;
  float* own_floats_;
  uint8_t* own_codes_;
  Activations own_inputs_{};
  std::chrono::steady_clock::time_point last_;
};

}  // namespace aios
