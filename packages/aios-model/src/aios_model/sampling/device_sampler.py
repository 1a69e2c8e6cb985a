"""The sampler for a device that computes on its own: it says what is to be drawn, and goes on before it is.

The tokens are those of `Sampler`. What that one decides by looking at numbers is decided on the device here, or once
the tokens have arrived: a row left with nothing by its bans is computed both ways, top-k and top-p sort the whole row,
and logits that are not finite are noticed with the result.

Shapes: S rows of the batch, R rows of a part of it, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from aios_model.sampling.drawer import require_finite
from aios_model.sampling.errors import NonFiniteLogitsError
from aios_model.sampling.logprobs import LogprobTensors
from aios_model.sampling.processors import LogitsAdjuster, LogitsProcessor
from aios_model.sampling.rows import SampledToken, SamplingRow, TokenLogprobs
from aios_model.sampling.torch_draw import TorchDrawer, rows_per_block
from aios_model.transfers import Download, Downloader, downloader, upload

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from torch import Tensor

__all__ = ["DeviceSampler", "LaunchedSample"]


class DeviceSampler:
    """Draws the next token of every row, without waiting for the device.

    Args:
        vocab_size: Width of the logits.
        device: Where the logits are.
        logits_processors: Run in this order on the rows that they apply to. They must not read logits on the host.
        downloads: Brings tokens to the host; None takes what suits the device.
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        device: torch.device | str,
        logits_processors: Sequence[LogitsProcessor] = (),
        downloads: Downloader | None = None,
    ) -> None:
        self._vocab_size = vocab_size
        self._device = torch.device(device)
        self._adjuster = LogitsAdjuster(vocab_size=vocab_size, processors=logits_processors)
        self._drawer = TorchDrawer(vocab_size=vocab_size, device=self._device)
        self._downloads = downloads or downloader(self._device)

    def sample(self, logits_SV: Tensor, rows: Sequence[SamplingRow]) -> list[SampledToken]:
        """Draws one token per row and waits for it; see `Sampler.sample`."""
        return self.launch(logits_SV, rows).result()

    @torch.inference_mode()
    def launch(self, logits_SV: Tensor, rows: Sequence[SamplingRow]) -> LaunchedSample:
        """Draws one token per row, and returns at once.

        Args:
            logits_SV: [S, V], float32 or float64; other types are converted to float32. Not modified.
            rows: What to draw for each of the S rows.
        """
        assert logits_SV.shape == (len(rows), self._vocab_size), (logits_SV.shape, len(rows), self._vocab_size)
        if logits_SV.dtype not in (torch.float32, torch.float64):
            logits_SV = logits_SV.float()
        token_ids_S, largest_S = self._drawer.launch(self._adjusted(logits_SV, rows), rows)
        logprobs = list(self._logprobs(logits_SV, token_ids_S, rows))
        tensors = [token_ids_S, largest_S]
        for block in logprobs:
            found = block.tensors
            tensors += [found.chosen_R, found.ranks_R, found.top_ids_RK, found.top_logprobs_RK]
        return LaunchedSample(token_ids_S, list(rows), logprobs, self._downloads.start(tensors))

    def forget(self, request_id: str) -> None:
        """Drops what is remembered of a finished request; unknown ids are ignored."""
        self._adjuster.forget(request_id)

    @property
    def num_remembered_requests(self) -> int:
        """Requests of which token counts or index arrays are kept."""
        return self._adjuster.num_remembered

    def _adjusted(self, logits_SV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """The logits with bans, biases and penalties applied; a copy, if there are any."""
        indices = [index for index, row in enumerate(rows) if self._adjuster.applies_to(row)]
        if not indices:
            return logits_SV
        adjusted_SV = logits_SV.clone()
        for block in self._blocks(indices):
            index_R = self._column(block)
            adjusted_SV.index_copy_(0, index_R, self._adjust(logits_SV[index_R], [rows[index] for index in block]))
        return adjusted_SV

    def _adjust(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        """[R, V]. Where the bans leave nothing they are set aside, as in `Sampler`; the device finds out where."""
        adjusted_RV = logits_RV.clone()
        self._adjuster.adjust(adjusted_RV, rows)
        banning = [place for place, row in enumerate(rows) if self._adjuster.may_ban(row)]
        if banning:
            index_P = self._column(banning)
            free_PV, banned_PV = logits_RV[index_P], adjusted_RV[index_P]
            self._adjuster.adjust(free_PV, [rows[place] for place in banning], with_bans=False)
            blocked_P1 = banned_PV.amax(dim=-1, keepdim=True) == -torch.inf
            adjusted_RV.index_copy_(0, index_P, torch.where(blocked_P1, free_PV, banned_PV))
        return adjusted_RV

    def _logprobs(
        self, logits_SV: Tensor, token_ids_S: Tensor, rows: Sequence[SamplingRow]
    ) -> Iterator[_LaunchedLogprobs]:
        """Log probabilities from the model's own logits, for the rows that ask for them."""
        num_top = {index: k for index, row in enumerate(rows) if (k := row.params.logprobs) is not None}
        for block in self._blocks(list(num_top)):
            index_R, wanted = self._column(block), [num_top[index] for index in block]
            most = min(max(wanted), self._vocab_size)
            tensors = LogprobTensors.of(logits_SV[index_R], token_ids_S[index_R], num_top=most)
            yield _LaunchedLogprobs(indices=block, num_top=wanted, tensors=tensors)

    def _blocks(self, indices: Sequence[int]) -> Iterator[Sequence[int]]:
        step = rows_per_block(self._vocab_size, self._device)
        for start in range(0, len(indices), step):
            yield indices[start : start + step]

    def _column(self, values: Sequence[int]) -> Tensor:
        return upload(values, dtype=torch.int64, device=self._device)


class LaunchedSample:
    """Tokens that are being drawn.

    Attributes:
        token_ids_S: They, on the device, int64; whatever the device is given next may use them.
    """

    def __init__(
        self, token_ids_S: Tensor, rows: list[SamplingRow], logprobs: list[_LaunchedLogprobs], download: Download
    ) -> None:
        self.token_ids_S = token_ids_S
        self._rows = rows
        self._logprobs = logprobs
        self._download = download

    def result(self) -> list[SampledToken]:
        """Waits for them.

        Raises:
            NonFiniteLogitsError: Some rows hold NaN or +inf; names their requests.
            NoTokenLeftError: Allowed ids and processors leave no token for some rows; names their requests.
        """
        token_ids_S, largest_S, *parts = self._download.wait()
        require_finite(largest_S.tolist(), self._rows)
        token_ids = token_ids_S.tolist()
        found: dict[int, TokenLogprobs] = {}
        for number, block in enumerate(self._logprobs):
            found |= block.read(parts[4 * number : 4 * number + 4], token_ids)
        broken = [self._rows[index].request_id for index, one in found.items() if math.isnan(one.logprob)]
        if broken:
            raise NonFiniteLogitsError(broken)
        return [SampledToken(token_id=token_id, logprobs=found.get(i)) for i, token_id in enumerate(token_ids)]


@dataclass(frozen=True, slots=True, kw_only=True)
class _LaunchedLogprobs:
    """Log probabilities of some rows: which, how many of the likeliest each asks for, and the tensors."""

    indices: Sequence[int]
    num_top: list[int]
    tensors: LogprobTensors

    def read(self, arrived: Sequence[Tensor], token_ids: Sequence[int]) -> dict[int, TokenLogprobs]:
        chosen, ranks, top_ids, top_logprobs = (tensor.tolist() for tensor in arrived)
        return {
            index: TokenLogprobs(
                token_id=token_ids[index],
                logprob=chosen[place],
                rank=ranks[place],
                top=tuple(zip(top_ids[place][:k], top_logprobs[place][:k], strict=True)),
            )
            for place, (index, k) in enumerate(zip(self.indices, self.num_top, strict=True))
        }
