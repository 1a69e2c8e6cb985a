"""Drawing with torch operations: the reference, on any device and for float32 and float64.

Shapes: S rows of the logits given, R rows of a part of them, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from aios_model.sampling.drawer import require_finite
from aios_model.sampling.noise import row_keys
from aios_model.sampling.ranking import top_token
from aios_model.sampling.truncation import Truncation, draw, draw_sorted, draw_truncated, mask_min_p
from aios_model.transfers import upload

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from aios_model.sampling.rows import SamplingRow

_BLOCK_ELEMENTS_CPU = 2**18
"""Logits drawn from at once. Temporaries stay in the cache: 3 times faster than 64 rows of 49,152 at once."""
_BLOCK_ELEMENTS = 2**24


def rows_per_block(vocab_size: int, device: torch.device) -> int:
    """How many rows to work on at once."""
    return max(1, (_BLOCK_ELEMENTS_CPU if device.type == "cpu" else _BLOCK_ELEMENTS) // vocab_size)


class TorchDrawer:
    """A `Drawer` of torch operations.

    Args:
        vocab_size: Width of the logits.
        device: Where the logits are.
    """

    def __init__(self, *, vocab_size: int, device: torch.device) -> None:
        self._vocab_size = vocab_size
        self._device = device

    def draw(self, logits_SV: Tensor, indices: Sequence[int], rows: Sequence[SamplingRow]) -> list[int]:
        """Greedy rows first, then the others block by block, sorted by what they need; see `Drawer.draw`."""
        if not indices:
            return []
        token_ids_S, largest_S = top_token(logits_SV)
        token_ids, largest = token_ids_S.tolist(), largest_S.tolist()
        require_finite([largest[index] for index in indices], rows)
        chosen = {index: token_ids[index] for index in indices}
        random = {index: row for index, row in zip(indices, rows, strict=True) if not row.params.is_greedy}
        if random:
            chosen |= self._draw_random(logits_SV, largest_S, random)
        return list(chosen.values())

    @torch.inference_mode()
    def launch(self, logits_SV: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, Tensor]:
        """Draws one token for every row, the same as `draw`, and reads nothing from the device.

        Returns:
            Token ids, int64 [S], and each row's largest logit, [S]: what `require_finite` wants to see.
        """
        token_ids_S, largest_S = top_token(logits_SV)
        random = {index: row for index, row in enumerate(rows) if not row.params.is_greedy}
        for index_R, token_ids_R in self._draws(logits_SV, largest_S, random, truncated=draw_sorted):
            token_ids_S.index_copy_(0, index_R, token_ids_R)
        return token_ids_S, largest_S

    @torch.inference_mode()
    def _draw_random(self, logits_SV: Tensor, largest_S: Tensor, rows: dict[int, SamplingRow]) -> dict[int, int]:
        """Token ids of rows with a temperature, by their index in the logits."""
        chosen: dict[int, int] = {}
        for index_R, token_ids_R in self._draws(logits_SV, largest_S, rows, truncated=draw_truncated):
            chosen.update(zip(index_R.tolist(), token_ids_R.tolist(), strict=True))
        return chosen

    def _draws(
        self,
        logits_SV: Tensor,
        largest_S: Tensor,
        rows: dict[int, SamplingRow],
        *,
        truncated: Callable[[Tensor, Tensor, Truncation], Tensor],
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Blocks of rows with a temperature: their indices in the logits, and their tokens, int64 [R] each."""
        for is_truncated in (False, True):
            indices = [index for index, row in rows.items() if self._is_truncated(row) == is_truncated]
            for block in self._blocks(indices):
                part, index_R = [rows[index] for index in block], self._column(block, torch.int64)
                log_weights_RV = self._log_weights(logits_SV[index_R], largest_S[index_R], part)
                if is_truncated:
                    yield index_R, truncated(log_weights_RV, self._keys(part), self._truncation(part))
                else:
                    yield index_R, draw(log_weights_RV, self._keys(part))

    def _blocks(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        step = rows_per_block(self._vocab_size, self._device)
        for start in range(0, len(indices), step):
            yield indices[start : start + step]

    def _is_truncated(self, row: SamplingRow) -> bool:
        return row.params.top_p < 1.0 or 0 < row.params.top_k < self._vocab_size

    def _log_weights(self, logits_RV: Tensor, largest_R: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """Logits over temperature, in place, with each row's largest at 0 and what min-p excludes at -inf.

        The shift comes before the division: however low the temperature, nothing but the unlikely overflows.
        """
        temperature_R = self._column([row.params.temperature for row in rows], logits_RV.dtype)
        logits_RV.sub_(largest_R[:, None]).div_(temperature_R[:, None])
        min_p = [row.params.min_p for row in rows]
        if any(min_p):
            log_min_p = [math.log(p) if p > 0 else -math.inf for p in min_p]
            mask_min_p(logits_RV, self._column(log_min_p, logits_RV.dtype))
        return logits_RV

    def _truncation(self, rows: Sequence[SamplingRow]) -> Truncation:
        top_k = [min(row.params.top_k or self._vocab_size, self._vocab_size) for row in rows]
        return Truncation(
            top_k=self._column(top_k, torch.int64),
            top_p=self._column([row.params.top_p for row in rows], torch.float64),
        )

    def _keys(self, rows: Sequence[SamplingRow]) -> Tensor:
        seeds_R = self._column([row.seed for row in rows], torch.int64)
        return row_keys(seeds_R, self._column([row.position for row in rows], torch.int64))

    def _column(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return upload(values, dtype=dtype, device=self._device)
