"""Reads a model's configuration from its files, whichever format they are in."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aios_model.config import ModelConfig
from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.families import find_gguf_family, find_hf_family
from aios_model.weights.gguf_file import GGUFFile
from aios_model.weights.hub import ModelFiles, refuse_remote_code


def read_model_config(files: ModelFiles, *, allow_quantized: bool = False) -> ModelConfig:
    """The configuration behind `files`: `config.json` beside safetensors, the metadata inside a GGUF.

    Args:
        files: Where the checkpoint is.
        allow_quantized: Don't refuse a checkpoint that declares a `quantization_config`: whoever reads its weights
            knows what to do with it.

    Raises:
        CheckpointError: The file is missing or is not what it claims to be.
        UnsupportedModelError: It names an architecture, rope type or option that we do not implement.
    """
    try:
        if files.format == "gguf":
            return _from_gguf(files.weight_paths)
        raw = read_json(files.root / "config.json")
        refuse_remote_code(raw, files.name)
        if not allow_quantized:
            _refuse_quantized(raw.get("quantization_config"))
        return find_hf_family(raw).read_hf(raw)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{files.name}: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from `path`; CheckpointError naming the file if there is none."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path.parent} holds no {path.name}; is it a model folder?") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(raw).__name__}")
    return raw


def _refuse_quantized(config: Any) -> None:
    if config is None:
        return
    method = config.get("quant_method", "unknown") if isinstance(config, dict) else "unknown"
    raise UnsupportedModelError(
        f"this checkpoint is quantised ({method}), which takes the package aios-quant to read: "
        "run it with aios-serve, or use the original checkpoint"
    )


def _from_gguf(paths: tuple[Path, ...]) -> ModelConfig:
    parts = [GGUFFile(path) for path in paths]
    metadata = parts[0].metadata
    tensors = {name: tensor.shape for part in parts for name, tensor in part.tensors.items()}
    return find_gguf_family(metadata).read_gguf(metadata, tensors)
