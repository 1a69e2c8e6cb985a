"""Reads a checkpoint's `quantization_config` and the tensors it promises, and says what is wrong with either."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.weights.source import TensorEntry

FLOATS = ("F16", "BF16", "F32")
"""Encodings that scales may have."""


def choice(config: Mapping[str, Any], field: str, allowed: Sequence[Any], *, default: Any, where: str) -> Any:
    """The value of `field`; UnsupportedModelError, naming it and what is supported, if it is not one of `allowed`."""
    value = config.get(field)
    value = default if value is None else value
    if not any(value == option and type(value) is type(option) for option in allowed):
        shown = ", ".join(repr(option) for option in allowed)
        raise UnsupportedModelError(f"{where}: {field} = {_short(value)} is not supported; supported: {shown}")
    return value


def group_size_field(config: Mapping[str, Any], *, default: int, where: str) -> int:
    """The field `group_size`: -1 for whole rows, or a multiple of 32."""
    value = config.get("group_size")
    value = default if value is None else value
    if type(value) is not int or not (value == -1 or (0 < value <= 1 << 20 and value % 32 == 0)):
        raise UnsupportedModelError(
            f"{where}: group_size = {_short(value)} is not supported; supported: -1 (whole rows) and multiples of 32"
        )
    return value


def refuse_fields(config: Mapping[str, Any], fields: Sequence[str], *, where: str) -> None:
    """UnsupportedModelError if one of `fields` is set to anything but null, false or an empty collection."""
    for field in fields:
        if config.get(field):
            raise UnsupportedModelError(f"{where}: {field} = {_short(config[field])} is not supported")


def companion(entries: Mapping[str, TensorEntry], name: str, *, beside: str) -> TensorEntry:
    """The entry `name`; CheckpointError if the checkpoint lacks it."""
    if name not in entries:
        raise CheckpointError(f"the checkpoint holds {beside} but lacks {name}")
    return entries[name]


def check_tensor(entry: TensorEntry, *, shapes: Sequence[tuple[int, ...]], encodings: Sequence[str]) -> TensorEntry:
    """`entry` itself; CheckpointError unless it has one of the shapes and encodings."""
    if entry.shape not in shapes:
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise CheckpointError(f"tensor {entry.name} has shape {list(entry.shape)}, expected {expected}")
    if entry.encoding not in encodings:
        raise CheckpointError(f"tensor {entry.name} is stored as {entry.encoding}, expected {' or '.join(encodings)}")
    return entry


def check_matrix(entry: TensorEntry, *, encodings: Sequence[str]) -> tuple[int, int]:
    """The two sizes of a matrix; CheckpointError if it is none, is empty or has another encoding."""
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise CheckpointError(f"tensor {entry.name} has shape {list(entry.shape)}, expected a matrix")
    check_tensor(entry, shapes=[entry.shape], encodings=encodings)
    return entry.shape[0], entry.shape[1]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
