"""Steps on the wire: what a rank knows already is not sent again.

A running request sends one token, and now and then one page; without this, each step would carry the whole page table
and history of every request. Both ends keep the same books, and the driver's decide what the rank may keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from aios_kvcache.block import BlockCopy
from aios_kvcache.swap import Swap
from aios_model.sampling.params import SamplingParams
from aios_model.sampling.rows import SampledToken, SamplingRow
from aios_parallel.control.messages import NewRequest, Sampled, Step, StepDone, StepRow
from aios_sched.output import ScheduledRequest, SchedulerOutput, StepResult


@dataclass(slots=True)
class _Sent:
    """What the ranks know of a request."""

    blocks: list[int] = field(default_factory=list)
    num_outputs: int = 0
    is_introduced: bool = False


class StepEncoder:
    """The driver's end."""

    def __init__(self) -> None:
        self._sent: dict[str, _Sent] = {}

    def encode(self, output: SchedulerOutput) -> Step:
        """The message for a step; steps must be sent in the order in which they are encoded."""
        for request_id in output.finished_request_ids:
            self._sent.pop(request_id, None)
        new: list[NewRequest] = []
        return Step(
            step_id=output.step_id,
            finished=list(output.finished_request_ids),
            rows=[self._row(request, new) for request in output.requests],
            new=new,
            block_copies=[(copy.source, copy.destination) for copy in output.block_copies],
            first_swap=output.first_swap,
            swaps=[(swap.kind, swap.source, swap.target) for swap in output.swaps],
        )

    def _row(self, request: ScheduledRequest, new: list[NewRequest]) -> StepRow:
        sent = self._sent.setdefault(request.request_id, _Sent())
        kept, table = len(sent.blocks), request.block_table
        if table[:kept] != sent.blocks:  # a page was replaced by a copy, or the request was preempted
            kept = _common(table, sent.blocks)
        new_blocks = table[kept:]
        sent.blocks[kept:] = new_blocks
        if request.sampling is None:
            return StepRow(request.request_id, request.token_ids, request.start, kept, new_blocks)
        row = request.sampling
        if not sent.is_introduced:
            sent.is_introduced = True
            new.append(_introduce(row))
        known, sent.num_outputs = sent.num_outputs, len(row.output_token_ids)
        return StepRow(
            request.request_id,
            request.token_ids,
            request.start,
            kept,
            new_blocks,
            row.position,
            known,
            list(row.output_token_ids[known:]),
            request.num_drafts,
        )


class _Known(NamedTuple):
    """What a rank knows of a request's sampling."""

    request: NewRequest
    params: SamplingParams


class StepDecoder:
    """A rank's end."""

    def __init__(self) -> None:
        self._requests: dict[str, _Known] = {}
        self._blocks: dict[str, list[int]] = {}
        self._outputs: dict[str, list[int]] = {}

    def decode(self, step: Step) -> SchedulerOutput:
        """The step as a runner takes it."""
        for request_id in step.finished:
            for book in (self._requests, self._blocks, self._outputs):
                book.pop(request_id, None)
        for request in step.new:
            self._requests[request.request_id] = _Known(request, SamplingParams(**request.params))
        rows = tuple(self._row(row) for row in step.rows)
        return SchedulerOutput(
            step_id=step.step_id,
            requests=rows,
            block_copies=tuple(BlockCopy(source=source, destination=target) for source, target in step.block_copies),
            num_scheduled_tokens=sum(len(row.token_ids) for row in rows),
            finished_request_ids=tuple(step.finished),
            first_swap=step.first_swap,
            swaps=tuple(Swap(kind, source, target) for kind, source, target in step.swaps),
        )

    def _row(self, row: StepRow) -> ScheduledRequest:
        blocks = self._blocks.setdefault(row.request_id, [])
        blocks[row.kept_blocks :] = row.new_blocks
        return ScheduledRequest(
            request_id=row.request_id,
            token_ids=row.token_ids,
            start=row.start,
            block_table=blocks,
            sampling=None if row.position is None else self._sampling(row, row.position),
            num_drafts=row.num_drafts,
        )

    def _sampling(self, row: StepRow, position: int) -> SamplingRow:
        request, params = self._requests[row.request_id]
        outputs = self._outputs.setdefault(row.request_id, [])
        outputs[row.kept_outputs :] = row.new_outputs
        return SamplingRow(
            request_id=row.request_id,
            params=params,
            seed=request.seed,
            position=position,
            prompt_token_ids=request.prompt_token_ids,
            output_token_ids=outputs,
            stop_token_ids=tuple(request.stop_token_ids),
        )


def encode_result(step_id: int, result: StepResult) -> StepDone:
    """The message for the tokens of a step."""
    sampled = [
        Sampled(key, token.token_id, token.logprobs)
        for key, first in result.sampled.items()
        for token in (first, *result.further.get(key, ()))
    ]
    return StepDone(step_id, sampled, list(result.lost_swaps))


def decode_results(parts: Sequence[StepDone]) -> StepResult:
    """The tokens of a step, and what any of the ranks has lost."""
    result = StepResult(sampled={}, lost_swaps=tuple(sorted({number for part in parts for number in part.lost_swaps})))
    for part in parts:
        for each in part.sampled:
            token = SampledToken(token_id=each.token_id, logprobs=each.logprobs)
            if each.request_id in result.sampled:
                result.further.setdefault(each.request_id, []).append(token)
            else:
                result.sampled[each.request_id] = token
    return result


def _introduce(row: SamplingRow) -> NewRequest:
    return NewRequest(row.request_id, list(row.prompt_token_ids), row.params, row.seed, list(row.stop_token_ids))


def _common(left: list[int], right: list[int]) -> int:
    """Length of the longest common beginning."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))
