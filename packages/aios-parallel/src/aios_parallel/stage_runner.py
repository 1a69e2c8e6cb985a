"""Runs a rank's part of a step: `ModelRunner` for a decoder that is only a part of the model.

The same step goes to all ranks. A stage computes its layers; the first one takes tokens, the others take the hidden
states of the stage before. The ranks of the last stage score the vocabulary, and one of them draws the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aios_kvcache.swap import reads_disk
from aios_parallel.vocabulary import gather_logits
from aios_sched.batch import pack
from aios_sched.model_runner import move_pages
from aios_sched.output import StepResult
from aios_sched.verification import draw

if TYPE_CHECKING:
    from aios_kvcache.page_mover import PageMover
    from aios_model.sampling.sampler import Sampler
    from aios_parallel.communicator import Communicator
    from aios_parallel.mesh import Place
    from aios_sched.batch import PackedBatch
    from aios_sched.model_runner import Pages, StepModel
    from aios_sched.output import SchedulerOutput


class StageRunner:
    """Runs steps on one rank.

    Args:
        model: The rank's part of the decoder.
        cache: Its pages: as many as every rank has, for its layers and heads.
        sampler: Draws the tokens; used on the sampling rank only.
        place: Where the rank stands.
        tensor_group: The ranks that share its layers.
        pipeline_group: The ranks of all stages that hand hidden states to each other, ordered by stage.
        hidden_size: D.
        dtype: Of hidden states.
        mover: Moves the rank's part of pages to its tiers below the pool and back; None where there are none.
    """

    def __init__(
        self,
        model: StepModel,
        cache: Pages,
        sampler: Sampler,
        *,
        place: Place,
        tensor_group: Communicator,
        pipeline_group: Communicator,
        hidden_size: int,
        dtype: torch.dtype,
        mover: PageMover | None = None,
    ) -> None:
        self._model = model
        self._cache = cache
        self._sampler = sampler
        self._place = place
        self._tensor_group = tensor_group
        self._pipeline_group = pipeline_group
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._mover = mover

    @property
    def vocab_size(self) -> int:
        """Width of the whole model's output."""
        return self._model.config.vocab_size

    @torch.inference_mode()
    def execute(self, output: SchedulerOutput) -> StepResult | None:
        """Computes the rank's part of a step.

        Returns:
            The tokens on the rank that draws them. On others None, or what was lost if the step reads pages from disk.

        Raises:
            SamplingError: As `ModelRunner.execute`; the group can go on.
            CollectiveTimeoutError: Another rank is gone; the group is lost.
        """
        for request_id in output.finished_request_ids:
            self._sampler.forget(request_id)
        lost_swaps = move_pages(self._mover, output)
        result = self._compute(output)
        if result is not None:
            result.lost_swaps = lost_swaps
        elif reads_disk(output.swaps):
            return StepResult(sampled={}, lost_swaps=lost_swaps)
        return result

    def close(self) -> None:
        """Gives back what the tiers below the pool hold."""
        if self._mover is not None:
            self._mover.close()

    def _compute(self, output: SchedulerOutput) -> StepResult | None:
        self._cache.copy_blocks(output.block_copies)
        batch = pack(output, device=self._model.device)
        self._cache.bind(batch.sequences)
        x = batch.tokens_T if self._place.is_first_stage else self._receive(len(batch.tokens_T))
        hidden_TD = self._model(x, batch.positions_T, self._cache)
        if not self._place.is_last_stage:
            self._pipeline_group.send(hidden_TD.contiguous(), to=self._place.stage + 1)
            return None
        return self._sample(hidden_TD, batch, output)

    def _receive(self, num_tokens: int) -> torch.Tensor:
        hidden_TD = torch.empty(num_tokens, self._hidden_size, dtype=self._dtype, device=self._model.device)
        return self._pipeline_group.receive(hidden_TD, source=self._place.stage - 1)

    def _sample(self, hidden_TD: torch.Tensor, batch: PackedBatch, output: SchedulerOutput) -> StepResult | None:
        if not batch.sampling:
            return StepResult(sampled={}) if self._place.samples else None
        hidden_SD = hidden_TD if len(batch.sampling) == len(hidden_TD) else hidden_TD[batch.sample_rows_S]
        logits_SV = gather_logits(self._model.logits(hidden_SD), self._tensor_group, vocab_size=self.vocab_size)
        if logits_SV is None:
            return None
        return draw(self._sampler, logits_SV, batch, output)
