"""How a step runs: pages, decoder, logits, tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import torch

from aios_sched.batch import pack
from aios_sched.output import StepResult
from aios_sched.verification import draw

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
    """

    def __init__(self, decoder: StepModel, cache: Pages, sampler: Sampler, *, mover: PageMover | None = None) -> None:
        self._decoder = decoder
        self._cache = cache
        self._sampler = sampler
        self._mover = mover

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
        """
        for request_id in output.finished_request_ids:
            self._sampler.forget(request_id)
        lost_swaps = move_pages(self._mover, output)
        self._cache.copy_blocks(output.block_copies)
        batch = pack(output, device=self._decoder.device)
        self._cache.bind(batch.sequences)
        hidden_TD = self._decoder(batch.tokens_T, batch.positions_T, self._cache)
        if not batch.sampling:
            return StepResult(sampled={}, lost_swaps=lost_swaps)
        # Where every token samples, as in a step of decodes, the rows are the hidden states as they are.
        hidden_SD = hidden_TD if len(batch.sampling) == len(hidden_TD) else hidden_TD[batch.sample_rows_S]
        logits_SV = self._decoder.logits(hidden_SD)
        result = draw(self._sampler, logits_SV, batch, output)
        result.lost_swaps = lost_swaps
        return result

    def close(self) -> None:
        """Gives back what the tiers below the pool hold."""
        if self._mover is not None:
            self._mover.close()


def move_pages(mover: PageMover | None, output: SchedulerOutput) -> tuple[int, ...]:
    """Makes a step's moves; returns the numbers of those that could not read their page."""
    if mover is not None:
        return mover.run(output.first_swap, output.swaps)
    assert not output.swaps, "the scheduler plans for tiers that the runner was built without"
    return ()
