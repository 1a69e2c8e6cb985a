"""Reads the header of a safetensors file, and the index of a sharded checkpoint. No torch here.

The whole format: a u64 (little-endian) header length, that many bytes of JSON, then the data.

    {"__metadata__": {"format": "pt"},
     "model.norm.weight": {"dtype": "BF16", "shape": [576], "data_offsets": [0, 1152]}, …}

Offsets count from the end of the header. The tensors must cover the data without holes or overlaps, so a truncated
file is always noticed. A checkpoint in several files carries an index beside them, `model.safetensors.index.json`:
`{"weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors", …}}`.

The file is not trusted: lengths, shapes and offsets are checked before anything is allocated for them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.weights.mapped_file import MappedFile

# About 300,000 tensors; the largest published shards have some thousands. The format's own limit is 100 MB.
_MAX_HEADER_BYTES = 32 << 20
_MAX_INDEX_BYTES = 256 << 20

ELEMENT_LAYOUTS: Mapping[str, tuple[int, int]] = MappingProxyType(
    {
        "F4": (2, 1),
        "F6_E2M3": (4, 3),
        "F6_E3M2": (4, 3),
        "BOOL": (1, 1),
        "U8": (1, 1),
        "I8": (1, 1),
        "F8_E5M2": (1, 1),
        "F8_E4M3": (1, 1),
        "F8_E8M0": (1, 1),
        "F8_E4M3FNUZ": (1, 1),
        "F8_E5M2FNUZ": (1, 1),
        "U16": (1, 2),
        "I16": (1, 2),
        "F16": (1, 2),
        "BF16": (1, 2),
        "U32": (1, 4),
        "I32": (1, 4),
        "F32": (1, 4),
        "U64": (1, 8),
        "I64": (1, 8),
        "F64": (1, 8),
        "C64": (1, 8),
    }
)
"""How many elements share how many bytes, per dtype of the format."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsTensor:
    """Where one tensor lies.

    Attributes:
        name: E.g. `model.layers.0.mlp.up_proj.weight`.
        shape: Outermost dimension first.
        encoding: The format's dtype: `BF16`, `I32`, …
        offset: First byte, from the start of the file.
        num_bytes: Length of the data.
    """

    name: str
    shape: tuple[int, ...]
    encoding: str
    offset: int
    num_bytes: int


def read_header(file: MappedFile) -> dict[str, SafetensorsTensor]:
    """The tensors of a safetensors file by name, all of them known to lie inside it.

    Raises:
        CheckpointError: the header is corrupted, or does not fit the file.
        UnsupportedModelError: a dtype that the format did not have when this was written.
    """
    if file.num_bytes < 8:
        raise CheckpointError(f"{file.path} has {file.num_bytes} bytes, too few for a safetensors file")
    length = int.from_bytes(file.buffer[:8], "little")
    if length > min(file.num_bytes - 8, _MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{file.path}: a header of {length} bytes in a file of {file.num_bytes}: cut off, or no safetensors file"
        )
    header = _parse_json(file.buffer[8 : 8 + length], file.path)
    header.pop("__metadata__", None)
    tensors = {name: _tensor(name, info, 8 + length, file) for name, info in header.items()}
    _check_coverage(tensors.values(), 8 + length, file)
    return tensors


def find_index(folder: Path) -> Path | None:
    """The index of a sharded checkpoint in `folder`, if there is one."""
    usual = folder / "model.safetensors.index.json"
    if usual.is_file():
        return usual
    others = sorted(folder.glob("*.safetensors.index.json"))
    return others[0] if len(others) == 1 else None


def read_index(path: Path) -> dict[str, str]:
    """The index's map of tensor names to the files beside it.

    Raises:
        CheckpointError: it is not an index, or names files outside its folder.
    """
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise CheckpointError(f"{path} is larger than {_MAX_INDEX_BYTES} bytes: not a safetensors index")
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    weight_map = _parse_json(raw, path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path} has no weight_map: not a safetensors index")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or shard != Path(shard).name or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} places tensor {name!r} in {shard!r}, which is not a safetensors file beside it"
            )
    return weight_map


def _parse_json(raw: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(str(raw, "utf-8"), object_pairs_hook=_without_doubles)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: the header is not valid JSON ({error}): the file is corrupted") from error
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{path}: the header is a JSON {type(parsed).__name__}, not an object")
    return parsed


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [name for name, _ in pairs]
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{double!r} appears twice")
    return entries


def _tensor(name: str, info: Any, data_start: int, file: MappedFile) -> SafetensorsTensor:
    where = f"{file.path}: tensor {name!r}"
    if not isinstance(info, dict) or info.keys() != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where} is not described by dtype, shape and data_offsets")
    encoding, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        raise CheckpointError(f"{where} has shape {_short(shape)} and data_offsets {_short(offsets)}")
    if not isinstance(encoding, str) or encoding not in ELEMENT_LAYOUTS:
        raise UnsupportedModelError(f"{where} has dtype {_short(encoding)}; known are {', '.join(ELEMENT_LAYOUTS)}")
    begin, end = offsets
    if begin > end or end > file.num_bytes - data_start:
        raise CheckpointError(
            f"{where} claims bytes {begin} to {end} of {file.num_bytes - data_start} bytes of data: "
            "the file is cut off or corrupted"
        )
    elements, num_bytes = ELEMENT_LAYOUTS[encoding]
    if math.prod(shape) * num_bytes != (end - begin) * elements or (shape and shape[-1] % elements):
        raise CheckpointError(f"{where} has {end - begin} bytes, which is not {_short(shape)} of {encoding}")
    return SafetensorsTensor(
        name=name, shape=tuple(shape), encoding=encoding, offset=data_start + begin, num_bytes=end - begin
    )


def _are_counts(values: Any) -> bool:
    """A list of whole numbers that torch can hold, also as the product of those that are not 0."""
    if not isinstance(values, list) or len(values) > 64:
        return False
    if not all(type(value) is int and 0 <= value < 1 << 62 for value in values):
        return False
    return math.prod(max(value, 1) for value in values) < 1 << 62


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _check_coverage(tensors: Iterable[SafetensorsTensor], data_start: int, file: MappedFile) -> None:
    """Refuse overlaps and holes, as the format demands."""
    end, before = data_start, "the header"
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.num_bytes)):
        if tensor.offset != end:
            fault = "overlap" if tensor.offset < end else "leave a hole"
            raise CheckpointError(f"{file.path}: {before} and {tensor.name!r} {fault} at byte {tensor.offset}")
        end, before = tensor.offset + tensor.num_bytes, repr(tensor.name)
    if end != file.num_bytes:
        raise CheckpointError(f"{file.path} goes on for {file.num_bytes - end} bytes after its last tensor")
