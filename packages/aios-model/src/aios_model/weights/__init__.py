"""Weights: finding a checkpoint, mapping its files, decoding its tensors.

Finding (no torch): `resolve_model` turns what a user typed into `ModelFiles`.
Reading (torch): a `WeightSource` offers one `TensorEntry` per tensor of a checkpoint, mapped and read by the slice:
`SafetensorsSource`, `GGUFSource`, or `DummySource` for weights made up on the spot. `GGUFFile` reads a GGUF's
header without torch, for the config and the tokenizer.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_model.weights.dummy import DummySource
    from aios_model.weights.gguf import GGUFSource
    from aios_model.weights.gguf_file import GGUFFile
    from aios_model.weights.hub import ModelFiles, refuse_remote_code, resolve_model
    from aios_model.weights.safetensors import SafetensorsSource
    from aios_model.weights.source import TensorEntry, WeightSource

__all__ = [
    "DummySource",
    "GGUFFile",
    "GGUFSource",
    "ModelFiles",
    "SafetensorsSource",
    "TensorEntry",
    "WeightSource",
    "refuse_remote_code",
    "resolve_model",
]

_HOMES = {
    "DummySource": "dummy",
    "GGUFFile": "gguf_file",
    "GGUFSource": "gguf",
    "ModelFiles": "hub",
    "SafetensorsSource": "safetensors",
    "TensorEntry": "source",
    "WeightSource": "source",
    "refuse_remote_code": "hub",
    "resolve_model": "hub",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
