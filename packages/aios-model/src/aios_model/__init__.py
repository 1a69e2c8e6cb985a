"""aios-model: how does a checkpoint become the next token?

The bottom layer: it loads Llama, Mistral, Mixtral, Qwen2, Qwen3 and Qwen3-MoE weights, tokenises, runs the forward pass
and samples. Read it in this order: `generate` (the loop), `decoder` and `layers`, `cache`, `sampling`, `weights`,
`tokenizer`, `inspect`.

Names below are imported when they are first used, so importing the package costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_model.cache import ContiguousCache, KVCache
    from aios_model.config import LayerSpec, ModelConfig
    from aios_model.config_file import read_model_config
    from aios_model.decoder import DecoderModel
    from aios_model.errors import (
        AiosError,
        ChatTemplateError,
        CheckpointError,
        ConfigError,
        InvalidRequestError,
        ModelError,
        ModelNotFoundError,
        NativeBuildError,
        UnsupportedModelError,
    )
    from aios_model.generate import generate_text, generate_tokens
    from aios_model.generation_config import GenerationDefaults
    from aios_model.model import LoadedModel, ModelTransform, SourceTransform, load_decoder, load_model
    from aios_model.sampling.params import SamplingParams
    from aios_model.sampling.rows import SampledToken, SamplingRow, TokenLogprobs
    from aios_model.sampling.sampler import Sampler
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_model.weights.hub import ModelFiles, resolve_model

_HOMES = {
    "aios_model.cache": ("ContiguousCache", "KVCache"),
    "aios_model.config": ("LayerSpec", "ModelConfig"),
    "aios_model.config_file": ("read_model_config",),
    "aios_model.decoder": ("DecoderModel",),
    "aios_model.errors": (
        "AiosError",
        "ChatTemplateError",
        "CheckpointError",
        "ConfigError",
        "InvalidRequestError",
        "ModelError",
        "ModelNotFoundError",
        "NativeBuildError",
        "UnsupportedModelError",
    ),
    "aios_model.generate": ("generate_text", "generate_tokens"),
    "aios_model.generation_config": ("GenerationDefaults",),
    "aios_model.model": ("LoadedModel", "ModelTransform", "SourceTransform", "load_decoder", "load_model"),
    "aios_model.sampling.params": ("SamplingParams",),
    "aios_model.sampling.rows": ("SampledToken", "SamplingRow", "TokenLogprobs"),
    "aios_model.sampling.sampler": ("Sampler",),
    "aios_model.tokenizer.tokenizer": ("Tokenizer",),
    "aios_model.weights.hub": ("ModelFiles", "resolve_model"),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "AiosError",
    "ChatTemplateError",
    "CheckpointError",
    "ConfigError",
    "ContiguousCache",
    "DecoderModel",
    "GenerationDefaults",
    "InvalidRequestError",
    "KVCache",
    "LayerSpec",
    "LoadedModel",
    "ModelConfig",
    "ModelError",
    "ModelFiles",
    "ModelNotFoundError",
    "ModelTransform",
    "NativeBuildError",
    "SampledToken",
    "Sampler",
    "SamplingParams",
    "SamplingRow",
    "SourceTransform",
    "TokenLogprobs",
    "Tokenizer",
    "UnsupportedModelError",
    "generate_text",
    "generate_tokens",
    "load_decoder",
    "load_model",
    "read_model_config",
    "resolve_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
