"""Rows of a table that stays in GGUF's blocks, decoded in C++ as they are looked up.

`PackedEntry.gather` does the same in torch, in twenty small operations that together cost a decode step 90 µs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from ctypes import c_int32, c_int64, c_void_p

import torch
from torch import Tensor

from aios_model.native.base_library import model_library
from aios_model.native.library import pointer
from aios_model.weights.packed_entry import PackedEntry
from aios_model.weights.source import TensorEntry

ENCODINGS = ("Q4_0", "Q4_1", "Q8_0", "Q6_K")
"""What is decoded here, in the order of `csrc/block_rows.cpp`: what files keep their embeddings in."""


class BlockRows:
    """Looks rows up in a table [V, D], bit for bit as `TensorEntry.gather` does in float32.

    Args:
        entry: The table, its blocks mapped as they lie in the file; `supports` says whether it can be read here.
    """

    def __init__(self, entry: TensorEntry) -> None:
        self._name = entry.name
        self._encoding = ENCODINGS.index(entry.encoding)
        self._table = entry.raw()
        self._num_rows, self._num_columns = entry.shape

    @staticmethod
    def supports(entry: TensorEntry) -> bool:
        """Whether the table's blocks lie in memory, row after row, in an encoding that is known here."""
        return isinstance(entry, PackedEntry) and entry.encoding in ENCODINGS and len(entry.shape) == 2

    def gather(self, index_T: Tensor) -> Tensor:
        """Rows `index_T` (int64, on the CPU), decoded: [T, D] float32.

        Raises:
            IndexError: an index is negative or past the end.
        """
        index = index_T.contiguous()
        assert index.dtype == torch.int64, index.dtype
        out = torch.empty(len(index), self._num_columns)
        wrong = _gather_rows()(
            self._encoding,
            pointer(self._table),
            self._num_rows,
            self._table.shape[1],
            self._num_columns,
            pointer(index),
            len(index),
            pointer(out),
        )
        if wrong >= 0:
            raise IndexError(f"{self._name} has rows 0 to {self._num_rows - 1}, and {int(index[wrong])} was asked for")
        return out


@functools.cache
def _gather_rows() -> Callable[..., int]:
    return model_library().declare(
        "aios_gather_rows", c_int64, c_int32, c_void_p, c_int64, c_int64, c_int64, c_void_p, c_int64, c_void_p
    )
