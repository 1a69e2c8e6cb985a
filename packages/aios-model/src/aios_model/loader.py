"""Fills an empty decoder from a weight source, one layer at a time.

Peak memory is the model plus one layer: the largest layers go first, while everything else is still empty, and each
entry gives its mapped pages back once it was read. A tensor that is missing, has another shape than the config promises
or is left over is refused by name: a model that runs on wrong weights is worse than one that does not run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from aios_model.config import ModelConfig
from aios_model.decoder import DecoderModel
from aios_model.errors import CheckpointError
from aios_model.families import Family, TensorLocation, family_named
from aios_model.host_memory import return_freed_memory
from aios_model.layers.embedding import Embedding
from aios_model.layers.linear import Linear
from aios_model.layers.norm import RMSNorm
from aios_model.layers.rope import RotaryEmbedding
from aios_model.weights.permuted import RowPermutedEntry, rows_in_halves
from aios_model.weights.source import TensorEntry, WeightSource

# Buffers that old checkpoints carry beside the weights; both formats' rope tables are recomputed or read apart.
_DERIVED_SUFFIXES = ("rotary_emb.inv_freq", ".masked_bias", ".attention.bias")
_ROPE_FACTORS = "rope_freqs.weight"

# Parameters between two requests to the allocator to give memory back.
_TRIM_ELEMENTS = 1 << 24

ProgressCallback = Callable[[float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterSlot:
    """One parameter of the decoder: its path, as families name it, and the shape it must have."""

    path: str
    shape: tuple[int, ...]


def load_weights(
    decoder: DecoderModel,
    source: WeightSource,
    *,
    file_format: str,
    dtype: torch.dtype,
    device: torch.device,
    parameters: Sequence[ParameterSlot] | None = None,
    on_loaded: Callable[[nn.Module], None] | None = None,
    progress: ProgressCallback | None = None,
) -> None:
    """Reads every parameter of `decoder` from `source`.

    Args:
        decoder: Built empty, already transformed if it is to be.
        source: Where the tensors are.
        file_format: `safetensors` or `gguf`: which of the family's names apply.
        parameters: What the source must hold, where `decoder` is only a part of the model; None: what `decoder` needs.
        dtype: What the parameters become.
        device: Where they go.
        on_loaded: Told of every module that has its weights, before the next one is read; it may move them.
        progress: Called with the share of parameters read, 0 to 1.

    Raises:
        CheckpointError: A tensor is missing, left over or of the wrong shape.
    """
    reader = _EntryReader(source.entries(), family_named(decoder.config.architecture), file_format, decoder.config)
    modules = sorted(_loadable(decoder), key=lambda pair: -sum(_numel(slot) for slot in module_slots(*pair)))
    reader.check(parameter_slots(decoder) if parameters is None else parameters)
    total = sum(_numel(slot) for pair in modules for slot in module_slots(*pair)) or 1
    done = 0
    for path, module in modules:
        _load_module(path, module, reader, dtype=dtype, device=device)
        if on_loaded is not None:
            on_loaded(module)
        before, done = done, done + sum(_numel(slot) for slot in module_slots(path, module))
        if done // _TRIM_ELEMENTS > before // _TRIM_ELEMENTS:
            return_freed_memory()
        if progress is not None:
            progress(done / total)
    for module in decoder.modules():
        if isinstance(module, RotaryEmbedding):
            module.load(device=device, dtype=dtype, frequency_factors=reader.frequency_factors())
    decoder.dtype, decoder.device = dtype, device
    reader.release()
    return_freed_memory()


def parameter_shapes(decoder: DecoderModel, file_format: str = "safetensors") -> dict[str, tuple[int, ...]]:
    """Checkpoint names and shapes of everything `decoder` needs, for dummy weights and for arithmetic."""
    family = family_named(decoder.config.architecture)
    slots = parameter_slots(decoder)
    return {_locate(slot.path, family, file_format, decoder.config).name: slot.shape for slot in slots}


def parameter_slots(decoder: DecoderModel) -> list[ParameterSlot]:
    """All parameters of `decoder` as it is now."""
    return [slot for pair in _loadable(decoder) for slot in module_slots(*pair)]


def module_slots(path: str, module: nn.Module) -> list[ParameterSlot]:
    """The parameters of one module; a stacked Linear has a weight (and bias) per part."""
    if isinstance(module, Linear):
        names = {part: f"{path}.{part}" if part else path for part in module.parts}
        slots = [
            ParameterSlot(path=f"{names[part]}.weight", shape=(width, module.in_features))
            for part, width in module.parts.items()
        ]
        if module.has_bias:
            slots += [ParameterSlot(path=f"{names[part]}.bias", shape=(width,)) for part, width in module.parts.items()]
        return slots
    if isinstance(module, Embedding):
        return [ParameterSlot(path=f"{path}.weight", shape=(module.num_embeddings, module.size))]
    if isinstance(module, RMSNorm):
        return [ParameterSlot(path=f"{path}.weight", shape=(module.size,))]
    return []


class _EntryReader:
    """Finds the entry behind each of our parameters."""

    def __init__(
        self, entries: Mapping[str, TensorEntry], family: Family, file_format: str, config: ModelConfig
    ) -> None:
        self._entries = entries
        self._family = family
        self._format = file_format
        self._config = config

    def release(self) -> None:
        """Gives all mapped pages back, also those that the kernel read along with their neighbours."""
        for entry in self._entries.values():
            entry.release()

    def check(self, slots: Sequence[ParameterSlot]) -> None:
        """Raises CheckpointError unless the source holds exactly the tensors that `slots` need, in their shapes."""
        locations = {slot.path: _locate(slot.path, self._family, self._format, self._config) for slot in slots}
        missing = [where.name for where in locations.values() if where.name not in self._entries]
        if missing:
            raise CheckpointError(f"the checkpoint lacks {_some(missing)}; it may be incomplete or of another model")
        expected = {where.name for where in locations.values()}
        if self._config.tie_word_embeddings:
            # Some tied checkpoints carry a copy of the embedding as their head; the tie decides, as in transformers.
            expected.add(self._family.locate("head.weight", self._format, self._config).name)
        left_over = [
            name
            for name in self._entries
            if name not in expected and name != _ROPE_FACTORS and not name.endswith(_DERIVED_SUFFIXES)
        ]
        if left_over:
            raise CheckpointError(
                f"the checkpoint holds {_some(left_over)}, which {self._family.name} does not use; "
                "running without them would give wrong results"
            )
        for slot in slots:
            shape = self.find(slot.path).shape
            if shape != slot.shape:
                raise CheckpointError(
                    f"tensor {locations[slot.path].name} has shape {list(shape)}, "
                    f"the config asks for {list(slot.shape)}"
                )

    def find(self, path: str) -> TensorEntry:
        """The entry that fills the parameter at `path`, its rows in our order."""
        where = _locate(path, self._family, self._format, self._config)
        entry = self._entries[where.name]
        if where.expert is not None:
            if len(entry.shape) != 3 or entry.shape[0] != self._config.num_experts:
                raise CheckpointError(
                    f"tensor {where.name} has shape {list(entry.shape)}, expected [{self._config.num_experts}, out, in]"
                )
            entry = entry.select(where.expert)
        if where.interleaved_heads is not None:
            entry = RowPermutedEntry(entry, rows_in_halves(entry.shape[0], where.interleaved_heads))
        return entry

    def frequency_factors(self) -> torch.Tensor | None:
        """GGUF's divisors of the rotary frequencies, [H/2], if the file has them."""
        entry = self._entries.get(_ROPE_FACTORS)
        return None if entry is None else entry.read(dtype=torch.float32)


def _loadable(decoder: DecoderModel) -> Iterator[tuple[str, nn.Module]]:
    for path, module in decoder.named_modules():
        if isinstance(module, Linear | RMSNorm | Embedding):
            yield path, module


def _load_module(
    path: str, module: nn.Module, reader: _EntryReader, *, dtype: torch.dtype, device: torch.device
) -> None:
    if isinstance(module, Linear):
        names = {part: f"{path}.{part}" if part else path for part in module.parts}
        weights = {part: reader.find(f"{name}.weight") for part, name in names.items()}
        biases = {part: reader.find(f"{name}.bias") for part, name in names.items()} if module.has_bias else {}
        if (shard := module.shard) is not None:
            weights = {part: shard.weight(part, entry) for part, entry in weights.items()}
            biases = {part: shard.bias(part, entry) for part, entry in biases.items()}
        module.load(weights, biases, dtype=dtype, device=device)
    elif isinstance(module, Embedding | RMSNorm):
        module.load(reader.find(f"{path}.weight"), dtype=dtype, device=device)


def _locate(path: str, family: Family, file_format: str, config: ModelConfig) -> TensorLocation:
    if path == "head.weight" and config.tie_word_embeddings:
        path = "embedding.weight"
    return family.locate(path, file_format, config)


def _numel(slot: ParameterSlot) -> int:
    return torch.Size(slot.shape).numel()


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:3])
    return shown if len(names) <= 3 else f"{shown} and {len(names) - 3} more"
