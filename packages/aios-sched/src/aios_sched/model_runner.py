"""How a step runs: pages, decoder, logits, tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from aios_model.sampling.device_sampler import DeviceSampler, LaunchedSample
from aios_model.transfers import Download, Downloader, downloader
from aios_sched.batch import PackedBatch, pack
from aios_sched.errors import PendingTokenError
from aios_sched.newest_tokens import NewestTokens
from aios_sched.output import StepResult
from aios_sched.verification import accept, draw

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_kvcache.block import BlockCopy
    from aios_kvcache.page_mover import PageMover
    from aios_kvcache.paged_cache import SequenceSlice
    from aios_model.config import ModelConfig
    from aios_model.sampling.sampler import Sampler
    from aios_sched.output import SchedulerOutput


class StepModel(Protocol):
    """What computes a step: a `DecoderModel`, or whatever stands in for one."""

    @property
    def config(self) -> ModelConfig:
        """What the model looks like."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def __call__(self, tokens_T: torch.Tensor, positions_T: torch.Tensor, cache: Any, /) -> torch.Tensor:
        """Hidden states [T, D] of the batch that `cache` is bound to."""
        ...

    def logits(self, hidden_SD: torch.Tensor) -> torch.Tensor:
        """[S, V]."""
        ...


class Pages(Protocol):
    """Where a step's keys and values are: `PagedKVCache`, or the native one."""

    def bind(self, batch: Sequence[SequenceSlice]) -> None:
        """Prepares for a step whose tokens are those of `batch`."""
        ...

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copies whole pages in every layer, as if one after the other."""
        ...


class ModelRunner:
    """Runs steps of the scheduler on one device.

    Args:
        decoder: The model.
        cache: The pages, as many as the scheduler's block manager hands out, and of the same size.
        sampler: Draws the tokens.
        mover: Moves pages to the tiers below the pool and back; None where the scheduler knows of none.
        downloads: Tells when a launched step that samples nothing is done; None takes what suits the device.
    """

    def __init__(
        self,
        decoder: StepModel,
        cache: Pages,
        sampler: Sampler | DeviceSampler,
        *,
        mover: PageMover | None = None,
        downloads: Downloader | None = None,
    ) -> None:
        self._decoder = decoder
        self._cache = cache
        self._sampler = sampler
        self._mover = mover
        self._downloads = downloads or downloader(decoder.device)
        self._newest = NewestTokens()

    @property
    def vocab_size(self) -> int:
        """Width of the model's output."""
        return self._decoder.config.vocab_size

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepResult:
        """Computes the step's tokens, all layers once, and draws the next token of each request that samples.

        Drafts among them are checked: behind those that are right, a token is drawn, too.

        Logits are computed for those S rows only: the head is a fifth of the bundled model's weights, and the other
        tokens of a prompt have no use for it.

        Raises:
            SamplingError: some rows have no token to draw (their logits are not finite, or all are excluded).
            PendingTokenError: a row waits for the token of a step on its way; `launch` knows those.
        """
        lost_swaps, batch = self._prepare(output)
        if batch.pending:
            raise PendingTokenError("this step was planned ahead, and a runner can only launch such steps")
        logits_SV = self._logits(batch)
        if logits_SV is None:
            return StepResult(sampled={}, lost_swaps=lost_swaps)
        result = draw(self._sampler, logits_SV, batch, output)
        result.lost_swaps = lost_swaps
        return result

    @torch.inference_mode()
    def launch(self, output: SchedulerOutput) -> LaunchedStep:
        """Gives a step to the device and returns at once; what the step before samples may be pending in this one.

        Needs a `DeviceSampler`. It may wait for pages on their way between the tiers below the pool.
        """
        assert isinstance(self._sampler, DeviceSampler), "a Sampler waits for its tokens"
        lost_swaps, batch = self._prepare(output)
        self._newest.put(batch.tokens_T, batch.pending)
        logits_SV = self._logits(batch)
        request_ids = [row.request_id for row in batch.sampling]
        if logits_SV is None:
            return LaunchedStep(output, request_ids, self._downloads.start(()), lost_swaps)
        sample = self._sampler.launch(logits_SV, batch.sampling)
        self._newest.keep(request_ids, sample.token_ids_S)
        return LaunchedStep(output, request_ids, sample, lost_swaps)

    def _prepare(self, output: SchedulerOutput) -> tuple[tuple[int, ...], PackedBatch]:
        """Pages where they should be, and the step as tensors; -> moves that could not read their page, the batch."""
        for request_id in output.finished_request_ids:
            self._sampler.forget(request_id)
            self._newest.forget(request_id)
        lost_swaps = move_pages(self._mover, output)
        self._cache.copy_blocks(output.block_copies)
        batch = pack(output, device=self._decoder.device)
        self._cache.bind(batch.sequences)
        return lost_swaps, batch

    def _logits(self, batch: PackedBatch) -> torch.Tensor | None:
        """[S, V] of the rows that sample; None if none does."""
        hidden_TD = self._decoder(batch.tokens_T, batch.positions_T, self._cache)
        if not batch.sampling:
            return None
        # Where every token samples, as in a step of decodes, the rows are the hidden states as they are.
        hidden_SD = hidden_TD if len(batch.sampling) == len(hidden_TD) else hidden_TD[batch.sample_rows_S]
        return self._decoder.logits(hidden_SD)

    def close(self) -> None:
        """Gives back what the tiers below the pool hold."""
        if self._mover is not None:
            self._mover.close()


class LaunchedStep:
    """A step that the device was given.

    Args:
        output: The step.
        request_ids: Whose tokens it samples, row by row.
        work: The tokens; where it samples none, whatever says that it is done.
        lost_swaps: Numbers of its moves that could not read their page.
    """

    def __init__(
        self,
        output: SchedulerOutput,
        request_ids: list[str],
        work: LaunchedSample | Download,
        lost_swaps: tuple[int, ...],
    ) -> None:
        self._output = output
        self._request_ids = request_ids
        self._work = work
        self._lost_swaps = lost_swaps

    def result(self) -> StepResult:
        """Waits for the step.

        Raises:
            SamplingError: some rows have no token to draw (their logits are not finite, or all are excluded). If that
                is so behind a wrong draft only, the request goes on when it runs again, without drafts.
        """
        if not isinstance(self._work, LaunchedSample):
            self._work.wait()
            return StepResult(sampled={}, lost_swaps=self._lost_swaps)
        tokens = self._work.result()
        if len(tokens) > len(self._output.requests) or any(row.num_drafts for row in self._output.requests):
            result = accept(self._output, tokens)
            result.lost_swaps = self._lost_swaps
            return result
        return StepResult(sampled=dict(zip(self._request_ids, tokens, strict=True)), lost_swaps=self._lost_swaps)


def move_pages(mover: PageMover | None, output: SchedulerOutput) -> tuple[int, ...]:
    """Makes a step's moves; returns the numbers of those that could not read their page."""
    if mover is not None:
        return mover.run(output.first_swap, output.swaps)
    assert not output.swaps, "the scheduler plans for tiers that the runner was built without"
    return ()
