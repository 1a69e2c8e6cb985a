"""Checkpoints in the compressed-tensors format: INT4 and INT8 packed, INT8 and FP8 element by element.

A layer [N, K] is stored as

    pack-quantized    weight_packed      int32 [N, ceil(K * b / 32)], codes + 2^(b-1), lowest bits first
                      weight_shape       int64 [2]: N, K
                      weight_zero_point  int32 [ceil(N * b / 32), groups], packed along N; only if not symmetric
    int-quantized     weight             int8 [N, K];  weight_zero_point int8 [N, groups] if not symmetric
    float-quantized   weight             float8_e4m3fn [N, K]
    all               weight_scale       [N, groups], [N, 1], [N] or [1]
                      weight_g_idx       int32 [K], the group of each column (older files with `actorder: group`)

    w[n, k] = weight_scale[n, g] * (code[n, k] - zero_point[n, g])

Codes and zero points are signed; both are kept with 2^(b-1) added. Scales of the inputs (`input_scale`, …) are not
needed: inputs are rounded by what they are, or not at all.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from aios_model.errors import CheckpointError
from aios_model.weights.source import TensorEntry
from aios_quant.checkpoints.compressed_tensors_config import PACKED, WHERE, WeightGroup, read_config
from aios_quant.checkpoints.fields import FLOATS, check_matrix, check_tensor, companion
from aios_quant.checkpoints.packing import codes_at, unpack_words
from aios_quant.checkpoints.quantized_entry import ColumnGroups, IntegerEntry, QuantizedEntry, column_groups
from aios_quant.quantized_tensor import Fp8Tensor


def read_compressed_tensors(entries: Mapping[str, TensorEntry], config: Mapping[str, Any]) -> dict[str, QuantizedEntry]:
    """The quantised layers of a checkpoint, by the prefix of their tensors.

    Raises:
        UnsupportedModelError: The config asks for something else than is described above.
        CheckpointError: A tensor is missing, does not fit the others or contradicts the config.
    """
    parsed = read_config(config)
    layers: dict[str, QuantizedEntry] = {}
    for name, entry in entries.items():
        prefix, _, kind = name.rpartition(".")
        if not (kind == "weight_packed" or (kind == "weight" and entry.encoding in ("I8", "F8_E4M3"))):
            continue
        group = parsed.group_of(prefix)
        if group is None or (kind == "weight_packed") != (group.format == PACKED):
            stored = "is not to be quantised" if group is None else f"is stored as {group.format}"
            raise CheckpointError(f"the checkpoint holds {name} ({entry.encoding}), but {WHERE} says that it {stored}")
        layers[prefix] = _read_layer(entries, prefix, group)
    return layers


def _read_layer(entries: Mapping[str, TensorEntry], prefix: str, group: WeightGroup) -> QuantizedEntry:
    if group.format == PACKED:
        return PackedIntegers(entries, prefix, group)
    return PlainIntegers(entries, prefix, group) if group.type == "int" else PlainFloats(entries, prefix, group)


class _Integers(IntegerEntry):
    """What both integer formats have in common: scales and groups."""

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        prefix: str,
        group: WeightGroup,
        *,
        stored: TensorEntry,
        shape: tuple[int, int],
    ) -> None:
        rows, columns = shape
        size = min(group.group_size or columns, columns)
        if columns % size:
            raise CheckpointError(f"tensor {stored.name} has {columns} columns, not a multiple of group_size = {size}")
        self._stored = stored
        self._scale = _scale_entry(entries, prefix, stored.name, rows, columns // size)
        self._zero_point: TensorEntry | None = None
        if not group.symmetric:
            self._zero_point = companion(entries, f"{prefix}.weight_zero_point", beside=stored.name)
        group_index = entries.get(f"{prefix}.weight_g_idx")
        super().__init__(
            f"{prefix}.weight",
            shape,
            f"compressed-tensors INT{group.bits}",
            companions=[stored, self._scale, self._zero_point, group_index],
            bits=group.bits,
            group_size=size,
            groups=_groups(group_index, columns, size),
        )

    @property
    def has_zero_points(self) -> bool:
        """Whether the layer is not symmetric."""
        return self._zero_point is not None

    def scales(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.scales`."""
        scales = _row_scales(self._scale, self.shape[0])
        return scales.index_select(0, index_R)


class PackedIntegers(_Integers):
    """A layer of `pack-quantized`."""

    def __init__(self, entries: Mapping[str, TensorEntry], prefix: str, group: WeightGroup) -> None:
        stored = entries[f"{prefix}.weight_packed"]
        rows, words = check_matrix(stored, encodings=("I32",))
        shape = check_tensor(
            companion(entries, f"{prefix}.weight_shape", beside=stored.name), shapes=[(2,)], encodings=("I64", "I32")
        )
        declared = [int(size) for size in shape.typed()]
        if declared[0] != rows or not 0 < declared[1] <= words * 32 // group.bits:
            raise CheckpointError(f"tensor {shape.name} says {declared}, but {stored.name} has shape {[rows, words]}")
        if -(-declared[1] * group.bits // 32) != words:
            raise CheckpointError(f"tensor {stored.name} has {words} words a row, too many for {declared[1]} columns")
        super().__init__(entries, prefix, group, stored=stored, shape=(rows, declared[1]))
        if self._zero_point is not None:
            packed_rows = -(-rows * group.bits // 32)
            check_tensor(self._zero_point, shapes=[(packed_rows, declared[1] // self.group_size)], encodings=("I32",))

    def codes(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.codes`."""
        words = self._stored.typed().index_select(0, index_R)
        return unpack_words(words, self.bits, dim=1)[:, : self.shape[1]]

    def zero_points(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.zero_points`."""
        assert self._zero_point is not None
        return codes_at(self._zero_point.typed(), self.bits, index_R, dim=0)


class PlainIntegers(_Integers):
    """A layer of `int-quantized`: INT8."""

    def __init__(self, entries: Mapping[str, TensorEntry], prefix: str, group: WeightGroup) -> None:
        stored = entries[f"{prefix}.weight"]
        shape = check_matrix(stored, encodings=("I8",))
        super().__init__(entries, prefix, group, stored=stored, shape=shape)
        if self._zero_point is not None:
            shapes = _scale_shapes(shape[0], shape[1] // self.group_size)
            check_tensor(self._zero_point, shapes=shapes, encodings=("I8",))

    def codes(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.codes`."""
        return self._stored.typed().index_select(0, index_R).view(torch.uint8).bitwise_xor_(128)  # + 128

    def zero_points(self, index_R: Tensor) -> Tensor:
        """See `IntegerEntry.zero_points`."""
        assert self._zero_point is not None
        points = _row_scales(self._zero_point, self.shape[0]).index_select(0, index_R)
        return points.to(torch.int16) + 128


class PlainFloats(QuantizedEntry):
    """A layer of `float-quantized`: FP8 with one scale per row, or one for all rows."""

    def __init__(self, entries: Mapping[str, TensorEntry], prefix: str, group: WeightGroup) -> None:
        self._stored = entries[f"{prefix}.weight"]
        rows, columns = check_matrix(self._stored, encodings=("F8_E4M3",))
        if group.group_size is not None:
            raise CheckpointError(f"tensor {self._stored.name} is FP8 with scales per group, which is not supported")
        self._scale = _scale_entry(entries, prefix, self._stored.name, rows, 1)
        companions = [self._stored, self._scale]
        super().__init__(f"{prefix}.weight", (rows, columns), "compressed-tensors FP8", companions=companions)

    def take(self, index_R: Tensor) -> Fp8Tensor:
        """See `QuantizedEntry.take`."""
        codes = self._stored.typed().view(torch.uint8).index_select(0, index_R)
        scales = _row_scales(self._scale, self.shape[0]).index_select(0, index_R)
        return Fp8Tensor(codes_NK=codes, scales_N=scales.flatten().to(torch.float32))


def _scale_entry(
    entries: Mapping[str, TensorEntry], prefix: str, beside: str, rows: int, num_groups: int
) -> TensorEntry:
    entry = companion(entries, f"{prefix}.weight_scale", beside=beside)
    return check_tensor(entry, shapes=_scale_shapes(rows, num_groups), encodings=FLOATS)


def _scale_shapes(rows: int, num_groups: int) -> list[tuple[int, ...]]:
    """Per group; where a row is one group also per row without a second dimension, or one for the whole tensor."""
    return [(rows, num_groups)] if num_groups > 1 else [(rows, 1), (rows,), (1,), (1, 1), ()]


def _row_scales(entry: TensorEntry, rows: int) -> Tensor:
    """What `entry` holds per row and group, [N, groups], whichever of the shapes it has."""
    values = entry.typed()
    return values if values.dim() == 2 and len(values) == rows else values.reshape(-1, 1).expand(rows, 1)


def _groups(entry: TensorEntry | None, columns: int, group_size: int) -> ColumnGroups:
    if entry is None:
        return ColumnGroups()
    check_tensor(entry, shapes=[(columns,)], encodings=("I32", "I64"))
    return column_groups(entry.typed(), group_size=group_size, name=entry.name)
