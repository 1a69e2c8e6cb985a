"""From our modules to the tensors of a checkpoint: names, parts and dtypes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from aios_model.config import ModelConfig
from aios_model.decoder import DecoderLayer
from aios_model.families import family_named
from aios_model.layers.linear import Linear
from aios_model.layers.norm import RMSNorm
from aios_model.weights.source import TensorEntry
from aios_quant.calibrate.grid import GridSpec
from aios_quant.calibrate.rtn import round_to_nearest
from aios_quant.quantized_tensor import PackedWeight, QuantizedTensor
from aios_quant.reading import quantize_rows
from aios_quant.settings import QuantizeSettings
from aios_quant.writing.compressed_tensors import weight_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelTensors:
    """What a checkpoint of one model holds, under Hugging Face's names.

    Attributes:
        config: The model's.
        settings: How it is quantised.
        dtype: Of all that stays floating.
    """

    config: ModelConfig
    settings: QuantizeSettings
    dtype: torch.dtype

    def layer(self, index: int, layer: DecoderLayer, packed: dict[str, PackedWeight]) -> dict[str, Tensor]:
        """All tensors of decoder layer `index`; Linears that are in `packed`, by path, as codes."""
        tensors: dict[str, Tensor] = {}
        for path, module in layer.named_modules():
            if isinstance(module, RMSNorm):
                tensors[self._name(f"layers.{index}.{path}.weight")] = module.weight.to(self.dtype)
            if isinstance(module, Linear):
                tensors |= self._linear(f"layers.{index}.{path}", module, packed.get(path))
        return tensors

    def table(self, path: str, entry: TensorEntry) -> dict[str, Tensor]:
        """`embedding.weight`, `norm.weight` or `head.weight` as floats."""
        table = entry.read(dtype=self.dtype)
        entry.release()
        return {self._name(path): table}

    def head(self, entry: TensorEntry) -> dict[str, Tensor]:
        """The head, rounded as the settings say; nothing where it stays the embedding."""
        if self.settings.head_scheme == "none":
            return {} if self.config.tie_word_embeddings else self.table("head.weight", entry)
        spec = GridSpec(bits=8, group_size=None, symmetric=True, scale_dtype=self.dtype)
        codes = quantize_rows(entry, lambda rows: round_to_nearest(rows, spec), torch.float32)
        entry.release()
        assert isinstance(codes, QuantizedTensor), "a grid makes codes"
        return weight_tensors(self._stem("head"), codes, self.settings.head_format, self.dtype)

    def unquantised(self) -> list[str]:
        """Names of Linears that stay as they are: routers, and perhaps the head."""
        routers = [
            self._stem(f"layers.{index}.mlp.router") for index, spec in enumerate(self.config.layers) if spec.moe
        ]
        return [*routers, self._stem("head")] if self.settings.head_scheme == "none" else routers

    def _linear(self, path: str, linear: Linear, packed: PackedWeight | None) -> dict[str, Tensor]:
        tensors: dict[str, Tensor] = {}
        weight = linear.dense_weight() if packed is None else None
        for part, rows in _parts(linear):
            stem = self._stem(f"{path}.{part}" if part else path)
            if packed is not None:
                codes = packed.rows(rows.start, rows.stop)
                tensors |= weight_tensors(stem, codes, self.settings.scheme, self.dtype)
            if weight is not None:
                tensors[f"{stem}.weight"] = weight[rows].to(self.dtype)
            if linear.bias is not None:
                tensors[f"{stem}.bias"] = linear.bias[rows].to(self.dtype)
        return tensors

    def _stem(self, path: str) -> str:
        return self._name(f"{path}.weight").removesuffix(".weight")

    def _name(self, path: str) -> str:
        return family_named(self.config.architecture).locate(path, "safetensors", self.config).name


def _parts(linear: Linear) -> Iterator[tuple[str, slice]]:
    """Each part and its rows."""
    start = 0
    for part, width in linear.parts.items():
        yield part, slice(start, start + width)
        start += width
