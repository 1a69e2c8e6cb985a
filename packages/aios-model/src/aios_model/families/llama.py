"""Llama 2, 3, 3.1, 3.2 and what copies them, SmolLM2 among them: the plain decoder that the others vary."""

from __future__ import annotations

from aios_model.families.base import Family

LLAMA = Family(
    name="llama",
    architectures=("LlamaForCausalLM",),
    gguf_architecture="llama",
    reads_attention_bias=True,
    gguf_interleaves_rope=True,
)
