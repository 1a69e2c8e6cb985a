"""Opens a published quantised checkpoint as if it held plain weights.

`open_quantized_source` wraps the source that reads the files: a layer's packed tensors disappear, and one entry
`….weight` takes their place. `quantized_checkpoint` does so for any model whose config says that it is quantised, and
is what `load_decoder` takes as a source transform.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from aios_model.config_file import read_json, read_model_config
from aios_model.errors import UnsupportedModelError
from aios_model.weights.hub import ModelFiles
from aios_model.weights.source import TensorEntry, WeightSource
from aios_quant.checkpoints.awq import read_awq
from aios_quant.checkpoints.compressed_tensors import read_compressed_tensors
from aios_quant.checkpoints.gptq import read_gptq
from aios_quant.checkpoints.quantized_entry import QuantizedEntry

_Reader = Callable[[Mapping[str, TensorEntry], Mapping[str, Any]], dict[str, QuantizedEntry]]

_READERS: Mapping[str, _Reader] = {
    "gptq": read_gptq,
    "awq": read_awq,
    "compressed-tensors": read_compressed_tensors,
}

# What the three formats store beside a layer's weight and bias.
_COMPANIONS = (
    "qweight",
    "qzeros",
    "scales",
    "g_idx",
    "weight",
    "weight_packed",
    "weight_shape",
    "weight_scale",
    "weight_zero_point",
    "weight_g_idx",
    "input_scale",
    "input_zero_point",
    "output_scale",
    "output_zero_point",
)


def quantized_checkpoint(source: WeightSource, files: ModelFiles) -> WeightSource:
    """The source transform for `load_decoder`: wraps the source of a quantised checkpoint, leaves others alone.

    Raises:
        UnsupportedModelError: The checkpoint is quantised in a way that is not supported.
        CheckpointError: Its tensors do not fit together.
    """
    if files.format != "safetensors":
        return source
    config = read_json(files.root / "config.json").get("quantization_config")
    if config is None:
        return source
    model = read_model_config(files, allow_quantized=True)
    try:
        return open_quantized_source(source, config, has_biases=model.qkv_bias or model.output_bias or model.mlp_bias)
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"{files.name}: {error}") from error


def open_quantized_source(
    source: WeightSource, quantization_config: Mapping[str, Any], *, has_biases: bool = True
) -> WeightSource:
    """A view of `source` in which each quantised layer is one entry `….weight`, a `QuantizedEntry`.

    Args:
        source: The checkpoint's own tensors.
        quantization_config: The field of that name of its `config.json`.
        has_biases: Whether the model adds biases. Where it adds none, zeros that a checkpoint holds as biases of its
            quantised layers disappear too: early versions of AutoGPTQ wrote them for every model.

    Raises:
        UnsupportedModelError: An unknown method, or an option that is not supported; names it.
        CheckpointError: A tensor is missing, or has another shape or encoding than the others ask for; names it.
    """
    method = quantization_config.get("quant_method") if isinstance(quantization_config, Mapping) else None
    reader = _READERS.get(method) if isinstance(method, str) else None
    if reader is None:
        raise UnsupportedModelError(
            f"quantization_config: quant_method = {method!r} is not supported; supported: {', '.join(_READERS)}"
        )
    layers = reader(source.entries(), quantization_config)
    zeros = {name for name, entry in source.entries().items() if not has_biases and _is_zero_bias(name, entry, layers)}
    return QuantizedSource(source, layers, hidden=zeros)


class QuantizedSource:
    """A checkpoint with some layers' tensors joined.

    Args:
        source: The checkpoint's own tensors.
        layers: The joined weights, by the prefix of their tensors.
        hidden: Names of tensors that disappear beside those of the layers.
    """

    def __init__(
        self, source: WeightSource, layers: Mapping[str, QuantizedEntry], *, hidden: Collection[str] = ()
    ) -> None:
        self._source = source
        self._entries: dict[str, TensorEntry] = {}
        for name, entry in source.entries().items():
            prefix, _, kind = name.rpartition(".")
            if name not in hidden and (prefix not in layers or kind not in _COMPANIONS):
                self._entries[name] = entry
        self._entries.update({layer.name: layer for layer in layers.values()})

    def entries(self) -> Mapping[str, TensorEntry]:
        """Plain tensors as they are, quantised layers as one weight each."""
        return self._entries

    def close(self) -> None:
        """Lets go of the files."""
        self._entries = {}
        self._source.close()


def _is_zero_bias(name: str, entry: TensorEntry, layers: Mapping[str, QuantizedEntry]) -> bool:
    prefix, _, kind = name.rpartition(".")
    return kind == "bias" and prefix in layers and not bool(entry.read(dtype=torch.float32).any())
