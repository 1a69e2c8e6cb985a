"""The sampler: one row of logits per request in, one token per request out.

In the order of vLLM's sampler:

1. Log probabilities are taken from the logits as the model gave them (`logprobs.py`).
2. Allowed ids, bad words, min_tokens, logit_bias, logits processors, penalties (`processors.py`).
3. Greedy rows take the largest logit, and of equal ones the lowest token id.
4. The others: temperature, min-p, top-k, top-p (`truncation.py`), and a draw keyed by (seed, position) (`noise.py`).

Rows are sorted by what they need. Each gets, bit for bit, what it would get alone: every operation works row by row.

Shapes: S rows of the batch, R rows of a part of it, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from aios_model.sampling.errors import NonFiniteLogitsError, NoTokenLeftError
from aios_model.sampling.logprobs import token_logprobs
from aios_model.sampling.noise import row_keys
from aios_model.sampling.processors import LogitsAdjuster, LogitsProcessor
from aios_model.sampling.ranking import top_token
from aios_model.sampling.rows import SampledToken, SamplingRow, TokenLogprobs
from aios_model.sampling.truncation import Truncation, draw, draw_truncated, mask_min_p

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

__all__ = ["LogitsProcessor", "SampledToken", "Sampler", "SamplingRow", "TokenLogprobs"]

_BLOCK_ELEMENTS_CPU = 2**18
"""Logits drawn from at once. Temporaries stay in the cache: 3 times faster than 64 rows of 49,152 at once."""
_BLOCK_ELEMENTS = 2**24


class Sampler:
    """Draws the next token of every row.

    Args:
        vocab_size: Width of the logits.
        device: Where the logits are.
        logits_processors: Run in this order on the rows that they apply to.
    """

    def __init__(
        self, *, vocab_size: int, device: torch.device | str, logits_processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._adjuster = LogitsAdjuster(vocab_size=vocab_size, processors=logits_processors)
        elements = _BLOCK_ELEMENTS_CPU if self._device.type == "cpu" else _BLOCK_ELEMENTS
        self._rows_per_block = max(1, elements // vocab_size)

    @torch.inference_mode()
    def sample(self, logits_SV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Draws one token per row.

        If bad_words and min_tokens exclude every token that allowed_token_ids and the processors leave, they are set
        aside for this token: a request must go on, and what is allowed matters more than what is unwanted.

        Args:
            logits_SV: [S, V], float32 or float64; other types are converted to float32. Not modified.
            rows: What to draw for each of the S rows.

        Raises:
            NonFiniteLogitsError: Some rows hold NaN or +inf; names their requests.
            NoTokenLeftError: Allowed ids and processors leave no token for some rows; names their requests.
        """
        assert logits_SV.shape == (len(rows), self._vocab_size), (logits_SV.shape, len(rows), self._vocab_size)
        if logits_SV.dtype not in (torch.float32, torch.float64):
            logits_SV = logits_SV.float()
        token_ids = self._choose(logits_SV, rows)
        logprobs = self._logprobs(logits_SV, rows, token_ids)
        return [SampledToken(token_id=token_id, logprobs=logprobs.get(i)) for i, token_id in enumerate(token_ids)]

    def forget(self, request_id: str) -> None:
        """Drops what is remembered of a finished request; unknown ids are ignored."""
        self._adjuster.forget(request_id)

    @property
    def num_remembered_requests(self) -> int:
        """Requests of which token counts or index arrays are kept."""
        return self._adjuster.num_remembered

    def _choose(self, logits_SV: Tensor, rows: Sequence[SamplingRow]) -> list[int]:
        """Draws for the rows whose logits stay as they are, and from an altered copy for the others."""
        adjusted = [index for index, row in enumerate(rows) if self._adjuster.applies_to(row)]
        chosen = self._draw(logits_SV, {index: rows[index] for index in set(range(len(rows))).difference(adjusted)})
        for block in self._blocks(adjusted):
            part = [rows[index] for index in block]
            drawn = self._draw(self._adjusted(logits_SV, block, part), dict(enumerate(part)))
            chosen |= {index: drawn[place] for place, index in enumerate(block)}
        return [chosen[index] for index in range(len(rows))]

    def _adjusted(self, logits_SV: Tensor, indices: Sequence[int], rows: Sequence[SamplingRow]) -> Tensor:
        """A copy of the logits at `indices`, which are those of `rows`, with bans, biases and penalties applied."""
        logits_RV = self._copy(logits_SV, indices)
        self._adjuster.adjust(logits_RV, rows)
        blocked = (logits_RV.amax(dim=-1) == -torch.inf).nonzero()[:, 0].tolist()
        if blocked:
            again_RV = self._copy(logits_SV, [indices[place] for place in blocked])
            self._adjuster.adjust(again_RV, [rows[place] for place in blocked], with_bans=False)
            logits_RV[self._column(blocked, torch.int64)] = again_RV
        return logits_RV

    def _draw(self, logits_SV: Tensor, rows: Mapping[int, SamplingRow]) -> dict[int, int]:
        """The largest logit for greedy rows, a random draw for the others, block by block.

        Args:
            logits_SV: Not modified; may have more rows than are asked for, which are cheaper to look at than to copy.
            rows: By their index in `logits_SV`.

        Returns:
            Token ids by the same index.
        """
        if not rows:
            return {}
        token_ids_S, largest_S = top_token(logits_SV)
        self._require_finite(largest_S, rows)
        random = [index for index, row in rows.items() if not row.params.is_greedy]
        for is_truncated in (False, True):
            indices = [index for index in random if self._is_truncated(rows[index]) == is_truncated]
            for block in self._blocks(indices):
                part, index_R = [rows[index] for index in block], self._column(block, torch.int64)
                log_weights_RV = self._log_weights(logits_SV[index_R], largest_S[index_R], part)
                if is_truncated:
                    token_ids_S[index_R] = draw_truncated(log_weights_RV, self._keys(part), self._truncation(part))
                else:
                    token_ids_S[index_R] = draw(log_weights_RV, self._keys(part))
        token_ids = token_ids_S.tolist()
        return {index: token_ids[index] for index in rows}

    def _blocks(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        for start in range(0, len(indices), self._rows_per_block):
            yield indices[start : start + self._rows_per_block]

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
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _copy(self, logits_SV: Tensor, indices: Sequence[int]) -> Tensor:
        """Contiguous [R, V]."""
        return logits_SV[self._column(indices, torch.int64)]

    def _require_finite(self, largest_S: Tensor, rows: Mapping[int, SamplingRow]) -> None:
        """The largest logit of a row is NaN if any is, else +inf if any is, and -inf only if all are."""
        if torch.isfinite(largest_S).all():
            return
        values = largest_S.tolist()
        broken = [row.request_id for i, row in rows.items() if math.isnan(values[i]) or values[i] == math.inf]
        if broken:
            raise NonFiniteLogitsError(broken)
        blocked = [row.request_id for i, row in rows.items() if values[i] == -math.inf]
        if blocked:
            raise NoTokenLeftError(blocked)

    def _logprobs(
        self, logits_SV: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]
    ) -> dict[int, TokenLogprobs]:
        """Log probabilities from the model's own logits, by index of the rows that ask for them."""
        num_top = {index: k for index, row in enumerate(rows) if (k := row.params.logprobs) is not None}
        found: dict[int, TokenLogprobs] = {}
        for block in self._blocks(list(num_top)):
            chosen, wanted = [token_ids[index] for index in block], [num_top[index] for index in block]
            found.update(zip(block, token_logprobs(self._copy(logits_SV, block), chosen, wanted), strict=True))
        # A ban may hide a NaN from the draw; it still spoils every log probability of its row.
        broken = [rows[index].request_id for index, one in found.items() if math.isnan(one.logprob)]
        if broken:
            raise NonFiniteLogitsError(broken)
        return found
