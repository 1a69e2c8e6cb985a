"""The arithmetic of a model: what it weighs, what a token costs, and how fast a machine could possibly make one.

Decoding one sequence reads every active weight once per token and does two operations with each, so a 7B model needs
about 14 GFLOP per token and, in BF16, 14 GB of reading: on any machine the reading takes longer. Batching shares the
reading among sequences until the operations take as long. Torch is not needed for any of this.
"""

from __future__ import annotations

from dataclasses import dataclass

from aios_model.config import LayerSpec, ModelConfig
from aios_model.errors import ConfigError
from aios_model.hardware import Hardware


@dataclass(frozen=True, slots=True, kw_only=True)
class PartCount:
    """Parameters of one part of the model.

    Attributes:
        name: The part.
        parameters: How many numbers it has.
        active: How many of them one token's matrix products use: rows looked up do not count, nor experts not visited.
    """

    name: str
    parameters: int
    active: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Roofline:
    """How fast a machine could decode at best.

    Attributes:
        hardware: The machine.
        bytes_per_token: Read for one token of one sequence: active weights and the context's keys and values.
        seconds_reading: Time to read them.
        seconds_computing: Time for the token's operations.
        tokens_per_second: One over the longer of the two.
        balanced_batch: Sequences decoded together at which operations take as long as reading the weights.
        max_context_tokens: Tokens of KV cache that fit beside the weights; 0 if the weights alone do not fit.
    """

    hardware: Hardware
    bytes_per_token: float
    seconds_reading: float
    seconds_computing: float
    tokens_per_second: float
    balanced_batch: int
    max_context_tokens: int


def count_parameters(config: ModelConfig) -> list[PartCount]:
    """Parameters by part, in the order in which a token meets them."""
    table = config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    parts = [
        PartCount(name="embedding", parameters=table, active=0),
        _attention(config),
        _dense_mlp(config),
        _experts(config),
        PartCount(name="norms", parameters=norms, active=norms),
        PartCount(name="head", parameters=0 if config.tie_word_embeddings else table, active=table),
    ]
    return [part for part in parts if part.active or part.parameters]


def num_parameters(config: ModelConfig) -> int:
    """All parameters; a tied head counts once."""
    return sum(part.parameters for part in count_parameters(config))


def active_parameters(config: ModelConfig) -> int:
    """Parameters that one token's forward pass reads, the head included and the embedding table excluded."""
    return sum(part.active for part in count_parameters(config))


def flops_per_token(config: ModelConfig, *, context: int) -> int:
    """Operations of one token's forward pass behind `context` tokens: 2 per active weight, 4 per cached pair."""
    return 2 * active_parameters(config) + sum(_attention_flops(config, spec, context) for spec in config.layers)


def kv_bytes(config: ModelConfig, *, context: int, dtype_bytes: int) -> int:
    """Bytes of keys and values that a token reads back with `context` tokens before it; windows bound it."""
    return sum(
        2 * spec.num_key_value_heads * spec.head_dim * dtype_bytes * _visible(spec, context) for spec in config.layers
    )


def roofline(
    config: ModelConfig, hardware: Hardware, *, context: int, bytes_per_weight: float, kv_dtype_bytes: int
) -> Roofline:
    """The limit of `hardware` for decoding one sequence.

    Args:
        config: The model's.
        hardware: The machine's limits.
        context: Tokens in the cache.
        bytes_per_weight: 4 for float32, 2 for BF16, 1 for INT8, about 0.56 for 4 bits with group scales.
        kv_dtype_bytes: Bytes of one cached number.
    """
    if context < 1 or bytes_per_weight <= 0:
        raise ConfigError(f"context = {context} and bytes per weight = {bytes_per_weight} must be positive")
    weights = active_parameters(config) * bytes_per_weight
    num_bytes = weights + kv_bytes(config, context=context, dtype_bytes=kv_dtype_bytes)
    reading = num_bytes / hardware.bandwidth
    computing = flops_per_token(config, context=context) / hardware.flops
    free = hardware.memory_bytes - num_parameters(config) * bytes_per_weight
    return Roofline(
        hardware=hardware,
        bytes_per_token=num_bytes,
        seconds_reading=reading,
        seconds_computing=computing,
        tokens_per_second=1 / max(reading, computing),
        balanced_batch=max(1, round(weights / hardware.bandwidth / (2 * active_parameters(config) / hardware.flops))),
        max_context_tokens=max(0, int(free // config.kv_bytes_per_token(kv_dtype_bytes))),
    )


def _attention(config: ModelConfig) -> PartCount:
    total = 0
    for spec in config.layers:
        queries, keys = config.num_attention_heads * spec.head_dim, spec.num_key_value_heads * spec.head_dim
        total += config.hidden_size * (2 * queries + 2 * keys)
        total += (queries + 2 * keys) * config.qkv_bias + config.hidden_size * config.output_bias
        total += 2 * spec.head_dim * config.qk_norm
    return PartCount(name="attention", parameters=total, active=total)


def _dense_mlp(config: ModelConfig) -> PartCount:
    layers = sum(not spec.moe for spec in config.layers)
    one = 3 * config.hidden_size * config.intermediate_size
    one += (2 * config.intermediate_size + config.hidden_size) * config.mlp_bias
    return PartCount(name="mlp", parameters=layers * one, active=layers * one)


def _experts(config: ModelConfig) -> PartCount:
    layers = sum(spec.moe for spec in config.layers)
    router = config.hidden_size * config.num_experts
    expert = 3 * config.hidden_size * config.moe_intermediate_size
    return PartCount(
        name="experts",
        parameters=layers * (router + config.num_experts * expert),
        active=layers * (router + config.num_experts_per_tok * expert),
    )


def _attention_flops(config: ModelConfig, spec: LayerSpec, context: int) -> int:
    return 4 * config.num_attention_heads * spec.head_dim * _visible(spec, context)


def _visible(spec: LayerSpec, context: int) -> int:
    return context if spec.window is None else min(context, spec.window)
