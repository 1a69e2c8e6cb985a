"""Mistral 7B: Llama with a sliding window over the keys (arXiv 2310.06825, section 2)."""

from __future__ import annotations

from aios_model.families.base import Family
from aios_model.families.fields import ConfigFields


def sliding_window(raw: ConfigFields, layer: int) -> int | None:
    """The one window that all layers share; null since version 0.2 of the model."""
    return raw.integer("sliding_window", 0) or None


MISTRAL = Family(
    name="mistral",
    architectures=("MistralForCausalLM",),
    gguf_architecture="llama",
    window=sliding_window,
    gguf_interleaves_rope=True,
)
