"""Qwen3: no biases; every query and key head is RMS-normalised before the rotation (arXiv 2505.09388)."""

from __future__ import annotations

from aios_model.families.base import Family
from aios_model.families.qwen2 import layered_window

QWEN3 = Family(
    name="qwen3",
    architectures=("Qwen3ForCausalLM",),
    gguf_architecture="qwen3",
    window=layered_window,
    reads_attention_bias=True,
    qk_norm=True,
)
