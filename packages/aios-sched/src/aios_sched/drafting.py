"""Drafts for the next step: who may have some, how many, and what became of them.

Between steps the engine asks here. A request gets drafts when it waits for nothing but its next token: as many as the
controller thinks worth their time, and never more than it could still use.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING

from aios_sched.errors import ProposerError
from aios_sched.planner import sampling_row
from aios_sched.speculative.base import DraftContext

if TYPE_CHECKING:
    from aios_sched.output import SchedulerOutput, StepResult
    from aios_sched.request import Request
    from aios_sched.scheduler import Scheduler
    from aios_sched.speculative.base import DraftController, Proposer

_log = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures of a proposer, one after the other, until it is not asked any more."""


@dataclass(slots=True, kw_only=True)
class DraftStats:
    """What drafts came to, from the engine's start.

    Attributes:
        num_drafts: Rows that had drafts.
        num_draft_tokens: Tokens that were drafted for them and checked.
        num_accepted_tokens: Those that were right.
        seconds: Time that proposers took.
    """

    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    seconds: float = 0.0


class Drafting:
    """Asks a proposer for drafts and tells the controller how they did.

    Whatever a proposer does, the output stays what it would be without: what is no token is dropped, and one that fails
    costs its drafts only.

    Args:
        proposer: Guesses.
        controller: Says how many guesses are wanted.
        vocab_size: Width of the model's output.

    Attributes:
        stats: What came of it so far.
    """

    def __init__(self, proposer: Proposer, controller: DraftController, *, vocab_size: int) -> None:
        self.stats = DraftStats()
        self._proposer = proposer
        self._controller = controller
        self._vocab_size = vocab_size
        self._num_failures = 0
        self._proposed: dict[str, Request] = {}  # whom the proposer may remember
        self._controlled: dict[str, Request] = {}  # whom the controller may remember

    def draft(self, scheduler: Scheduler) -> float:
        """Puts drafts on the requests that may have some in the next step; returns the seconds that it took."""
        started = perf_counter()
        self.forget_those_who_left(scheduler)
        if self._num_failures >= MAX_FAILURES:
            for request in scheduler.running:
                request.awaits_drafts = False
            return 0.0
        requests, contexts = self._contexts(scheduler)
        if not contexts:
            return 0.0
        for request, drafts in zip(requests, self._propose(contexts), strict=True):
            scheduler.put_drafts(request, drafts)
        seconds = perf_counter() - started
        self.stats.seconds += seconds
        return seconds

    def note(self, output: SchedulerOutput, result: StepResult, *, seconds: float, proposer_seconds: float) -> None:
        """A step returned; its drafts took `proposer_seconds` beforehand."""
        num_step_drafts = 0
        for row in output.requests:
            if not row.num_drafts or result.lost_swaps:  # what stands on lost pages says nothing
                continue
            num_accepted = len(result.further.get(row.request_id, ()))
            num_step_drafts += row.num_drafts
            self.stats.num_drafts += 1
            self.stats.num_draft_tokens += row.num_drafts
            self.stats.num_accepted_tokens += num_accepted
            self._controller.note(row.request_id, num_drafted=row.num_drafts, num_accepted=num_accepted)
        self._controller.note_step(
            num_requests=len(output.requests),
            num_tokens=output.num_scheduled_tokens,
            num_drafts=num_step_drafts,
            seconds=seconds,
            proposer_seconds=proposer_seconds,
        )

    def forget_those_who_left(self, scheduler: Scheduler) -> None:
        """Lets the proposer forget requests that ended or lost their pages, and the controller those that ended."""
        if not self._controlled:
            return
        running = {request.request_id: request for request in scheduler.running}
        for request_id, request in list(self._proposed.items()):
            if running.get(request_id) is not request:
                del self._proposed[request_id]
                self._proposer.forget(request_id)
        for request_id, request in list(self._controlled.items()):
            if running.get(request_id) is not request and not scheduler.is_open(request):
                del self._controlled[request_id]
                self._controller.forget(request_id)

    def close(self) -> None:
        """Lets go of what the proposer holds."""
        self._proposer.close()

    def _contexts(self, scheduler: Scheduler) -> tuple[list[Request], list[DraftContext]]:
        requests: list[Request] = []
        contexts: list[DraftContext] = []
        budget = scheduler.num_spare_tokens
        for request in scheduler.running:
            self._controlled[request.request_id] = request
            wanted = self._controller.num_drafts(request.request_id, num_requests=scheduler.num_running)
            request.awaits_drafts = wanted > 0
            if not _awaits_its_next_token(request):
                continue
            max_drafts = min(wanted, budget, _num_useful(request, max_model_len=scheduler.config.max_model_len))
            if max_drafts < 1:
                continue
            self._proposed[request.request_id] = request
            budget -= max_drafts
            requests.append(request)
            contexts.append(
                DraftContext(
                    request_id=request.request_id,
                    token_ids=request.token_ids,
                    num_prompt_tokens=len(request.prompt_token_ids),
                    max_drafts=max_drafts,
                    sampling=sampling_row(request),
                    salt=request.cache_salt,
                )
            )
        return requests, contexts

    def _propose(self, contexts: list[DraftContext]) -> list[list[int]]:
        try:
            proposals = self._proposer.propose(contexts)
            if len(proposals) != len(contexts):
                raise ProposerError(f"the proposer answered {len(proposals)} of {len(contexts)} requests")
        except Exception:
            self._num_failures += 1
            is_last = self._num_failures >= MAX_FAILURES
            _log.exception("Drafting failed; %s", "from now on without" if is_last else "this step goes without")
            return [[] for _ in contexts]
        self._num_failures = 0
        return [
            self._known_tokens(drafts[: context.max_drafts])
            for context, drafts in zip(contexts, proposals, strict=True)
        ]

    def _known_tokens(self, drafts: list[int]) -> list[int]:
        """The drafts before the first that is no token of the model, which the embedding has no row for."""
        for place, token in enumerate(drafts):
            if not 0 <= token < self._vocab_size:
                return drafts[:place]
        return drafts


def _awaits_its_next_token(request: Request) -> bool:
    """Whether only one of its tokens is not computed, and nothing is on its way or prepared."""
    return (
        len(request.token_ids) - request.num_computed_tokens == 1
        and not request.num_in_flight_tokens
        and not request.has_lost_pages
        and not request.draft_token_ids
    )


def _num_useful(request: Request, *, max_model_len: int) -> int:
    """Drafts that may be right without going beyond what the request may generate: one token comes in any case."""
    assert request.max_tokens is not None, "the scheduler resolves it"
    room = min(request.max_tokens - len(request.output_token_ids), max_model_len - len(request.token_ids))
    return room - 1
