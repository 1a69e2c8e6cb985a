"""Qwen3-MoE: Qwen3 with many small experts; some layers may stay dense."""

from __future__ import annotations

from aios_model.families.base import Family
from aios_model.families.fields import ConfigFields

_BLOCK = "model.layers.{layer}.mlp"


def _window(raw: ConfigFields, layer: int) -> int | None:
    return raw.integer("sliding_window", 4096) if raw.boolean("use_sliding_window", False) else None


def _is_moe(raw: ConfigFields, layer: int) -> bool:
    if layer in (raw.sequence("mlp_only_layers") or []):
        return False
    return (layer + 1) % raw.integer("decoder_sparse_step", 1) == 0


QWEN3_MOE = Family(
    name="qwen3_moe",
    architectures=("Qwen3MoeForCausalLM",),
    gguf_architecture="qwen3moe",
    window=_window,
    is_moe=_is_moe,
    reads_attention_bias=True,
    qk_norm=True,
    hf_names={
        "mlp.router": f"{_BLOCK}.gate",
        "mlp.experts.gate_up.gate": f"{_BLOCK}.experts.{{expert}}.gate_proj",
        "mlp.experts.gate_up.up": f"{_BLOCK}.experts.{{expert}}.up_proj",
        "mlp.experts.down": f"{_BLOCK}.experts.{{expert}}.down_proj",
    },
    default_norm_topk_prob=False,
)
