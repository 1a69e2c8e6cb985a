"""One engine whose steps take no time to run: the real scheduler, and a cost model in place of the device."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, NamedTuple

from aios_model.sampling.params import SamplingParams
from aios_sched.output import StepResult
from aios_sched.request import DEFAULT_TENANT, Request
from aios_sched.simulator.cost import FEMTOSECONDS, StepShape
from aios_sched.simulator.leaping_scheduler import SAMPLED, LeapingScheduler, Stretch
from aios_sched.simulator.meters import Meters

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.sampling.rows import SampledToken
    from aios_sched.output import ScheduledRequest, SchedulerOutput, TokenOutput
    from aios_sched.simulator.cost import CostModel
    from aios_sched.simulator.timeline import Timeline
    from aios_sched.simulator.trace import TraceRequest


class Replica:
    """An engine in simulated time. Whoever drives it calls `end_step` at `next_event`.

    Args:
        number: Which of the replicas.
        scheduler: Its scheduler, whose clock shows the simulated time.
        cost: How long steps take.
        leap: Take stretches of decoding in one go; the results are the same either way.
        timeline: Records steps.

    Attributes:
        next_event: When its step or stretch ends, in femtoseconds; None while it has nothing to do.
        meters: What it did.
        num_outstanding: Requests it was given that have not ended.
    """

    def __init__(
        self,
        number: int,
        scheduler: LeapingScheduler,
        cost: CostModel,
        *,
        leap: bool = True,
        timeline: Timeline | None = None,
    ) -> None:
        self.number = number
        self.scheduler = scheduler
        self.next_event: int | None = None
        self.meters = Meters()
        self._cost = cost
        self._leap = leap
        self._timeline = timeline
        self._work: _Step | _Stretch | None = None
        self._silent: dict[str, Request] = {}  # without a token so far
        self._last_token: dict[str, int] = {}  # when it came, of those that were left out of a step since
        self._streams: Counter[str | int] = Counter()
        self._num_twins = 0  # open requests whose tokens another open request may compute, too

    @property
    def num_outstanding(self) -> int:
        """Requests that have not ended."""
        return self.scheduler.num_running + self.scheduler.num_waiting

    def add(self, request_id: str, traced: TraceRequest, now: int) -> None:
        """A request arrives.

        Raises:
            InvalidRequestError, QueueFullError: As an engine would refuse it.
        """
        request = Request(
            request_id=request_id,
            prompt_token_ids=traced.prompt_token_ids(),
            params=_params(traced.num_output_tokens),
            seed=0,
            eos_token_ids=(),
            arrival_time=now / FEMTOSECONDS,
            priority=traced.priority,
            cache_salt=traced.tenant,
            tenant=traced.tenant or DEFAULT_TENANT,
        )
        if isinstance(self._work, _Stretch) and self.scheduler.policy_watches:
            self._settle(self._work, now)
        self.scheduler.add(request)
        self._silent[request_id] = request
        self._streams[traced.stream] += 1
        self._num_twins += self._streams[traced.stream] > 1
        if self.next_event is None:
            self.next_event = now  # not at once: others may arrive at this very moment
        elif isinstance(self._work, _Stretch) and not self._work.stretch.blocked:
            self._cut(self._work, now)

    def forget(self, traced: TraceRequest) -> None:
        """A request has ended."""
        self._streams[traced.stream] -= 1
        if self._streams[traced.stream]:
            self._num_twins -= 1
        else:
            del self._streams[traced.stream]

    def end_step(self, now: int) -> StepEnd:
        """Applies the step that ends now, if there is one, and begins the next."""
        work, self._work = self._work, None
        end = _NOTHING
        if isinstance(work, _Stretch):
            end = self._end_stretch(work)
        elif work is not None:
            end = self._end_step(work, now)
        self._begin(now)
        return end

    # -- a step begins -------------------------------------------------------------------------------------------------

    def _begin(self, now: int) -> None:
        self.next_event = None
        stretch = None
        if self._leap and not self.scheduler.runs_any(self._last_token):
            stretch = self.scheduler.foresee(trust_refusal=not self._num_twins)
        if stretch is not None:
            durations = self._cost.decode_steps(
                num_sequences=stretch.num_sequences, num_context=stretch.num_context, count=stretch.num_steps
            )
            ends = list(accumulate(durations, initial=now))
            self._work = _Stretch(stretch, durations, ends)
            self.next_event = ends[-1]
            return
        num_preemptions = self.scheduler.num_preemptions
        output = self.scheduler.schedule()
        if output is None:
            assert not self.scheduler.has_unfinished, "requests are open, but none can run"
            return
        shape, num_pages = _shape(output.requests)
        duration = self._cost.step(shape)
        is_full = len(output.requests) == self.scheduler.num_running
        if not is_full or num_preemptions != self.scheduler.num_preemptions:
            self._note_left_out(output, now)
        self._work = _Step(output, shape, num_pages, now, duration)
        self.next_event = now + duration

    def _cut(self, work: _Stretch, now: int) -> None:
        """Ends a stretch with the step that is under way: the newcomer may join the next one."""
        num_begun = bisect_left(work.ends, now, 1, work.stretch.num_steps)
        if num_begun < work.stretch.num_steps:
            work.stretch.num_steps = num_begun
            self.next_event = work.ends[num_begun]

    def _settle(self, work: _Stretch, now: int) -> None:
        """Applies the steps of a stretch that have ended before `now`: the policy is to see things as they are."""
        num_ended = bisect_left(work.ends, now, 1, work.stretch.num_steps) - 1
        if num_ended:
            rest = work.stretch.num_steps - num_ended
            work.stretch.num_steps = num_ended
            self._end_stretch(work)
            stretch = self.scheduler.foresee(trust_refusal=not self._num_twins)
            assert stretch is not None, "a stretch ended before its time"
            stretch.num_steps = rest
            self._work = _Stretch(stretch, work.durations[num_ended:], work.ends[num_ended:])

    def _note_left_out(self, output: SchedulerOutput, now: int) -> None:
        """Remembers when those got their last token that have no place in this step."""
        included = {row.request_id for row in output.requests}
        for request_id in self.scheduler.answered_ids():
            if request_id not in included:
                self._last_token.setdefault(request_id, now)

    # -- a step ends ---------------------------------------------------------------------------------------------------

    def _end_stretch(self, work: _Stretch) -> StepEnd:
        stretch = work.stretch
        durations = work.durations[: stretch.num_steps]
        leap = self.scheduler.leap(stretch)
        self.meters.add_stretch(stretch, durations, leap)
        self.meters.gaps.add_all(durations, weight=stretch.num_sequences)
        if self._timeline is not None:
            self._timeline.add_steps(self, work.ends[0], durations, num_decodes=stretch.num_sequences)
        return StepEnd([], leap.outputs)

    def _end_step(self, work: _Step, now: int) -> StepEnd:
        scheduler, rows = self.scheduler, work.output.requests
        # Before the results are applied: they may free pages.
        num_used = scheduler.block_manager.num_blocks - scheduler.block_manager.num_free_blocks
        num_decodes = sum(len(row.token_ids) == 1 for row in rows)
        outputs = scheduler.update(work.output, _RESULT)
        self.meters.add_step(
            work.shape, work.duration, num_decodes=num_decodes, num_pages=work.num_pages, num_used=num_used
        )
        first = self._first_tokens(rows)
        self._add_gaps(rows, num_gaps=len(outputs) - len(first), work=work, now=now)
        if self._timeline is not None:
            self._timeline.add_steps(
                self, work.start, [work.duration], num_decodes=num_decodes, num_tokens=work.shape.num_tokens
            )
        return StepEnd(first, [output for output in outputs if output.finish_reason is not None])

    def _first_tokens(self, rows: Sequence[ScheduledRequest]) -> list[str]:
        """Who got a first token in this step."""
        if not self._silent:
            return []
        silent = [
            row.request_id for row in reversed(rows) if row.sampling is not None and row.request_id in self._silent
        ]
        for request_id in silent:
            del self._silent[request_id]
        return silent

    def _add_gaps(self, rows: Sequence[ScheduledRequest], *, num_gaps: int, work: _Step, now: int) -> None:
        """Counts the time since each request's token before this one: the step's, unless it was left out of some."""
        if self._last_token:
            for row in rows:
                if row.sampling is not None and row.request_id in self._last_token:
                    self.meters.gaps.add(now - self._last_token.pop(row.request_id))
                    num_gaps -= 1
        if num_gaps:
            self.meters.gaps.add(work.duration, weight=num_gaps)


class StepEnd(NamedTuple):
    """What a step brought.

    Attributes:
        first_tokens: Ids of requests that got their first token.
        finished: The last outputs of those that ended.
    """

    first_tokens: list[str]
    finished: list[TokenOutput]


class _Step(NamedTuple):
    """One step that was planned."""

    output: SchedulerOutput
    shape: StepShape
    num_pages: int
    start: int
    duration: int


class _Stretch(NamedTuple):
    """Steps that were foreseen; nothing has been done about them yet."""

    stretch: Stretch
    durations: Sequence[int]
    ends: list[int]  # of each step, and before them the beginning of the first


class _EverySampled(dict[str, "SampledToken"]):
    """The same token for every request."""

    def get(self, key: str, default: object = None) -> SampledToken:  # pyright: ignore[reportIncompatibleMethodOverride]
        return SAMPLED


_NOTHING = StepEnd([], [])
_RESULT = StepResult(sampled=_EverySampled())


def _shape(rows: Sequence[ScheduledRequest]) -> tuple[StepShape, int]:
    """The shape of a step, and the pages in its block tables."""
    num_tokens = num_context = num_pairs = num_pages = 0
    for row in rows:
        count = len(row.token_ids)
        num_tokens += count
        num_context += row.start + count
        num_pairs += count * row.start + count * (count + 1) // 2
        num_pages += len(row.block_table)
    return StepShape(num_tokens, len(rows), num_context, num_pairs), num_pages


@cache
def _params(num_output_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=num_output_tokens)
