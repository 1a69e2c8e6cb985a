"""Requests come and go, steps are planned and applied: the books of the engine.

`planner.py` decides which tokens run; this file keeps track of who is there and of what is on its way. It holds two
promises, which property-based tests put to the proof:

- *Several steps may be in flight.* Tokens in flight are not scheduled again; a request whose next token is unknown
  waits; the pages of a request in flight stay where they are, even if it is aborted, until its last step has returned.
- *A step can be undone.* `rollback` restores the counters, and the step's tokens are scheduled again.

A request may be one token ahead of what is known of it (`ahead.py`). If that token turns out to have been its last, the
row behind it is that of a finished request, as of one aborted in flight: ignored, and no page of it is published.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aios_model.errors import InvalidRequestError
from aios_sched.config import SchedulerConfig
from aios_sched.deadlines import Deadlines
from aios_sched.errors import QueueFullError, StepResultError, describe
from aios_sched.output import SchedulerOutput, TokenOutput
from aios_sched.planner import StepPlan, StepPlanner
from aios_sched.request import RequestStatus
from aios_sched.stats import RequestTiming
from aios_sched.stop import check_stop
from aios_sched.validation import check_deadline, check_pool, resolve_max_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aios_kvcache.block_manager import BlockManager
    from aios_model.sampling.rows import SampledToken
    from aios_sched.output import ScheduledRequest, StepResult
    from aios_sched.policy.base import WaitingQueue
    from aios_sched.request import FinishReason, Request

__all__ = ["Scheduler", "SchedulerConfig"]

MIN_PREFILL_TOKENS = 32
"""Below this a step says more about its fixed costs than about its tokens."""


class Scheduler:
    """Plans steps over the requests it is given, and applies what comes of them.

    Args:
        config: Limits.
        block_manager: The pages.
        waiting: The policy: who is admitted next, and who gives way.
        clock: Tells the time in seconds; a simulator brings its own.

    Attributes:
        num_prompt_tokens: Prompt tokens of all requests that reached their first token.
        num_generation_tokens: Tokens sampled for all requests.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        block_manager: BlockManager,
        waiting: WaitingQueue,
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.block_manager = block_manager
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self._clock = clock
        self._waiting = waiting
        self._planner = StepPlanner(config, block_manager, waiting, clock=clock)
        self._requests: dict[str, Request] = {}  # all that are not done with, those aborted in flight included
        self._deadlines = Deadlines()
        self._forgettable_ids: list[str] = []  # for the next step: whom runners may forget
        self._has_losses = False  # whether any running request has lost pages
        self._num_added = 0
        self._num_steps = 0

    @property
    def has_unfinished(self) -> bool:
        """Whether any request waits, runs, or has a step on its way."""
        return bool(self._requests)

    @property
    def num_running(self) -> int:
        """Requests with a seat and pages."""
        return len(self._planner.running)

    @property
    def num_waiting(self) -> int:
        """Requests without, the preempted ones included."""
        return len(self._waiting)

    @property
    def num_preemptions(self) -> int:
        """Times a running request lost its pages."""
        return self._planner.num_preemptions

    # -- requests come and go ------------------------------------------------------------------------------------------

    def add(self, request: Request) -> None:
        """Puts a new request into the queue.

        Raises:
            InvalidRequestError: it could never finish: prompt or output are too long for the context or the pool, its
                deadline has passed, its id is taken, or the policy does not know its priority or tenant.
            QueueFullError: too many wait already.
        """
        pages = self.block_manager
        if request.request_id in self._requests:
            raise InvalidRequestError(f"request id {request.request_id!r} is in use", param="request_id")
        max_tokens = resolve_max_tokens(request, max_model_len=self.config.max_model_len)
        check_pool(request, max_tokens=max_tokens, num_blocks=pages.num_blocks, block_size=pages.block_size)
        check_deadline(request, now=self._clock())
        self._check_queue()
        request.max_tokens = max_tokens
        request.arrival_order = self._num_added
        self._waiting.push(request)
        self._num_added += 1
        self._requests[request.request_id] = request
        self._deadlines.add(request)

    def abort(self, request_ids: Iterable[str], *, finish_reason: FinishReason = "abort") -> list[TokenOutput]:
        """Ends requests from outside, wherever they are; ids that are unknown or finished are ignored.

        Args:
            request_ids: Exact ids.
            finish_reason: What to call it: "abort", or "stop" where a stop string was found in the text.
        """
        outputs = []
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None and request.status is not RequestStatus.FINISHED:
                outputs.append(self._finish(request, finish_reason))
        self._sweep()
        return outputs

    def fail(self, request_id: str, message: str) -> list[TokenOutput]:
        """Ends a request with finish_reason "error"; nothing happens if it has ended already."""
        outputs = self.abort([request_id], finish_reason="error")
        for output in outputs:
            output.error = message
        return outputs

    def expire(self, now: float) -> list[TokenOutput]:
        """Ends requests whose deadline is not after `now`, of `time.monotonic()`, with finish_reason "timeout".

        Their pages are free at once, or as soon as the step that uses them has returned.
        """
        outputs = []
        for request_id, arrival_order in self._deadlines.take_due(now):
            request = self._requests.get(request_id)
            if request is not None and request.arrival_order == arrival_order:  # else its id has a new owner
                outputs += self.abort([request_id], finish_reason="timeout")
        return outputs

    def _check_queue(self) -> None:
        limit = self.config.max_num_queued
        # Those for whom a seat is free do not really queue: they only wait for the next step.
        num_queued = self.num_waiting - (self.config.max_num_seqs - self.num_running)
        if limit is not None and num_queued >= limit:
            raise QueueFullError(f"{num_queued} requests wait already, and at most {limit} may; try again later")

    # -- drafts --------------------------------------------------------------------------------------------------------

    @property
    def running(self) -> Sequence[Request]:
        """Requests with a seat and pages, the most important first."""
        return self._planner.running

    @property
    def num_spare_tokens(self) -> int:
        """Tokens that the next step has left for drafts, unless newcomers take them."""
        wanted = sum(max(0, request.num_new_tokens) for request in self._planner.running)
        return max(0, self.config.max_num_batched_tokens - wanted)

    def is_open(self, request: Request) -> bool:
        """Whether it waits, runs, or has a step on its way."""
        return self._requests.get(request.request_id) is request

    def put_drafts(self, request: Request, draft_token_ids: list[int]) -> None:
        """Lets the next step check guesses of what follows the request's known tokens, as far as there is room.

        Args:
            request: A running one.
            draft_token_ids: At most as many that one more token is within its `max_tokens` and the context.
        """
        request.draft_token_ids = draft_token_ids
        self._planner.has_drafts |= bool(draft_token_ids)

    # -- a step leaves -------------------------------------------------------------------------------------------------

    def schedule(self, *, only: str | None = None) -> SchedulerOutput | None:
        """Plans the next step; None when there is nothing that can run now.

        Args:
            only: Plan for this running request alone, to find out whether it is the one that breaks its step.

        Raises:
            SchedulingError: planning failed at one request. The plan is void and nothing is lost: `fail` that request
                and plan again.
        """
        if only is None:
            plan = self._planner.plan()
        else:
            request = self._requests.get(only)
            if request is None or request.status is not RequestStatus.RUNNING:
                return None
            plan = self._planner.plan_alone(request)
        return self._commit(plan) if plan.rows else None

    def _commit(self, plan: StepPlan) -> SchedulerOutput:
        num_tokens = 0
        for request, row in zip(plan.requests, plan.rows, strict=True):
            num_row_tokens = len(row.token_ids)
            request.num_in_flight_tokens += num_row_tokens
            num_tokens += num_row_tokens
            if row.num_drafts:
                request.num_in_flight_tokens -= row.num_drafts
                request.num_in_flight_drafts += row.num_drafts
            if request.draft_token_ids:  # those that had no place are of no use behind the token to come
                request.draft_token_ids = []
        tiers = self.block_manager.tiers
        first_swap, swaps = (0, ()) if tiers is None else tiers.take_swaps()
        output = SchedulerOutput(
            step_id=self._num_steps,
            requests=tuple(plan.rows),
            block_copies=tuple(self._planner.block_copies),
            num_scheduled_tokens=num_tokens,
            finished_request_ids=tuple(self._forgettable_ids),
            swaps=swaps,
            first_swap=first_swap,
        )
        self._planner.block_copies.clear()
        self._forgettable_ids.clear()
        self._num_steps += 1
        return output

    def note_step(self, output: SchedulerOutput, seconds: float) -> None:
        """Learns from a step what computing a prompt costs, if there are tiers to compare that with.

        Only steps that mostly read prompts say so, and only those that moved no pages beside.
        """
        tiers = self.block_manager.tiers
        if tiers is None or output.swaps:
            return
        lengths = (row.num_known_tokens for row in output.requests)
        num_prefill_tokens = sum(length for length in lengths if length > 1)
        if num_prefill_tokens >= MIN_PREFILL_TOKENS and 2 * num_prefill_tokens > output.num_scheduled_tokens:
            tiers.costs.note_prefill(output.num_scheduled_tokens, seconds)

    # -- a step returns ------------------------------------------------------------------------------------------------

    def update(self, output: SchedulerOutput, result: StepResult) -> list[TokenOutput]:
        """Applies the result of a step; steps must be applied in the order in which they were planned.

        Returns:
            One entry for each request that got a token or ended. An error at one request ends that request only.
        """
        token_outputs = []
        for request_id in self.block_manager.settle_swaps(output.first_swap, output.swaps, result.lost_swaps):
            self._requests[request_id].has_lost_pages = self._has_losses = True
        for row in output.requests:
            request = self._requests[row.request_id]
            request.num_in_flight_tokens -= len(row.token_ids)
            if row.num_drafts:
                request.num_in_flight_tokens += row.num_drafts
                request.num_in_flight_drafts -= row.num_drafts
            if request.status is RequestStatus.FINISHED:  # aborted while the step was on its way
                self._release_unless_in_flight(request)
                continue
            if request.has_lost_pages:  # what was computed for it stands on nothing
                continue
            try:
                token_output = self._advance(request, row, result)
            except Exception as error:
                token_output = self._finish(request, "error", error=describe(error))
            if token_output is not None:
                token_outputs.append(token_output)
        self._sweep()
        self._restart_those_who_lost_pages()
        return token_outputs

    def rollback(self, output: SchedulerOutput) -> None:
        """Undoes a step that failed. With several in flight, undo the newest first, and all behind the failed one.

        The requests keep their pages and are scheduled again. Nobody knows how far the step got, so runners forget what
        they remember of these requests, and those for whom pages were to be copied start over: the copies cannot be
        made again, for what they copy from may belong to others by now and be written to.
        """
        for row in output.requests:
            request = self._requests[row.request_id]
            request.num_in_flight_tokens -= len(row.token_ids) - row.num_drafts
            request.num_in_flight_drafts -= row.num_drafts
            if request.status is RequestStatus.FINISHED:
                self._release_unless_in_flight(request)
            elif row.num_drafts:
                self.block_manager.truncate(request.request_id, row.start + row.num_known_tokens)
        if (tiers := self.block_manager.tiers) is not None:
            tiers.rollback(output.first_swap, output.swaps)
        for request_id in self.block_manager.holders({copy.destination for copy in output.block_copies}):
            self._requests[request_id].has_lost_pages = self._has_losses = True
        self._restart_those_who_lost_pages()
        self._forgettable_ids += output.finished_request_ids
        self._forgettable_ids += (row.request_id for row in output.requests)

    def _restart_those_who_lost_pages(self) -> None:
        """Sends them back to the queue, as soon as no step on its way touches their pages."""
        if not self._has_losses:
            return
        running = self._planner.running
        broken = [each for each in running if each.has_lost_pages and each.status is RequestStatus.RUNNING]
        for request in broken:
            if not request.num_in_flight_tokens:
                running.remove(request)
                self._planner.start_over(request)
        self._has_losses = any(request.has_lost_pages for request in broken)

    def _advance(self, request: Request, row: ScheduledRequest, result: StepResult) -> TokenOutput | None:
        """Counts the row's tokens as computed and takes what was drawn behind them, if anything was.

        Drafts that were right are treated as steps of their own would be, one by one, until one ends the request: the
        draft counts as computed, and the token behind it is appended. Pages that only the others needed go back.
        """
        if row.start != request.num_computed_tokens:
            raise StepResultError(
                f"step for position {row.start} applied at {request.num_computed_tokens}; apply steps in their order"
            )
        sampled = result.sampled.get(row.request_id) if row.sampling is not None else None
        if row.sampling is not None and sampled is None:
            raise StepResultError("the step returned no token for this request")
        further = _drawn_behind_drafts(row, sampled, result) if row.num_drafts and sampled is not None else ()
        self._count_computed(request, len(row.token_ids) - row.num_drafts)
        if sampled is None:
            return None
        token_output = self._append(request, sampled)
        for token in further:
            if token_output.finish_reason is not None:
                break
            self._count_computed(request, 1)
            token_output.extend(self._append(request, token))
        if row.num_drafts and token_output.finish_reason is None:
            self.block_manager.truncate(request.request_id, request.num_computed_tokens)
        return token_output

    def _count_computed(self, request: Request, num_tokens: int) -> None:
        num_before = request.num_computed_tokens
        num_computed = request.num_computed_tokens = num_before + num_tokens
        block_size = self.block_manager.block_size
        if num_computed // block_size > num_before // block_size:  # a page was filled: others may find it now
            self.block_manager.publish(request.request_id, request.token_ids, num_computed)

    def _append(self, request: Request, sampled: SampledToken) -> TokenOutput:
        request.append_token(sampled.token_id)
        self._waiting.charge(request, 1)
        self.num_generation_tokens += 1
        if request.first_token_time is None:
            request.first_token_time = self._clock()
            self.num_prompt_tokens += len(request.prompt_token_ids)
        stop = check_stop(request, max_model_len=self.config.max_model_len)
        if stop is None:
            token_output = TokenOutput(request_id=request.request_id, num_cached_tokens=request.num_cached_tokens)
        else:
            self._planner.learn(request)
            token_output = self._finish(request, stop.reason, stop_reason=stop.token_id)
        token_output.token_ids.append(sampled.token_id)
        token_output.logprobs.append(sampled.logprobs)
        return token_output

    def _finish(
        self, request: Request, reason: FinishReason, *, stop_reason: int | None = None, error: str | None = None
    ) -> TokenOutput:
        """Ends a request wherever it stands; `_sweep` then takes it off the list of running ones."""
        self._waiting.remove(request)
        if request.status is RequestStatus.RUNNING:
            self._release_unless_in_flight(request)
        else:
            self.block_manager.forget_saved(request.request_id)
            self._forget(request)
        request.status = RequestStatus.FINISHED
        request.finish_reason = reason
        request.stop_reason = stop_reason
        request.finished_time = self._clock()
        return TokenOutput(
            request_id=request.request_id,
            finish_reason=reason,
            stop_reason=stop_reason,
            num_cached_tokens=request.num_cached_tokens,
            error=error,
            timing=RequestTiming.of(request),
        )

    def _release_unless_in_flight(self, request: Request) -> None:
        """Gives the pages back, once no step that is on its way can touch them."""
        if not request.num_in_flight_tokens:
            self.block_manager.free(request.request_id)
            self.block_manager.forget_saved(request.request_id)
            self._forget(request)

    def _forget(self, request: Request) -> None:
        del self._requests[request.request_id]
        if request.first_scheduled_time is not None:  # else no runner ever heard of it
            self._forgettable_ids.append(request.request_id)

    def _sweep(self) -> None:
        """Drops finished requests from the running ones: one pass per step, rather than a search for each of them."""
        running = self._planner.running
        running[:] = [request for request in running if request.status is RequestStatus.RUNNING]


def _drawn_behind_drafts(row: ScheduledRequest, sampled: SampledToken, result: StepResult) -> Sequence[SampledToken]:
    """What was drawn behind the drafts that were right: those that are what was drawn in their place.

    Raises:
        StepResultError: Something was drawn behind another draft.
    """
    further = result.further.get(row.request_id, [])
    drafts = row.token_ids[row.num_known_tokens :]
    accepted = [sampled.token_id, *(token.token_id for token in further[:-1])]
    if len(further) > len(drafts) or accepted[: len(further)] != drafts[: len(further)]:
        raise StepResultError(f"the step took {accepted} for the drafts {drafts}")
    return further
