"""What the engine did and how long requests took. Times are seconds; moments are readings of `time.monotonic()`."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_sched.request import FinishReason, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of the engine. What is not called "running", "waiting" or "usage" counts up from its start.

    Attributes:
        num_running: Requests with a seat and pages.
        num_waiting: Requests without, the preempted ones included.
        kv_cache_usage: Share of the pages in use, 0 to 1; pages that only the prefix cache holds are free.
        prefix_cache_queries: Tokens looked up in the prefix cache.
        prefix_cache_hits: Tokens found there.
        num_preemptions: Times a running request lost its pages.
        prompt_tokens: Prompt tokens of requests that reached their first token, cached ones included.
        generation_tokens: Tokens sampled.
        num_steps: Steps that returned, failed ones included.
        num_failed_steps: Those that failed.
        schedule_seconds: Time spent planning steps and applying their results.
        step_seconds: Time spent in `Engine.step` altogether.
        tier_cache_queries: Tokens that the pool did not have and that were looked up in the tiers below it.
        tier_cache_hits: Tokens found there; they are among `prefix_cache_hits`.
        num_swap_preemptions: Preempted requests whose pages were saved in a tier.
        num_pages_stored: Pages copied from the pool to a tier.
        num_pages_fetched: Pages copied back.
        num_pages_lost: Pages that could not be read back, so that their tokens were computed again.
        num_drafts: Times a request had drafted tokens in a step.
        num_draft_tokens: Tokens that were drafted and checked.
        num_accepted_tokens: Those that were right, each of them a token gained beside the one that every row gets.
        draft_seconds: Time spent drafting; `schedule_seconds` do not hold it.
    """

    num_running: int
    num_waiting: int
    kv_cache_usage: float
    prefix_cache_queries: int
    prefix_cache_hits: int
    num_preemptions: int
    prompt_tokens: int
    generation_tokens: int
    num_steps: int
    num_failed_steps: int
    schedule_seconds: float
    step_seconds: float
    tier_cache_queries: int = 0
    tier_cache_hits: int = 0
    num_swap_preemptions: int = 0
    num_pages_stored: int = 0
    num_pages_fetched: int = 0
    num_pages_lost: int = 0
    num_drafts: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0
    draft_seconds: float = 0.0

    @property
    def acceptance_rate(self) -> float:
        """Share of the drafted tokens that were right, 0 to 1."""
        return self.num_accepted_tokens / self.num_draft_tokens if self.num_draft_tokens else 0.0

    @property
    def scheduler_share(self) -> float:
        """Share of the time that went into scheduling, 0 to 1."""
        return self.schedule_seconds / self.step_seconds if self.step_seconds else 0.0

    def at_rest(self) -> EngineStats:
        """The same counters with nothing running, waiting or in use: what an engine leaves behind."""
        return replace(self, num_running=0, num_waiting=0, kv_cache_usage=0.0)

    def continuing(self, earlier: EngineStats) -> EngineStats:
        """These statistics, counted on from `earlier`: those of an engine whose place this one took."""
        counters = [field.name for field in fields(self) if field.name not in _GAUGES]
        return replace(self, **{name: getattr(self, name) + getattr(earlier, name) for name in counters})

    @staticmethod
    def total(parts: Sequence[EngineStats]) -> EngineStats:
        """Several engines of one size as one: counts and counters add up, the usage of pages is their mean.

        Args:
            parts: At least one.
        """
        names = [field.name for field in fields(EngineStats) if field.name != "kv_cache_usage"]
        sums = {name: sum(getattr(part, name) for part in parts) for name in names}
        return EngineStats(**sums, kv_cache_usage=sum(part.kv_cache_usage for part in parts) / len(parts))


_GAUGES = ("num_running", "num_waiting", "kv_cache_usage")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepStats:
    """One step that returned.

    Attributes:
        step_id: Of the scheduler's output.
        num_requests: Rows in it.
        num_tokens: Tokens computed.
        num_sampled: Tokens that came of it.
        num_drafts: Tokens of it that were only drafted.
        seconds: From its submission to its result.
    """

    step_id: int
    num_requests: int
    num_tokens: int
    num_sampled: int
    seconds: float
    num_drafts: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """The life of a finished request. Moments it never reached are None."""

    request_id: str
    arrival_time: float
    first_scheduled_time: float | None
    first_token_time: float | None
    finished_time: float
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    num_preemptions: int
    finish_reason: FinishReason

    @classmethod
    def of(cls, request: Request) -> RequestTiming:
        """The timing of a finished request."""
        assert request.finished_time is not None
        assert request.finish_reason is not None
        return cls(
            request_id=request.request_id,
            arrival_time=request.arrival_time,
            first_scheduled_time=request.first_scheduled_time,
            first_token_time=request.first_token_time,
            finished_time=request.finished_time,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_cached_tokens=request.num_cached_tokens,
            num_generation_tokens=len(request.output_token_ids),
            num_preemptions=request.num_preemptions,
            finish_reason=request.finish_reason,
        )

    @property
    def total_seconds(self) -> float:
        """From arrival to the end."""
        return self.finished_time - self.arrival_time

    @property
    def queue_seconds(self) -> float:
        """From arrival to the first step it took part in, or to its end if there was none."""
        end = self.finished_time if self.first_scheduled_time is None else self.first_scheduled_time
        return end - self.arrival_time

    @property
    def prefill_seconds(self) -> float | None:
        """From the first step it took part in to its first token."""
        if self.first_scheduled_time is None or self.first_token_time is None:
            return None
        return self.first_token_time - self.first_scheduled_time

    @property
    def decode_seconds(self) -> float | None:
        """From its first token to its end, time lost to preemption included."""
        return None if self.first_token_time is None else self.finished_time - self.first_token_time

    @property
    def first_token_seconds(self) -> float | None:
        """From arrival to the first token (TTFT)."""
        return None if self.first_token_time is None else self.first_token_time - self.arrival_time


class StatsListener(Protocol):
    """Is told what happens, between steps, in the engine's thread. What it raises is logged and otherwise ignored."""

    def on_step(self, stats: StepStats) -> None:
        """A step returned and its results are applied."""
        ...

    def on_finished(self, timing: RequestTiming) -> None:
        """A request ended, for whatever reason."""
        ...
