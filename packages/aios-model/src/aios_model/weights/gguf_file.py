"""Reads the header of a GGUF file: its metadata and where its tensors lie. No torch here.

The format, little-endian throughout (ggml's docs/gguf.md, versions 2 and 3):

    "GGUF" · u32 version · u64 tensor count · u64 metadata count
    metadata, each:  string key · u32 value type · value
    tensors, each:   string name · u32 dimensions · u64 per dimension, innermost first · u32 ggml type · u64 offset
    padding to `general.alignment` (32 unless set), from where the offsets count
    tensor data, every tensor aligned

The file is not trusted: whatever is in it, opening it costs a time and memory in proportion to its header, and ends in
a `GGUFFile` whose tensors lie inside the file, or in an error that names the field.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.weights.gguf_encodings import GGML_TYPES
from aios_model.weights.gguf_header import U32, U64, HeaderCursor
from aios_model.weights.mapped_file import MappedFile

_MAX_DIMENSIONS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class GGUFTensor:
    """Where one tensor lies.

    Attributes:
        name: E.g. `blk.0.attn_q.weight`.
        shape: Outermost dimension first, as in torch (the file stores it innermost first).
        encoding: `F32`, `Q4_K`, …
        block_elements: Elements of a line per block; 1 for plain encodings.
        block_bytes: Bytes per block.
        offset: First byte, from the start of the file.
        num_bytes: Length of the data.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    block_elements: int
    block_bytes: int
    offset: int
    num_bytes: int


class GGUFFile:
    """One GGUF file, mapped. A model split over several files is one `GGUFFile` per part: see `open_gguf`.

    Attributes:
        path: The file.
        file: Its mapping.
        version: 2 or 3.
        metadata: Values by key: int, float, bool, str, or (nested) lists of them.
        alignment: What tensors are aligned to, in bytes.
        tensors: Tensors by name, in file order.

    Raises:
        ModelNotFoundError: there is no such file.
        CheckpointError: the file is corrupted or cut off; the message names file, field and byte.
        UnsupportedModelError: version 1, or big-endian.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.file = MappedFile(path)
        self.path = self.file.path
        cursor = HeaderCursor(self.file)
        self.version, num_tensors, num_metadata = _read_preamble(cursor)
        self.metadata = _read_metadata(cursor, num_metadata)
        self.alignment = _alignment(self.metadata, cursor)
        infos = _read_tensor_infos(cursor, num_tensors)
        data_start = -(-cursor.position // self.alignment) * self.alignment
        self.tensors = {info.name: self._place(info, data_start) for info in infos.values()}
        _refuse_overlaps(self.tensors.values(), self.path)

    def close(self) -> None:
        """Unmap the file; tensors viewed in it keep it mapped until they go."""
        self.file.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _place(self, info: _TensorInfo, data_start: int) -> GGUFTensor:
        """Where the tensor lies in the file, once it is known to lie in it."""
        layout = GGML_TYPES.get(info.ggml_type)
        if layout is None:
            raise self._corrupted(
                info, f"unknown type {info.ggml_type}: the file is corrupted or newer than this reader"
            )
        width = info.shape[-1] if info.shape else 1
        if width % layout.block_elements:
            raise self._corrupted(
                info, f"lines of {width} elements, not a multiple of {layout.name}'s {layout.block_elements}"
            )
        if info.offset % self.alignment:
            raise self._corrupted(info, f"offset {info.offset}, not a multiple of the alignment {self.alignment}")
        num_bytes = math.prod(info.shape) // layout.block_elements * layout.block_bytes
        start = data_start + info.offset
        if start + num_bytes > self.file.num_bytes:
            raise self._corrupted(
                info,
                f"bytes {start} to {start + num_bytes} of a file of {self.file.num_bytes}: it is cut off or corrupted",
            )
        return GGUFTensor(
            name=info.name,
            shape=info.shape,
            encoding=layout.name,
            block_elements=layout.block_elements,
            block_bytes=layout.block_bytes,
            offset=start,
            num_bytes=num_bytes,
        )

    def _corrupted(self, info: _TensorInfo, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: tensor {info.name!r} (described at byte {info.position}) has {what}")


def open_gguf(paths: Sequence[str | os.PathLike[str]]) -> tuple[GGUFFile, ...]:
    """All parts of a GGUF model, checked to belong together. The first one holds the metadata.

    Raises:
        CheckpointError: a part is missing, out of order or doubled, or a tensor is in two parts.
    """
    parts = tuple(GGUFFile(path) for path in paths)
    names: dict[str, GGUFFile] = {}
    for number, part in enumerate(parts):
        count, own = part.metadata.get("split.count") or 1, part.metadata.get("split.no", 0)
        if count != len(parts) or own != number:
            raise CheckpointError(
                f"{part.path} is part {own} of {count} (counted from 0), opened as {number} of {len(parts)}"
            )
        for name in part.tensors:
            if name in names:
                raise CheckpointError(f"tensor {name!r} is both in {names[name].path} and in {part.path}")
            names[name] = part
    return parts


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    """A tensor as its header entry describes it, not yet checked against the file."""

    name: str
    shape: tuple[int, ...]
    ggml_type: int
    offset: int
    position: int


def _read_preamble(cursor: HeaderCursor) -> tuple[int, int, int]:
    """Version, tensor count and metadata count."""
    magic, version = cursor.scalar(U32, "the magic number"), cursor.scalar(U32, "the version")
    if magic != int.from_bytes(b"GGUF", "little"):
        raise CheckpointError(f"{cursor.path} is not a GGUF file: it begins with {magic.to_bytes(4, 'little')!r}")
    if version and version & 0xFFFF == 0:
        raise UnsupportedModelError(f"{cursor.path} is a big-endian GGUF file; only little-endian ones are read")
    if version not in (2, 3):
        raise UnsupportedModelError(
            f"{cursor.path} is GGUF version {version}; versions 2 and 3 are read. Convert it anew"
        )
    return version, cursor.scalar(U64, "the tensor count"), cursor.scalar(U64, "the metadata count")


def _read_metadata(cursor: HeaderCursor, count: int) -> dict[str, object]:
    cursor.expect(count, 13, "metadata entries")
    metadata: dict[str, object] = {}
    for number in range(count):
        key = cursor.string(f"the key of metadata entry {number}")
        if key in metadata:
            raise cursor.corrupted(f"metadata key {key!r} for the second time")
        metadata[key] = cursor.value(cursor.scalar(U32, f"the type of {key!r}"), repr(key))
    return metadata


def _alignment(metadata: Mapping[str, object], cursor: HeaderCursor) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1) or alignment > 1 << 20:
        raise cursor.corrupted(f"general.alignment is {alignment!r}, not a power of two up to 1 MiB, read before")
    return alignment


def _read_tensor_infos(cursor: HeaderCursor, count: int) -> dict[str, _TensorInfo]:
    cursor.expect(count, 24, "tensors")
    infos: dict[str, _TensorInfo] = {}
    for number in range(count):
        position = cursor.position
        name = cursor.string(f"the name of tensor {number}")
        if name in infos:
            raise cursor.corrupted(f"tensor {name!r} for the second time")
        num_dimensions = cursor.scalar(U32, f"the dimensions of tensor {name!r}")
        if num_dimensions > _MAX_DIMENSIONS:
            raise cursor.corrupted(f"tensor {name!r} has {num_dimensions} dimensions, more than {_MAX_DIMENSIONS},")
        sizes = [cursor.scalar(U64, f"a dimension of tensor {name!r}") for _ in range(num_dimensions)]
        if 0 in sizes:
            raise cursor.corrupted(f"tensor {name!r} has a dimension of size 0")
        ggml_type, offset = cursor.scalar(U32, f"the type of {name!r}"), cursor.scalar(U64, f"the offset of {name!r}")
        infos[name] = _TensorInfo(name, tuple(reversed(sizes)), ggml_type, offset, position)
    return infos


def _refuse_overlaps(tensors: Iterable[GGUFTensor], path: Path) -> None:
    end, before = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: tensor.offset):
        if tensor.offset < end:
            raise CheckpointError(f"{path}: tensors {before!r} and {tensor.name!r} overlap at byte {tensor.offset}")
        end, before = tensor.offset + tensor.num_bytes, tensor.name
