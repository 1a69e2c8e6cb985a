"""Discrete events: requests arrive, steps end, answered users ask again. One queue of events for all replicas."""

from __future__ import annotations

from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

from aios_kvcache.page_recorder import PageRecorder
from aios_model.errors import ConfigError, InvalidRequestError
from aios_sched.errors import QueueFullError
from aios_sched.routing.base import RoutedRequest
from aios_sched.simulator.cost import FEMTOSECONDS
from aios_sched.simulator.replica import Replica
from aios_sched.simulator.results import Results

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from aios_sched.output import TokenOutput
    from aios_sched.routing.router import Ticket
    from aios_sched.simulator.cost import CostModel
    from aios_sched.simulator.system import SystemConfig
    from aios_sched.simulator.timeline import Timeline
    from aios_sched.simulator.trace import Trace, TraceRequest

_ARRIVAL, _STEP_END = 0, 1  # of what happens at the same moment, arrivals come first


class Fleet:
    """Replicas behind a router, from the first arrival of a trace to its last token.

    Args:
        system: What is simulated.
        cost: How long steps take.
        leap: Take stretches of decoding in one go; the results are the same either way.
        timeline: Records steps and requests.
        on_progress: Told now and then how many requests have ended.
    """

    def __init__(
        self,
        system: SystemConfig,
        cost: CostModel,
        *,
        leap: bool = True,
        timeline: Timeline | None = None,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        self._now = 0
        self._cost = cost
        self._leap = leap
        self._system = system
        self._timeline = timeline
        self._on_progress = on_progress
        self._router = system.make_router()
        self.replicas = [
            Replica(number, system.make_scheduler(self._clock), cost, leap=leap, timeline=timeline)
            for number in range(system.replicas)
        ]
        self._events: list[tuple[int, int, int, TraceRequest | None]] = []
        self._order = count()
        self._open: dict[str, _Open] = {}

    def run(self, trace: Trace) -> Results:
        """Simulates the trace. Once only."""
        results = Results(self._system, host_time=self._cost.host_time)
        arrivals = trace.arrivals()
        self._push_next(arrivals)
        while self._events:
            time, kind, number, traced = heappop(self._events)
            if traced is not None:
                self._now = time
                if kind == _ARRIVAL and traced.turn == 0:
                    self._push_next(arrivals)
                self._arrive(traced, f"r{number}", results)
            elif self.replicas[number].next_event == time:  # else it was put off, or brought forward
                self._now = time
                self._end_step(self.replicas[number], trace, results)
        results.close(self._now, self.replicas)
        return results

    def record_pages(self, replica: int = 0, *, max_events: int = 200_000) -> PageRecorder:
        """Remembers what happens to a replica's pages, in simulated seconds; to be called before `run`.

        Args:
            replica: Its number.
            max_events: How many events to remember, the last ones.

        Raises:
            ConfigError: The fleet leaps: then pages are taken and published for many steps at once.
        """
        if self._leap:
            raise ConfigError("a fleet that leaps over steps cannot tell when pages changed; make it with leap=False")
        return PageRecorder(self.replicas[replica].scheduler.block_manager, max_events=max_events, clock=self._clock)

    def _clock(self) -> float:
        return self._now / FEMTOSECONDS

    def _push_next(self, arrivals: Iterator[TraceRequest]) -> None:
        traced = next(arrivals, None)
        if traced is not None:
            self._push_arrival(traced)

    def _push_arrival(self, traced: TraceRequest) -> None:
        time = max(round(traced.arrival_s * FEMTOSECONDS), self._now)
        heappush(self._events, (time, _ARRIVAL, next(self._order), traced))

    def _arrive(self, traced: TraceRequest, request_id: str, results: Results) -> None:
        ticket = None
        replica = self.replicas[0]
        if self._router is not None:
            ticket = self._router.route(
                RoutedRequest(
                    prompt_token_ids=traced.prompt_token_ids(), session=traced.session, cache_salt=traced.tenant
                )
            )
            assert ticket is not None, "there is no replica"
            replica = self.replicas[ticket.replica]
        before = replica.next_event
        try:
            replica.add(request_id, traced, self._now)
        except (InvalidRequestError, QueueFullError) as error:
            results.add_refused(traced, error)
            if self._router is not None and ticket is not None:
                self._router.finish(ticket)
            return
        self._open[request_id] = _Open(traced, ticket)
        self._push_event(replica, before)

    def _end_step(self, replica: Replica, trace: Trace, results: Results) -> None:
        end = replica.end_step(self._now)
        for request_id in end.first_tokens:
            ticket = self._open[request_id].ticket
            if self._router is not None and ticket is not None:
                self._router.note_first_token(ticket)
        for output in end.finished:
            self._finish(replica, output, trace, results)
        self._push_event(replica, None)

    def _finish(self, replica: Replica, output: TokenOutput, trace: Trace, results: Results) -> None:
        traced, ticket = self._open.pop(output.request_id)
        assert output.timing is not None
        replica.forget(traced)
        if self._router is not None and ticket is not None:
            self._router.finish(ticket)
        results.add(traced, output.timing)
        if self._timeline is not None:
            self._timeline.add_request(replica, traced, output.timing)
        if self._on_progress is not None and not results.num_finished % 1000:
            self._on_progress(results.num_finished)
        following = trace.follow_up(traced, finished_s=output.timing.finished_time)
        if following is not None:
            self._push_arrival(following)

    def _push_event(self, replica: Replica, before: int | None) -> None:
        time = replica.next_event
        if time is not None and time != before:
            heappush(self._events, (time, _STEP_END, replica.number, None))


class _Open(NamedTuple):
    """A request that has not ended."""

    traced: TraceRequest
    ticket: Ticket | None
