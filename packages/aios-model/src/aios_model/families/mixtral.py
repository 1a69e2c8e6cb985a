"""Mixtral 8x7B: Mistral with eight experts in place of each MLP, two of them per token (arXiv 2401.04088)."""

from __future__ import annotations

from aios_model.families.base import Family
from aios_model.families.mistral import sliding_window

_BLOCK = "model.layers.{layer}.block_sparse_moe"

MIXTRAL = Family(
    name="mixtral",
    architectures=("MixtralForCausalLM",),
    gguf_architecture="llama",
    window=sliding_window,
    is_moe=lambda raw, layer: True,
    hf_names={
        "mlp.router": f"{_BLOCK}.gate",
        "mlp.experts.gate_up.gate": f"{_BLOCK}.experts.{{expert}}.w1",
        "mlp.experts.gate_up.up": f"{_BLOCK}.experts.{{expert}}.w3",
        "mlp.experts.down": f"{_BLOCK}.experts.{{expert}}.w2",
    },
    gguf_interleaves_rope=True,
    default_rope_theta=1_000_000.0,
)
