"""The two ends of a model that are as wide as its vocabulary, cut by tokens."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from aios_model.layers.embedding import Embedding
from aios_model.weights.sharded import ShardedEntry
from aios_model.weights.source import TensorEntry
from aios_parallel.communicator import Communicator
from aios_parallel.shares import share_vocabulary


class VocabularyEmbedding(Embedding):
    """An embedding table of which each rank holds some tokens' rows; who has a token's row adds it to zeros."""

    def __init__(self, num_embeddings: int, size: int, *, group: Communicator) -> None:
        super().__init__(num_embeddings, size)
        self._group = group
        self._share = share_vocabulary(num_embeddings, group.size)[group.rank]
        self._first = next((run.start for run in self._share.runs if run.start is not None), num_embeddings)

    def load(self, entry: TensorEntry, *, dtype: torch.dtype, device: torch.device) -> None:
        """Copies the rank's rows to the device."""
        self.weight = ShardedEntry(entry, rows=self._share).read(dtype=dtype).to(device)
        entry.release()

    def forward(self, tokens_T: Tensor) -> Tensor:
        """[T] int64 -> [T, D]."""
        local_T = tokens_T - self._first
        elsewhere_T = (local_T < 0) | (local_T >= len(self.weight))
        rows_TD = F.embedding(local_T.masked_fill(elsewhere_T, 0), self.weight)
        return self._group.all_reduce(rows_TD.masked_fill(elsewhere_T[:, None], 0))


def gather_logits(logits_SW: Tensor, group: Communicator, *, vocab_size: int) -> Tensor | None:
    """All ranks' scores side by side, [S, V], on the group's first rank; None on the others.

    Args:
        logits_SW: This rank's, [S, W], of the tokens that `share_vocabulary` gives it.
        group: The ranks that share the head.
        vocab_size: V.
    """
    if group.size == 1:
        return logits_SW[:, :vocab_size]
    stacked = group.gather(logits_SW.contiguous())
    return None if stacked is None else stacked.transpose(0, 1).flatten(1)[:, :vocab_size]
