"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, and a window on the upper layers if asked for."""

from __future__ import annotations

from aios_model.families.base import Family
from aios_model.families.fields import ConfigFields


def layered_window(raw: ConfigFields, layer: int) -> int | None:
    """`layer_types` says which layers slide; older configs say from which layer on (`max_window_layers`)."""
    if not raw.boolean("use_sliding_window", False):
        return None
    kinds = raw.sequence("layer_types")
    slides = kinds[layer] == "sliding_attention" if kinds else layer >= raw.integer("max_window_layers", 28)
    return raw.integer("sliding_window", 4096) if slides else None


QWEN2 = Family(
    name="qwen2",
    architectures=("Qwen2ForCausalLM",),
    gguf_architecture="qwen2",
    window=layered_window,
    qkv_bias=True,
)
