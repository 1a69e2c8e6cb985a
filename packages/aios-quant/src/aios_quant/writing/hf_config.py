"""A `config.json` from a `ModelConfig`: the way back from `Family.read_hf`, for models that came without one (GGUF).

What is written is read again at once and must give the same `ModelConfig`; a model that the format cannot express is
refused rather than approximated. No torch here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from aios_model.config import ModelConfig, RopeScaling
from aios_model.errors import UnsupportedModelError
from aios_model.families import family_named


def hf_config(
    config: ModelConfig,
    *,
    dtype: str,
    tie_word_embeddings: bool | None = None,
    token_ids: Mapping[str, int | list[int]] | None = None,
) -> dict[str, Any]:
    """The `config.json` of a model.

    Args:
        config: What it looks like.
        dtype: Of its unquantised tensors, such as `bfloat16`.
        tie_word_embeddings: Whether the head is the embedding; None for what `config` says.
        token_ids: `bos_token_id`, `eos_token_id` and `pad_token_id`, where the model has them.

    Raises:
        UnsupportedModelError: The format has no words for some trait of the model.
    """
    tied = config.tie_word_embeddings if tie_word_embeddings is None else tie_word_embeddings
    config = replace(_as_own_family(config), torch_dtype=dtype, tie_word_embeddings=tied)
    family = family_named(config.architecture)
    raw: dict[str, Any] = {
        "architectures": [family.architectures[0]],
        "model_type": family.name,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "max_position_embeddings": config.max_position_embeddings,
        **_rope(config),
        **_FAMILY_FIELDS[family.name](config),
        "tie_word_embeddings": tied,
        "dtype": dtype,
        "torch_dtype": dtype,  # what older readers look for
        **(token_ids or {}),
    }
    _check_round_trip(config, raw)
    return raw


def _as_own_family(config: ModelConfig) -> ModelConfig:
    """GGUF calls Mistral `llama`; a window gives it away."""
    windowed = any(layer.window is not None for layer in config.layers)
    return replace(config, architecture="mistral") if config.architecture == "llama" and windowed else config


def _rope(config: ModelConfig) -> dict[str, Any]:
    """Rotary fields in the old spelling, which every reader knows, and in the one of transformers 5."""
    scaling = None if config.rope_scaling is None else _rope_scaling(config.rope_scaling)
    parameters = {"rope_type": "default", "rope_theta": config.rope_theta, **(scaling or {})}
    return {"rope_theta": config.rope_theta, "rope_scaling": scaling, "rope_parameters": parameters}


def _rope_scaling(scaling: RopeScaling) -> dict[str, Any]:
    fields: dict[str, Any] = {"rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type in ("yarn", "llama3"):
        fields["original_max_position_embeddings"] = scaling.original_max_position_embeddings
    if scaling.rope_type == "llama3":
        fields |= {"low_freq_factor": scaling.low_freq_factor, "high_freq_factor": scaling.high_freq_factor}
    if scaling.rope_type == "yarn":
        optional = ("attention_factor", "mscale", "mscale_all_dim")
        fields |= {"beta_fast": scaling.beta_fast, "beta_slow": scaling.beta_slow, "truncate": scaling.truncate}
        fields |= {name: value for name in optional if (value := getattr(scaling, name)) is not None}
    return fields


def _llama(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, "mlp_bias": config.mlp_bias}


def _mistral(config: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": config.layers[0].window}


def _mixtral(config: ModelConfig) -> dict[str, Any]:
    experts = {"num_local_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok}
    return {**_mistral(config), **experts}


def _qwen2(config: ModelConfig) -> dict[str, Any]:
    """Windows as `max_window_layers` where all upper layers have one, which older readers know, and as a list."""
    windows = [layer.window for layer in config.layers]
    first = next((i for i, window in enumerate(windows) if window is not None), len(windows))
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    return {
        "use_sliding_window": first < len(windows),
        "sliding_window": windows[first] if first < len(windows) else None,
        "max_window_layers": first,
        "layer_types": kinds,
    }


def _qwen3(config: ModelConfig) -> dict[str, Any]:
    return {"attention_bias": config.qkv_bias, **_qwen2(config)}


def _qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    return {
        "attention_bias": config.qkv_bias,
        "use_sliding_window": config.layers[0].window is not None,
        "sliding_window": config.layers[0].window,
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "norm_topk_prob": config.norm_topk_prob,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [i for i, layer in enumerate(config.layers) if not layer.moe],
    }


_FAMILY_FIELDS: Mapping[str, Callable[[ModelConfig], dict[str, Any]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


def _check_round_trip(config: ModelConfig, raw: Mapping[str, Any]) -> None:
    read = family_named(config.architecture).read_hf(raw)
    # Without experts their width means nothing, and each reader fills it in its own way.
    ignored = {} if config.num_experts else {"moe_intermediate_size": 0, "norm_topk_prob": True}
    if replace(read, **ignored) == replace(config, **ignored):
        return
    differing = [
        name
        for name in ModelConfig.__dataclass_fields__
        if name not in ignored and getattr(read, name) != getattr(config, name)
    ]
    values = ", ".join(f"{name} = {getattr(config, name)!r}" for name in differing)
    raise UnsupportedModelError(
        f"a config.json of the {config.architecture} family cannot say that {values}; convert from the original "
        "checkpoint, which has a config.json of its own"
    )
