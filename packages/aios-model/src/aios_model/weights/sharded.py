"""The part of a tensor that one rank of a group holds, presented as a tensor of its own.

A sharded layer loads from a `ShardedEntry` exactly as a whole one loads from the file's entry, and reads its own slice
only. Which rows and columns those are is said by a `Selection`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from aios_model.errors import UnsupportedModelError
from aios_model.weights.selection import Run, Selection
from aios_model.weights.source import TensorEntry


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShard:
    """Which part of a Linear's weight a rank holds.

    Attributes:
        rows: By part, the outputs it computes; parts that are not named are whole.
        columns: The inputs it takes; None for all.
    """

    rows: Mapping[str, Selection] = field(default_factory=dict)
    columns: Selection | None = None

    def weight(self, part: str, entry: TensorEntry) -> TensorEntry:
        """The rank's share of a part's weight."""
        rows = self.rows.get(part)
        return entry if rows is None and self.columns is None else ShardedEntry(entry, rows=rows, columns=self.columns)

    def bias(self, part: str, entry: TensorEntry) -> TensorEntry:
        """The rank's share of a part's bias."""
        rows = self.rows.get(part)
        return entry if rows is None else ShardedEntry(entry, rows=rows)


class ShardedEntry(TensorEntry):
    """Some rows and columns of another entry, as an entry.

    Args:
        whole: A matrix or a vector.
        rows: Which rows (of a vector, elements); None for all.
        columns: Which columns of a matrix; None for all.
    """

    def __init__(self, whole: TensorEntry, *, rows: Selection | None = None, columns: Selection | None = None) -> None:
        if not 1 <= len(whole.shape) <= 2 or (columns is not None and len(whole.shape) == 1):
            raise ValueError(f"{whole.name} of shape {list(whole.shape)} cannot be cut into such shards")
        self.whole = whole
        self.rows = rows or Selection.span(0, whole.shape[0])
        self.columns = columns or Selection.span(0, whole.shape[-1])
        shape = (self.rows.size,) if len(whole.shape) == 1 else (self.rows.size, self.columns.size)
        super().__init__(whole.name, shape, whole.encoding)

    @property
    def has_all_columns(self) -> bool:
        """Whether rows are whole."""
        return self.columns.runs == (Run(0, self.whole.shape[-1]),)

    def gather(self, index_T: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Rows `index_T` of the shard; see `TensorEntry.gather`."""
        index = torch.cat([_indices(run) for run in self.rows.runs])[index_T.cpu()]
        values = self.whole.gather(index.clamp(min=0), dtype=dtype)
        values[index < 0] = 0
        if len(self.shape) == 2 and not self.has_all_columns:
            out = values.new_zeros(len(index), self.columns.size)
            for place, run in self.columns.within(range(self.columns.size)):
                if run.start is not None:
                    out[:, place] = values[:, run.start : run.start + run.length]
            values = out
        return values.to(index_T.device)

    def raw(self, *, rows: slice | None = None) -> Tensor:
        """Refused: a shard's bytes do not lie together. Whoever knows the encoding reads them from `whole`."""
        raise UnsupportedModelError(f"{self.name} is a shard; its packed bytes are those of the whole tensor")

    def select(self, index: int) -> TensorEntry:
        """Refused: an expert is selected first and cut afterwards."""
        raise ValueError(f"{self.name} is a shard: it has no leading dimension to select from")

    def release(self) -> None:
        """Gives the file's pages back."""
        self.whole.release()

    def _decode(self, lines: range, columns: range, out_LC: Tensor) -> None:
        if len(self.shape) == 1:
            self._decode_row(None, self.rows.within(columns), out_LC[0])
            return
        for place, run in self.rows.within(lines):
            if run.start is None:
                out_LC[place].zero_()
            else:
                rows = slice(run.start, run.start + run.length)
                self._decode_row(rows, self.columns.within(columns), out_LC[place])

    def _decode_row(self, rows: slice | None, runs: Iterator[tuple[slice, Run]], out: Tensor) -> None:
        """The runs of columns of `rows`; of a vector (rows None) its elements."""
        for place, run in runs:
            if run.start is None:
                out[..., place].zero_()
            else:
                self.whole.read_into(out[..., place], rows=rows, columns=slice(run.start, run.start + run.length))


def _indices(run: Run) -> Tensor:
    """The indices of a run, int64; -1 where it holds zeros."""
    return torch.full((run.length,), -1) if run.start is None else torch.arange(run.start, run.start + run.length)
