"""A GGUF checkpoint as a weight source."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from aios_model.weights.gguf_blocks import UNPACKERS, dequantise
from aios_model.weights.gguf_file import GGUFTensor, open_gguf
from aios_model.weights.mapped_file import MappedFile
from aios_model.weights.packed_entry import Encoding, PackedEntry, map_bytes
from aios_model.weights.source import TensorEntry

_PLAIN = ("F64", "F32", "F16", "BF16")


class GGUFSource:
    """All tensors of a GGUF file, or of the parts of a split one.

    Attributes:
        metadata: The key-value pairs of the first part.

    Raises:
        ModelNotFoundError: a file is not there.
        CheckpointError: a file is corrupted, or the parts don't belong together.
        UnsupportedModelError: an old version, or big-endian.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self._parts = open_gguf(paths)
        self.metadata: Mapping[str, object] = self._parts[0].metadata if self._parts else {}
        self._entries: dict[str, TensorEntry] = {}
        for part in self._parts:
            data = map_bytes(part.file)
            for tensor in part.tensors.values():
                self._entries[tensor.name] = _entry(tensor, data, part.file)

    def entries(self) -> Mapping[str, TensorEntry]:
        """Tensors by their GGUF name, in file order."""
        return self._entries

    def close(self) -> None:
        """Drop the entries and unmap the files."""
        self._entries = {}
        for part in self._parts:
            part.close()


def _entry(tensor: GGUFTensor, data: Tensor, file: MappedFile) -> PackedEntry:
    packed = data[tensor.offset : tensor.offset + tensor.num_bytes]
    return PackedEntry(name=tensor.name, shape=tensor.shape, encoding=_encoding(tensor), packed=packed, file=file)


def _encoding(tensor: GGUFTensor) -> Encoding:
    unpack = UNPACKERS.get(tensor.encoding)
    refusal = None
    if unpack is None and tensor.encoding not in _PLAIN:
        supported = ", ".join([*_PLAIN, *UNPACKERS])
        refusal = f"this encoding is not supported. Choose a file in one of {supported}"
    return Encoding(
        name=tensor.encoding,
        block_elements=tensor.block_elements,
        block_bytes=tensor.block_bytes,
        decode=partial(dequantise, unpack) if unpack is not None else None,
        refusal=refusal,
    )
