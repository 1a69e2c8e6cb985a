"""The table that turns token ids into vectors."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from aios_model.weights.source import TensorEntry


class Embedding(nn.Module):
    """Rows of a [V, D] table.

    On a CPU the table stays in the mapped file, in the file's own encoding, and only the rows looked up are decoded:
    a step reads a handful of rows, so holding the table in float32 (113 MB of the bundled model) would buy nothing.
    Other devices hold it whole.
    """

    def __init__(self, num_embeddings: int, size: int) -> None:
        super().__init__()
        self.num_embeddings = num_embeddings
        self.size = size
        self.weight: Tensor = torch.empty(num_embeddings, size, device="meta")
        self._entry: TensorEntry | None = None
        self._dtype = torch.float32

    def load(self, entry: TensorEntry, *, dtype: torch.dtype, device: torch.device) -> None:
        """Points at the mapped table on a CPU, copies it to other devices."""
        self._dtype = dtype
        if device.type == "cpu":
            self._entry = entry
        else:
            self.weight = entry.read(dtype=dtype).to(device)

    @property
    def table(self) -> TensorEntry | None:
        """The mapped table; None if it is held whole."""
        return self._entry

    def forward(self, tokens_T: Tensor) -> Tensor:
        """[T] int64 -> [T, D]."""
        if self._entry is not None:
            return self._entry.gather(tokens_T, dtype=self._dtype)
        return F.embedding(tokens_T, self.weight)
