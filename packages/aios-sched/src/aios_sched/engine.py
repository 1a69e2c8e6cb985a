"""The loop around it all: plan a step, run it, apply it, and let a request that breaks its step fail alone."""

from __future__ import annotations

import logging
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from aios_sched.errors import ExecutorLostError, SchedulingError, describe
from aios_sched.stats import EngineStats, StepStats
from aios_sched.validation import check_token_ids

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from aios_kvcache.block_manager import BlockManager
    from aios_sched.drafting import Drafting
    from aios_sched.executor import Executor, StepHandle
    from aios_sched.output import SchedulerOutput, StepResult, TokenOutput
    from aios_sched.request import FinishReason, Request
    from aios_sched.scheduler import Scheduler
    from aios_sched.stats import StatsListener

_log = logging.getLogger(__name__)


class Engine:
    """Requests in, tokens out.

        engine.add(request)
        while engine.has_unfinished:
            for output in engine.step(): ...

    All methods belong to one thread. `add` and `abort` may be called between any two steps.

    Args:
        scheduler: Plans steps.
        executor: Runs them.
        listeners: Are told of every step and every finished request.
        drafting: Guesses tokens ahead, which steps then check beside computing others; None for plain decoding. The
            tokens that come out are the same.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        executor: Executor,
        listeners: Sequence[StatsListener] = (),
        *,
        drafting: Drafting | None = None,
    ) -> None:
        self._scheduler = scheduler
        self._executor = executor
        self._listeners = tuple(listeners)
        self._drafting = drafting
        self._in_flight: deque[_Step] = deque()  # oldest first
        self._suspects: deque[str] = deque()  # were in a step that failed; each reruns alone
        self._num_steps = 0
        self._num_failed_steps = 0
        self._schedule_seconds = 0.0
        self._step_seconds = 0.0
        self._last_returned = 0.0  # when the newest result came

    @property
    def has_unfinished(self) -> bool:
        """Whether another `step` is needed."""
        return self._scheduler.has_unfinished or bool(self._in_flight)

    def add(self, request: Request) -> None:
        """Takes a request.

        Raises:
            InvalidRequestError: it can never be honoured; the message has the numbers and `param` the field to blame.
            QueueFullError: too many wait already.
        """
        check_token_ids(request, vocab_size=self._executor.vocab_size)
        self._scheduler.add(request)

    def abort(self, request_ids: Iterable[str], *, finish_reason: FinishReason = "abort") -> list[TokenOutput]:
        """Ends requests, wherever they are; unknown and finished ids are ignored.

        Args:
            request_ids: Exact ids.
            finish_reason: What to call it: "abort", or "stop" where a stop string was found in the text.

        Returns:
            The last output of each request that was ended.
        """
        outputs = self._scheduler.abort(request_ids, finish_reason=finish_reason)
        self._tell_finished(outputs)
        return outputs

    def step(self) -> list[TokenOutput]:
        """Keeps the executor busy, then takes the result of its oldest step.

        Returns:
            News of the requests in that step, and of those whose deadline has passed; empty when there is nothing to
            do, and after a step without new tokens.

        Raises:
            ExecutorLostError: What runs the steps is gone; the engine cannot be used again.
        """
        started = perf_counter()
        outputs = self._scheduler.expire(time.monotonic())
        outputs += self._submit_steps()
        if self._in_flight:
            outputs += self._take_result(self._in_flight.popleft())
        else:
            assert outputs or not self._scheduler.has_unfinished, "requests are open, but none can run"
        if self._drafting is not None and not self._scheduler.has_unfinished:
            self._drafting.forget_those_who_left(self._scheduler)
        self._step_seconds += perf_counter() - started
        self._tell_finished(outputs)
        return outputs

    @property
    def block_manager(self) -> BlockManager:
        """The pages, for whoever watches them: `PageRecorder(engine.block_manager)`."""
        return self._scheduler.block_manager

    def check(self) -> None:
        """Raises ExecutorLostError if no step can run any more; worth asking while there is nothing to do."""
        self._executor.check()

    def stats(self) -> EngineStats:
        """How it stands."""
        scheduler = self._scheduler
        pages = scheduler.block_manager
        return EngineStats(
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            kv_cache_usage=pages.usage,
            prefix_cache_queries=pages.stats.queries,
            prefix_cache_hits=pages.stats.hits,
            num_preemptions=scheduler.num_preemptions,
            **_tier_stats(pages),
            prompt_tokens=scheduler.num_prompt_tokens,
            generation_tokens=scheduler.num_generation_tokens,
            num_steps=self._num_steps,
            num_failed_steps=self._num_failed_steps,
            schedule_seconds=self._schedule_seconds,
            step_seconds=self._step_seconds,
            **_draft_stats(self._drafting),
        )

    # -- forward -------------------------------------------------------------------------------------------------------

    def _submit_steps(self) -> list[TokenOutput]:
        """Submits as many steps as the executor takes and the scheduler has; returns who failed on the way."""
        failed: list[TokenOutput] = []
        while len(self._in_flight) < self._executor.max_steps_in_flight:
            step = self._plan_rerun(failed) if self._suspects else self._plan(failed)
            if step is None:
                break
            self._submit(step)
        return failed

    def _plan(self, failed: list[TokenOutput], *, only: str | None = None) -> _Step | None:
        """The next step. A request that cannot even be planned fails, and the others are planned without it.

        Whoever reruns alone does so without drafts: if they were to blame, it goes on.
        """
        draft_seconds = self._drafting.draft(self._scheduler) if self._drafting is not None and only is None else 0.0
        started = perf_counter()
        try:
            while True:
                try:
                    output = self._scheduler.schedule(only=only)
                    if output is None:
                        return None
                    return _Step(output=output, is_rerun=only is not None, draft_seconds=draft_seconds)
                except SchedulingError as error:
                    _log.exception("Planning a step failed at request %s", error.request_id)
                    failed += self._scheduler.fail(error.request_id, str(error))
        finally:
            self._schedule_seconds += perf_counter() - started

    def _plan_rerun(self, failed: list[TokenOutput]) -> _Step | None:
        """A step for the next suspect alone; reruns start when nothing else is in flight, so they share nothing."""
        if self._in_flight:
            return None
        while self._suspects:
            step = self._plan(failed, only=self._suspects.popleft())
            if step is not None:
                return step  # else it was aborted meanwhile
        return self._plan(failed)

    def _submit(self, step: _Step) -> None:
        self._in_flight.append(step)
        step.submitted = perf_counter()
        try:
            step.handle = self._executor.submit(step.output)
        except ExecutorLostError:
            raise
        except Exception as error:
            step.error = error

    # -- back ----------------------------------------------------------------------------------------------------------

    def _take_result(self, step: _Step) -> list[TokenOutput]:
        self._num_steps += 1
        try:
            result = step.result()
        except ExecutorLostError:
            raise
        except Exception as error:
            return self._recover(step, error)
        started = perf_counter()
        seconds = started - self._beginning(step)
        self._last_returned = started
        self._scheduler.note_step(step.output, seconds)
        outputs = self._scheduler.update(step.output, result)
        self._schedule_seconds += perf_counter() - started
        if self._drafting is not None:
            self._drafting.note(step.output, result, seconds=seconds, proposer_seconds=step.draft_seconds)
        self._tell_step(step.output, result, seconds)
        return outputs

    def _beginning(self, step: _Step) -> float:
        """When a step began: where one is launched while another computes, not before that one has returned."""
        if self._scheduler.config.schedule_ahead:
            return max(step.submitted, self._last_returned)
        return step.submitted

    def _recover(self, failed: _Step, error: Exception) -> list[TokenOutput]:
        """Undoes a failed step, and all behind it: they were computed on top of it.

        Its requests rerun singly. Who fails again, alone, was the one to blame.
        """
        self._num_failed_steps += 1
        while self._in_flight:
            later = self._in_flight.pop()
            later.wait()
            self._scheduler.rollback(later.output)
        self._scheduler.rollback(failed.output)
        request_ids = [row.request_id for row in failed.output.requests]
        if failed.is_rerun:
            _log.error("Request %s failed alone too, and ends", request_ids[0], exc_info=error)
            return self._scheduler.fail(request_ids[0], describe(error))
        _log.warning("A step of %d requests failed (%s); they rerun singly", len(request_ids), describe(error))
        self._suspects.extend(request_ids)
        return []

    # -- listeners -----------------------------------------------------------------------------------------------------

    def _tell_step(self, output: SchedulerOutput, result: StepResult, seconds: float) -> None:
        if not self._listeners:
            return
        stats = StepStats(
            step_id=output.step_id,
            num_requests=len(output.requests),
            num_tokens=output.num_scheduled_tokens,
            num_sampled=len(result.sampled) + sum(map(len, result.further.values())),
            seconds=seconds,
            num_drafts=sum(row.num_drafts for row in output.requests) if self._drafting is not None else 0,
        )
        self._tell(lambda listener: listener.on_step(stats))

    def _tell_finished(self, outputs: Sequence[TokenOutput]) -> None:
        if not self._listeners:
            return
        for output in outputs:
            if (timing := output.timing) is not None:
                self._tell(lambda listener, timing=timing: listener.on_finished(timing))

    def _tell(self, call: Callable[[StatsListener], None]) -> None:
        for listener in self._listeners:
            try:
                call(listener)
            except Exception:
                _log.exception("%r failed; statistics may be incomplete", listener)


def _draft_stats(drafting: Drafting | None) -> dict[str, Any]:
    """Fields of EngineStats about drafts."""
    if drafting is None:
        return {}
    stats = drafting.stats
    return {
        "num_drafts": stats.num_drafts,
        "num_draft_tokens": stats.num_draft_tokens,
        "num_accepted_tokens": stats.num_accepted_tokens,
        "draft_seconds": stats.seconds,
    }


def _tier_stats(pages: BlockManager) -> dict[str, int]:
    """Fields of EngineStats about the tiers below the pool."""
    stats, tiers = pages.stats, pages.tiers
    if tiers is None:
        return {}
    tier_hits = stats.host_hits + stats.disk_hits
    return {
        "tier_cache_queries": stats.queries - (stats.hits - tier_hits),
        "tier_cache_hits": tier_hits,
        "num_swap_preemptions": tiers.stats.num_saves,
        "num_pages_stored": tiers.stats.num_stored,
        "num_pages_fetched": tiers.stats.num_fetched,
        "num_pages_lost": tiers.stats.num_lost,
    }


@dataclass(slots=True, kw_only=True)
class _Step:
    """A step that is planned or on its way."""

    output: SchedulerOutput
    is_rerun: bool
    draft_seconds: float = 0.0  # that went into its drafts beforehand
    submitted: float = 0.0
    handle: StepHandle | None = None
    error: Exception | None = None  # of submitting it

    def result(self) -> StepResult:
        if self.handle is None:
            raise self.error or AssertionError("not submitted")
        return self.handle.result()

    def wait(self) -> None:
        """Lets it run out; nobody wants its result any more."""
        with suppress(Exception):
            self.result()
