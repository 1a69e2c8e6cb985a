"""The sampler: one row of logits per request in, one token per request out.

In the order of vLLM's sampler:

1. Log probabilities are taken from the logits as the model gave them (`logprobs.py`).
2. Allowed ids, bad words, min_tokens, logit_bias, logits processors, penalties (`processors.py`).
3. Greedy rows take the largest logit, and of equal ones the lowest token id.
4. The others: temperature, min-p, top-k, top-p (`truncation.py`), and a draw keyed by (seed, position) (`noise.py`).

The last two are up to a `Drawer` (`drawer.py`): torch operations, or C++. Each row gets, bit for bit, what it would get
alone: every operation works row by row.

Shapes: S rows of the batch, R rows of a part of it, V vocabulary.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from aios_model.errors import ConfigError
from aios_model.sampling.errors import NonFiniteLogitsError
from aios_model.sampling.logprobs import token_logprobs
from aios_model.sampling.processors import LogitsAdjuster, LogitsProcessor
from aios_model.sampling.rows import SampledToken, SamplingRow, TokenLogprobs
from aios_model.sampling.torch_draw import TorchDrawer, rows_per_block

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from aios_model.native.threads import ThreadPool
    from aios_model.sampling.drawer import Drawer

__all__ = ["LogitsProcessor", "SampledToken", "Sampler", "SamplingRow", "TokenLogprobs"]


class Sampler:
    """Draws the next token of every row.

    Args:
        vocab_size: Width of the logits.
        device: Where the logits are.
        logits_processors: Run in this order on the rows that they apply to.
        pool: Threads of native kernels to draw with, for logits on the CPU; None draws with torch. Float64 logits are
            drawn from with torch in any case.

    Raises:
        ConfigError: A pool for logits that are not on the CPU.
        NativeBuildError: A pool, and no native kernels here.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        device: torch.device | str,
        logits_processors: Sequence[LogitsProcessor] = (),
        pool: ThreadPool | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._adjuster = LogitsAdjuster(vocab_size=vocab_size, processors=logits_processors)
        self._torch_drawer = TorchDrawer(vocab_size=vocab_size, device=self._device)
        self._drawer: Drawer = self._torch_drawer
        if pool is not None:
            self._drawer = _native_drawer(vocab_size, self._device, pool)

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
        """Draws for the rows whose logits stay as they are, and from an altered copy for the others.

        Most tokens that a model draws under a constraint are those it would have drawn anyway. They are drawn first and
        asked about after, which spares them a mask, and a copy of the logits to apply it to.
        """
        drawer = self._drawer_of(logits_SV)
        adjusted = [index for index, row in enumerate(rows) if self._adjuster.applies_to(row)]
        if not adjusted:
            return drawer.draw(logits_SV, range(len(rows)), rows)
        tried = [index for index in adjusted if self._adjuster.is_only_masked(rows[index])]
        untouched = sorted(set(range(len(rows))).difference(adjusted).union(tried))
        drawn = drawer.draw(logits_SV, untouched, [rows[index] for index in untouched])
        chosen = dict(zip(untouched, drawn, strict=True))
        accepted = {index for index in tried if self._adjuster.accepts(rows[index], chosen[index])}
        adjusted = [index for index in adjusted if index not in accepted]
        for block in self._blocks(adjusted):
            part = [rows[index] for index in block]
            drawn = drawer.draw(self._adjusted(logits_SV, block, part), range(len(part)), part)
            chosen.update(zip(block, drawn, strict=True))
        return [chosen[index] for index in range(len(rows))]

    def _drawer_of(self, logits_SV: Tensor) -> Drawer:
        return self._torch_drawer if logits_SV.dtype == torch.float64 else self._drawer

    @torch.inference_mode()
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

    def _blocks(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        step = rows_per_block(self._vocab_size, self._device)
        for start in range(0, len(indices), step):
            yield indices[start : start + step]

    def _column(self, values: Sequence[float], dtype: torch.dtype) -> Tensor:
        return torch.tensor(values, dtype=dtype, device=self._device)

    def _copy(self, logits_SV: Tensor, indices: Sequence[int]) -> Tensor:
        """Contiguous [R, V]."""
        return logits_SV[self._column(indices, torch.int64)]

    def _logprobs(
        self, logits_SV: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int]
    ) -> dict[int, TokenLogprobs]:
        """Log probabilities from the model's own logits, by index of the rows that ask for them."""
        num_top = {index: k for index, row in enumerate(rows) if (k := row.params.logprobs) is not None}
        return self._logprobs_of(logits_SV, rows, token_ids, num_top) if num_top else {}

    @torch.inference_mode()
    def _logprobs_of(
        self, logits_SV: Tensor, rows: Sequence[SamplingRow], token_ids: Sequence[int], num_top: Mapping[int, int]
    ) -> dict[int, TokenLogprobs]:
        found: dict[int, TokenLogprobs] = {}
        for block in self._blocks(list(num_top)):
            chosen, wanted = [token_ids[index] for index in block], [num_top[index] for index in block]
            found.update(zip(block, token_logprobs(self._copy(logits_SV, block), chosen, wanted), strict=True))
        # A ban may hide a NaN from the draw; it still spoils every log probability of its row.
        broken = [rows[index].request_id for index, one in found.items() if math.isnan(one.logprob)]
        if broken:
            raise NonFiniteLogitsError(broken)
        return found


def _native_drawer(vocab_size: int, device: torch.device, pool: ThreadPool) -> Drawer:
    if device.type != "cpu":
        raise ConfigError(f"native kernels draw on the CPU, and the logits are on {device}: leave out the pool")
    from aios_model.sampling.native_draw import NativeDrawer  # compiles the kernels

    return NativeDrawer(vocab_size=vocab_size, pool=pool)
