"""A safetensors checkpoint, in one file or in shards, as a weight source."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence

from torch import Tensor

from aios_model.errors import CheckpointError
from aios_model.weights.mapped_file import MappedFile
from aios_model.weights.packed_entry import Encoding, PackedEntry, map_bytes
from aios_model.weights.safetensors_header import (
    ELEMENT_LAYOUTS,
    SafetensorsTensor,
    find_index,
    read_header,
    read_index,
)
from aios_model.weights.source import TensorEntry

_FLOATS = ("F64", "F32", "F16", "BF16")


class SafetensorsSource:
    """All tensors of a safetensors file or of the shards of a checkpoint, mapped and not yet read.

    Where an index lies beside the shards, every tensor it names must be in the shard it names.

    Raises:
        ModelNotFoundError: a file is not there.
        CheckpointError: a file is corrupted, a tensor is in two shards, or not where the index says.
        UnsupportedModelError: a dtype that the format did not have when this was written.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self._files = [MappedFile(path) for path in paths]
        self._entries: dict[str, TensorEntry] = {}
        homes: dict[str, MappedFile] = {}
        for file in self._files:
            data = map_bytes(file)
            for tensor in read_header(file).values():
                if tensor.name in homes:
                    raise CheckpointError(
                        f"tensor {tensor.name!r} is both in {homes[tensor.name].path} and in {file.path}"
                    )
                homes[tensor.name] = file
                self._entries[tensor.name] = _entry(tensor, data, file)
        _check_index(homes, self._files)

    def entries(self) -> Mapping[str, TensorEntry]:
        """Tensors by their checkpoint name, in the order of the files' headers."""
        return self._entries

    def close(self) -> None:
        """Drop the entries and unmap the files."""
        self._entries = {}
        for file in self._files:
            file.close()


def _entry(tensor: SafetensorsTensor, data: Tensor, file: MappedFile) -> PackedEntry:
    packed = data[tensor.offset : tensor.offset + tensor.num_bytes]
    return PackedEntry(
        name=tensor.name, shape=tensor.shape, encoding=_encoding(tensor.encoding), packed=packed, file=file
    )


def _encoding(name: str) -> Encoding:
    elements, num_bytes = ELEMENT_LAYOUTS[name]
    refusal = None
    if name not in _FLOATS:
        refusal = (
            f"only {', '.join(_FLOATS)} are weights by themselves; integers and 8-bit floats need the scales of their "
            "quantisation scheme, so use the unquantised checkpoint"
        )
    return Encoding(name=name, block_elements=elements, block_bytes=num_bytes, refusal=refusal)


def _check_index(homes: Mapping[str, MappedFile], files: Iterable[MappedFile]) -> None:
    """Compare what the shards hold with what their index promises, if they are the ones it speaks of."""
    shards = {file.path.name: file for file in files}
    folders = {file.path.parent for file in shards.values()}
    index = find_index(folders.pop()) if len(folders) == 1 else None
    if index is None:
        return
    weight_map = read_index(index)
    if set(weight_map.values()) != set(shards):
        return
    for name, shard in weight_map.items():
        if name not in homes or homes[name] is not shards[shard]:
            raise CheckpointError(f"{index.name} places tensor {name!r} in {shard}, which does not hold it")
