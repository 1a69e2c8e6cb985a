"""A weight that a published checkpoint stores as several tensors, presented as the one it stands for.

GPTQ, AWQ and compressed-tensors keep a layer's codes, scales and zero points apart, in layouts of their own. A
`QuantizedEntry` is the layer's `weight` again: `read` gives floats, so that any Linear can load it, and `quantized` the
codes in the common form, so that nothing needs to be rounded a second time.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from aios_model.errors import CheckpointError, UnsupportedModelError
from aios_model.weights.source import PIECE_ELEMENTS, TensorEntry
from aios_quant.quantized_tensor import PackedWeight, QuantizedTensor, collect_rows


class QuantizedEntry(TensorEntry):
    """A matrix [N, K] in codes.

    Args:
        name: Of the weight it stands for, `….weight`.
        shape: (N, K).
        encoding: What it is stored as, for messages.
        companions: The tensors that it is made of.
    """

    column_order_K: Tensor | None = None
    """Where the columns of `quantized()` lie in another order than those of `read()`: the latter's index of each."""

    def __init__(
        self, name: str, shape: tuple[int, int], encoding: str, *, companions: Sequence[TensorEntry | None]
    ) -> None:
        super().__init__(name, shape, encoding)
        self._companions = [entry for entry in companions if entry is not None]

    def quantized(self, *, rows: slice | None = None) -> PackedWeight:
        """The codes of the rows, one byte each, unpacked piece by piece."""
        selected, _ = self._ranges(rows, None)
        step = max(1, PIECE_ELEMENTS // max(1, self.shape[1]))
        index = torch.arange(selected.start, selected.stop)
        return collect_rows((self.take(piece) for piece in index.split(step)), len(index))

    @abstractmethod
    def take(self, index_R: Tensor) -> PackedWeight:
        """Rows `index_R` (int64) in the common form, columns in the order of `column_order_K`."""

    def gather(self, index_T: Tensor, *, dtype: torch.dtype) -> Tensor:
        """See `TensorEntry.gather`."""
        index = index_T.cpu()
        if len(index) and not 0 <= int(index.min()) <= int(index.max()) < self.shape[0]:
            raise IndexError(f"{self.name}: an index is not in 0 to {self.shape[0] - 1}")
        return self._floats(index, dtype).to(index_T.device)

    def raw(self, *, rows: slice | None = None) -> Tensor:
        """Refused: the weight is made of several tensors; `quantized` gives its codes."""
        raise UnsupportedModelError(f"{self.name} is stored as {self.encoding} in several tensors, which have no rows")

    def select(self, index: int) -> TensorEntry:
        """Refused: a matrix has no leading dimension to select from."""
        raise ValueError(f"{self.name} is a matrix: it has no leading dimension to select from")

    def release(self) -> None:
        """Gives the pages of all its tensors back."""
        for entry in self._companions:
            entry.release()

    def _decode(self, lines: range, columns: range, out_LC: Tensor) -> None:
        rows = self._floats(torch.arange(lines.start, lines.stop), out_LC.dtype)
        out_LC.copy_(rows[:, columns.start : columns.stop])

    def _floats(self, index_R: Tensor, dtype: torch.dtype) -> Tensor:
        values = self.take(index_R).dequantize(dtype)
        if self.column_order_K is None:
            return values
        apart = torch.empty_like(values)
        apart[:, self.column_order_K] = values
        return apart


class IntegerEntry(QuantizedEntry):
    """Codes with scales, and perhaps zero points, per group of columns.

    Args:
        name: As for `QuantizedEntry`, as are `shape`, `encoding` and `companions`.
        shape: (N, K).
        encoding: What it is stored as.
        companions: The tensors that it is made of.
        bits: 4 or 8.
        group_size: Columns per scale.
        groups: Where the columns of each group are.

    Raises:
        CheckpointError: K is not a multiple of the group size.
        UnsupportedModelError: The groups have a size that kernels have no use for.
    """

    def __init__(
        self,
        name: str,
        shape: tuple[int, int],
        encoding: str,
        *,
        companions: Sequence[TensorEntry | None],
        bits: int,
        group_size: int,
        groups: ColumnGroups,
    ) -> None:
        super().__init__(name, shape, encoding, companions=companions)
        if shape[1] % group_size:
            raise CheckpointError(f"{name} has K = {shape[1]} columns, not a multiple of its group_size {group_size}")
        if group_size % 32 and (group_size != shape[1] or self.has_zero_points):
            raise UnsupportedModelError(f"{name} has groups of {group_size} columns; supported are multiples of 32")
        self.bits = bits
        self.group_size = group_size
        self.column_order_K = groups.column_order_K
        self._group_order = groups.group_order_G

    def take(self, index_R: Tensor) -> QuantizedTensor:
        """See `QuantizedEntry.take`."""
        codes = self.codes(index_R)
        if self.column_order_K is not None:
            codes = codes.index_select(1, self.column_order_K)
        scales = self.scales(index_R)
        zeros = self.zero_points(index_R) if self._zero is None else None
        if self._group_order is not None:
            scales = scales.index_select(1, self._group_order)
            zeros = None if zeros is None else zeros.index_select(1, self._group_order)
        if zeros is not None or scales.dtype != torch.float16:
            scales = scales.to(torch.float32)
        return QuantizedTensor(
            codes_NK=codes.contiguous(),
            bits=self.bits,
            zero=self._zero or 0,
            group_size=self.group_size,
            scales_NG=scales.contiguous(),
            mins_NG=None if zeros is None else -scales * zeros.to(torch.float32),
        )

    @property
    @abstractmethod
    def has_zero_points(self) -> bool:
        """Whether the checkpoint stores zero points for this weight."""

    @abstractmethod
    def codes(self, index_R: Tensor) -> Tensor:
        """uint8 [R, K], columns as in the file."""

    @abstractmethod
    def scales(self, index_R: Tensor) -> Tensor:
        """Floating [R, groups], groups as in the file."""

    @abstractmethod
    def zero_points(self, index_R: Tensor) -> Tensor:
        """uint8 or int16 [R, groups]: what is subtracted from the codes; only asked if `has_zero_points`."""

    @cached_property
    def _zero(self) -> int | None:
        """The one zero point of all groups, which then needs no minimums; None if they differ."""
        if not self.has_zero_points:
            return 1 << (self.bits - 1)
        points = self.zero_points(torch.arange(self.shape[0]))
        lowest, highest = int(points.min()), int(points.max())
        return lowest if lowest == highest else None


@dataclass(frozen=True, slots=True, kw_only=True)
class ColumnGroups:
    """Which columns share a scale.

    Attributes:
        column_order_K: The columns brought together by group, int64 [K]; None if each group's are neighbours.
        group_order_G: The scale of each run of columns, int64 [groups]; None if runs and scales have one order.
    """

    column_order_K: Tensor | None = None
    group_order_G: Tensor | None = None


def column_groups(group_index_K: Tensor, *, group_size: int, name: str) -> ColumnGroups:
    """Reads GPTQ's `g_idx`, the group of each column.

    Args:
        group_index_K: Integers [K].
        group_size: Columns per group.
        name: Of the tensor, for messages.

    Raises:
        CheckpointError: A group does not have as many columns as it should.
    """
    index = group_index_K.to(torch.int64)
    num_groups = len(index) // group_size
    if int(index.min()) < 0 or int(index.max()) >= num_groups:
        raise CheckpointError(f"tensor {name} names groups {int(index.min())} to {int(index.max())} of {num_groups}")
    runs = index.view(num_groups, group_size)
    if bool((runs == runs[:, :1]).all()):
        order = runs[:, 0].contiguous()
        return ColumnGroups(group_order_G=None if torch.equal(order, torch.arange(num_groups)) else order)
    counts = torch.bincount(index, minlength=num_groups)
    if bool((counts != group_size).any()):
        raise CheckpointError(
            f"tensor {name} gives a group {int(counts.max())} columns; its group_size is {group_size}"
        )
    return ColumnGroups(column_order_K=index.argsort(stable=True))
