"""Rows in another order than the file's.

GGUF files of the `llama` architecture store the rows of Wq and Wk so that the two numbers of a rotary pair lie side by
side (0, H/2, 1, H/2 + 1, …); Hugging Face and our `Rotation` keep them in halves. Reading such a tensor through
`RowPermutedEntry` puts them back, and packed rows can be put back just as well, since a row is never split.
"""

from __future__ import annotations

import torch
from torch import Tensor

from aios_model.weights.source import TensorEntry


def rows_in_halves(num_rows: int, num_heads: int) -> Tensor:
    """For each row in our order the file's row, [num_rows] int64, of heads stored with rotary pairs side by side."""
    pairs = torch.arange(num_rows).view(num_heads, -1, 2)
    return pairs.transpose(1, 2).reshape(num_rows)


class RowPermutedEntry(TensorEntry):
    """Reads row `index[i]` of another entry as its row i.

    Args:
        inner: A matrix or a vector.
        index: Permutation of its rows (of a vector's elements), int64.
    """

    def __init__(self, inner: TensorEntry, index: Tensor) -> None:
        super().__init__(inner.name, inner.shape, inner.encoding)
        self._inner = inner
        self._index = index

    def gather(self, index_T: Tensor, *, dtype: torch.dtype) -> Tensor:
        """Rows `index_T` in our order; see `TensorEntry.gather`."""
        return self._inner.gather(self._index.to(index_T.device)[index_T], dtype=dtype)

    def raw(self, *, rows: slice | None = None) -> Tensor:
        """A copy of the packed rows in our order: unlike other entries', they do not lie so in the file."""
        selected, _ = self._ranges(rows, None)
        return self._inner.raw()[self._index[selected.start : selected.stop]]

    def select(self, index: int) -> TensorEntry:
        """Permuted entries are matrices or vectors: there is nothing to select from."""
        raise ValueError(f"{self.name} has permuted rows and no leading dimension to select from")

    def release(self) -> None:
        """Gives the file's pages back."""
        self._inner.release()

    def _decode(self, lines: range, columns: range, out_LC: Tensor) -> None:
        if len(self.shape) < 2:
            values = self._inner.gather(self._index[columns.start : columns.stop], dtype=out_LC.dtype)
            out_LC.copy_(values[None])
            return
        rows = self._inner.gather(self._index[lines.start : lines.stop], dtype=out_LC.dtype)
        out_LC.copy_(rows[:, columns.start : columns.stop])
