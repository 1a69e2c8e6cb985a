"""What every checkpoint format offers the loader: tensors by name, read by the slice.

A `WeightSource` is a mapping of names to `TensorEntry`. An entry knows its name, shape and encoding and holds no data:
`read` decodes the slice asked for, so a rank of a tensor-parallel group touches only its own rows or columns, and a
model twice the size of the memory can still be inspected.

Formats differ only in how a run of lines becomes numbers (`TensorEntry._decode`); cutting slices and bounding
temporaries happens here, once.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from aios_model.errors import UnsupportedModelError

# Elements decoded at a time. Torch runs operations up to this size in the calling thread and splits larger ones among
# its threads, with a barrier each; on a busy machine the barriers are all one sees. Decoding the bundled model costs
# 0.4 s of CPU time in such pieces, whatever else runs; in pieces of half a million it took 0.2 to 13 s. Temporaries
# stay below 0.5 MB.
PIECE_ELEMENTS = 1 << 15


class WeightSource(Protocol):
    """A checkpoint: safetensors, GGUF, dummy weights, or what an upper layer adds."""

    def entries(self) -> Mapping[str, TensorEntry]:
        """All tensors by their name in the checkpoint."""
        ...

    def close(self) -> None:
        """Let go of the files; tensors already read stay valid, entries don't."""
        ...


class TensorEntry(ABC):
    """One tensor of a checkpoint, not yet read.

    Rows are indices of dimension 0, columns of the last one; both are slices with step 1 (or None) and follow Python's
    rules, so `slice(-2, None)` are the last two. A vector has only one dimension: `rows` and `columns` mean the same
    there, and only one may be given.

    Attributes:
        name: Name in the checkpoint, e.g. `model.layers.0.mlp.up_proj.weight` or `blk.0.ffn_up.weight`.
        shape: Logical shape, outermost dimension first (torch's order).
        encoding: How the elements are stored: `F32`, `BF16`, `I32`, `Q4_0`, …
    """

    def __init__(self, name: str, shape: tuple[int, ...], encoding: str) -> None:
        self.name = name
        self.shape = shape
        self.encoding = encoding

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, {list(self.shape)}, {self.encoding})"

    def read(self, *, rows: slice | None = None, columns: slice | None = None, dtype: torch.dtype) -> Tensor:
        """The slice, decoded into memory of its own.

        Args:
            rows: Indices of dimension 0; None for all.
            columns: Indices of the last dimension, on any border; None for all.
            dtype: A floating dtype.

        Raises:
            UnsupportedModelError: the encoding holds no plain numbers, or none we can decode.
        """
        out = torch.empty(self._slice_shape(*self._ranges(rows, columns)), dtype=dtype)
        self.read_into(out, rows=rows, columns=columns)
        return out

    def read_into(self, out: Tensor, *, rows: slice | None = None, columns: slice | None = None) -> None:
        """Decode the slice into `out`, with less than 1 MB of temporaries.

        Args:
            out: Any floating dtype, device and strides; its shape is that of the slice.
            rows: As for `read`.
            columns: As for `read`.

        Raises:
            ValueError: `out` has another shape, or holds integers.
            UnsupportedModelError: as for `read`.
        """
        row_range, column_range = self._ranges(rows, columns)
        expected = self._slice_shape(row_range, column_range)
        if tuple(out.shape) != expected:
            raise ValueError(f"{self.name}: a buffer of shape {list(out.shape)} for a slice of {list(expected)}")
        if not out.is_floating_point():
            raise ValueError(f"{self.name}: tensors decode to floating dtypes, not {out.dtype}")
        line = row_range.start * math.prod(self.shape[1:-1])
        for view in _as_lines(out, len(column_range)):
            for lines, part, piece in _pieces(line, column_range, view):
                self._decode(lines, part, piece)
            line += len(view)

    @abstractmethod
    def gather(self, index_T: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Rows `index_T` of dimension 0, decoded: [T, ...] on the device of `index_T`.

        What an embedding needs that stays mapped: only the rows looked up are touched.

        Raises:
            IndexError: an index is negative or past the end.
        """

    @abstractmethod
    def raw(self, *, rows: slice | None = None) -> Tensor:
        """The packed bytes as they lie in the file, not copied: uint8 [rows, bytes per row], read-only.

        A row is one index of dimension 0; for a vector, one block (which is one element, unless elements are packed
        in blocks), and then `rows` must lie on block borders.
        """

    @abstractmethod
    def select(self, index: int) -> TensorEntry:
        """The entry without its leading dimension: expert `index` of a tensor [E, F, D]."""

    def typed(self, *, rows: slice | None = None) -> Tensor:
        """The elements in the dtype they are stored in, not copied: shape of the slice, read-only.

        For encodings whose elements torch has a dtype for: floats, integers, 8-bit floats.
        """
        raise UnsupportedModelError(f"{self.name} is stored as {self.encoding}, which has no dtype of its own")

    def release(self) -> None:
        """Give the file's pages back to the kernel; reading again still works."""
        return

    @abstractmethod
    def _decode(self, lines: range, columns: range, out_LC: Tensor) -> None:
        """Decode a window of at most `PIECE_ELEMENTS` elements into `out_LC` (any floating dtype, device, strides).

        A tensor of shape [E, F, D] has E*F lines of D elements; a vector or a scalar is one line.
        """

    def _ranges(self, rows: slice | None, columns: slice | None) -> tuple[range, range]:
        """Rows and columns as ranges; a vector is one row of its elements."""
        if len(self.shape) >= 2:
            return _range(self.name, rows, self.shape[0]), _range(self.name, columns, self.shape[-1])
        if rows is not None and columns is not None:
            raise ValueError(f"{self.name} is a vector: slice its rows or its columns, not both")
        return range(1), _range(self.name, columns if rows is None else rows, math.prod(self.shape))

    def _slice_shape(self, rows: range, columns: range) -> tuple[int, ...]:
        """The shape of what `_ranges` selected."""
        if len(self.shape) >= 2:
            return (len(rows), *self.shape[1:-1], len(columns))
        return (len(columns),) if self.shape else ()


def _range(name: str, window: slice | None, size: int) -> range:
    selected = range(size)[window if window is not None else slice(None)]
    if selected.step != 1:
        raise ValueError(f"{name}: slices are contiguous, step {selected.step} is not")
    return selected


def _as_lines(out: Tensor, width: int) -> Iterator[Tensor]:
    """`out` as 2-D views [lines, width]: one, or one per row where its strides don't allow one."""
    if out.numel() == 0:
        return
    try:
        yield out.view(out.numel() // width, width)
    except RuntimeError:
        for row in out:
            yield from _as_lines(row, width)


def _pieces(first_line: int, columns: range, out_LC: Tensor) -> Iterator[tuple[range, range, Tensor]]:
    """Cut a window into pieces of at most `PIECE_ELEMENTS`, on multiples of it where one line is longer than that."""
    for start in range(columns.start - columns.start % PIECE_ELEMENTS, columns.stop, PIECE_ELEMENTS):
        part = range(max(start, columns.start), min(start + PIECE_ELEMENTS, columns.stop))
        offset = part.start - columns.start
        step = max(1, PIECE_ELEMENTS // len(part))
        for line in range(0, len(out_LC), step):
            piece = out_LC[line : line + step, offset : offset + len(part)]
            yield range(first_line + line, first_line + line + len(piece)), part, piece
