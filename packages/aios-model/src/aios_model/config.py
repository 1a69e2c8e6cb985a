"""What a decoder-only model looks like: the numbers that its code, its cache and the arithmetic about it need.

Field names are those of Hugging Face's `config.json`. `families/` translates the two file formats into this one record;
nothing here imports torch, so that a process that only validates requests stays small.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from aios_model.errors import ConfigError, UnsupportedModelError

RopeType = Literal["linear", "dynamic", "yarn", "llama3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the context a model was trained on.

    Attributes:
        rope_type: `linear` (Chen 2023), `dynamic` (NTK-aware), `yarn` (arXiv 2309.00071) or `llama3` (Llama 3.1).
        factor: Stretch of the context, 1.0 or more.
        original_max_position_embeddings: Context length of the pre-training, in tokens; for `yarn` and `llama3`.
        low_freq_factor: `llama3` only: wavelengths above original / low_freq_factor are divided by `factor`.
        high_freq_factor: `llama3` only: wavelengths below original / high_freq_factor stay as they are.
        beta_fast: `yarn` only: rotations over the original context above which a frequency stays as it is.
        beta_slow: `yarn` only: rotations below which a frequency is divided by `factor`.
        attention_factor: `yarn` only: multiplies cos and sin; computed from the factor when None.
        mscale: `yarn` only: numerator weight of the computed attention factor.
        mscale_all_dim: `yarn` only: denominator weight of the computed attention factor.
        truncate: `yarn` only: round the borders of the ramp to whole dimensions.
    """

    rope_type: RopeType
    factor: float = 1.0
    original_max_position_embeddings: int | None = None
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        if not (math.isfinite(self.factor) and self.factor >= 1.0):
            raise UnsupportedModelError(f"rope scaling factor must be 1.0 or more, got {self.factor}")
        if self.rope_type in ("yarn", "llama3") and not self.original_max_position_embeddings:
            raise UnsupportedModelError(f"rope type {self.rope_type!r} needs original_max_position_embeddings")


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerSpec:
    """What one layer needs of the cache: layers of one model may differ.

    Attributes:
        kind: How the layer remembers; `attention` keeps one key and one value per token and kv head.
        num_key_value_heads: Heads that keys and values have.
        head_dim: Numbers per head.
        window: Sliding window in tokens: query i sees key j when j <= i and i - j < window; None sees all.
        scale: What query-key products are multiplied with before the softmax.
        moe: Whether the layer's MLP is a mixture of experts.
    """

    kind: Literal["attention"] = "attention"
    num_key_value_heads: int
    head_dim: int
    window: int | None
    scale: float
    moe: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer: Llama, Mistral, Mixtral, Qwen2, Qwen3 or Qwen3-MoE.

    Attributes:
        architecture: Name of the family, as `model_type` in `config.json`.
        max_position_embeddings: Longest context the checkpoint declares, in tokens.
        qkv_bias: Whether the query, key and value projections have biases.
        output_bias: Whether the attention's output projection has a bias.
        mlp_bias: Whether the dense MLP's projections have biases.
        qk_norm: Whether queries and keys are RMS-normalised per head before the rotation (Qwen3).
        num_experts: Experts per mixture layer; 0 for dense models.
        num_experts_per_tok: Experts that each token visits.
        moe_intermediate_size: Width of one expert.
        norm_topk_prob: Whether the visited experts' weights are rescaled to sum to one.
        torch_dtype: Dtype the checkpoint declares, such as `bfloat16`; None if it does not say.
        layers: One spec per layer.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True
    torch_dtype: str | None = None
    layers: tuple[LayerSpec, ...] = field(repr=False)

    def __post_init__(self) -> None:
        self._check_positive(
            "vocab_size hidden_size intermediate_size num_attention_heads num_key_value_heads head_dim "
            "max_position_embeddings"
        )
        if not self.layers:
            raise UnsupportedModelError("the model config declares no layers (num_hidden_layers)")
        if self.num_attention_heads % self.num_key_value_heads:
            raise UnsupportedModelError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise UnsupportedModelError(f"head_dim = {self.head_dim} is odd; rotary embedding pairs dimensions")
        if not (self.rms_norm_eps > 0 and self.rope_theta > 0):
            raise UnsupportedModelError(
                f"rms_norm_eps = {self.rms_norm_eps} and rope_theta = {self.rope_theta} must be positive"
            )
        if any(layer.moe for layer in self.layers):
            self._check_positive("num_experts num_experts_per_tok moe_intermediate_size")
            if self.num_experts_per_tok > self.num_experts:
                raise UnsupportedModelError(
                    f"num_experts_per_tok = {self.num_experts_per_tok} exceeds num_experts = {self.num_experts}"
                )

    @property
    def num_hidden_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def max_context_length(self) -> int:
        """Longest context that can be asked for, in tokens; dynamic rope stretches beyond the declared one."""
        if self.rope_scaling is not None and self.rope_scaling.rope_type == "dynamic":
            return int(self.max_position_embeddings * self.rope_scaling.factor)
        return self.max_position_embeddings

    def kv_bytes_per_token(self, dtype_bytes: int) -> int:
        """Bytes of keys and values that one token leaves behind in all layers."""
        return sum(2 * layer.num_key_value_heads * layer.head_dim * dtype_bytes for layer in self.layers)

    def _check_positive(self, names: str) -> None:
        for name in names.split():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise UnsupportedModelError(f"model config: {name} must be a positive integer, got {value!r}")


def check_context_length(config: ModelConfig, max_model_len: int) -> None:
    """Raises ConfigError if a context of `max_model_len` tokens is more than the model can address."""
    if max_model_len > config.max_context_length:
        raise ConfigError(
            f"max_model_len = {max_model_len} exceeds the {config.max_context_length} tokens this model supports; "
            f"ask for {config.max_context_length} or less"
        )
