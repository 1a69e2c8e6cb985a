"""The driver's end of tracing: switches it on and off on all ranks, and brings what they recorded onto one clock."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aios_parallel.control.handshake import host_identity
from aios_parallel.errors import ParallelError
from aios_parallel.tracing.clock import now
from aios_parallel.tracing.group_trace import ClockOffset, GroupTrace, RankTrace
from aios_parallel.tracing.step_log import StepLog

if TYPE_CHECKING:
    from aios_parallel.control.driver import RankGroup
    from aios_parallel.executor import GroupExecutor
    from aios_parallel.mesh import Mesh

CAPACITY = 1 << 18
"""Spans of each ring, 8 MiB: some 4,000 steps of a model of thirty layers."""

_CLOCK_QUESTIONS = 16


class GroupTracer:
    """Records where the time of a group of ranks goes.

        engine.tracer.start()
        engine.generate(prompts, params)
        trace = engine.tracer.stop()

    Both calls belong to the thread that steps the engine, between two steps; what is on its way is awaited.

    Args:
        group: The ranks, set up.
        executor: Runs their steps.
        mesh: Their shape.
    """

    def __init__(self, group: RankGroup, executor: GroupExecutor, *, mesh: Mesh) -> None:
        self._group = group
        self._executor = executor
        self._mesh = mesh
        self._log: StepLog | None = None

    def start(self, *, capacity: int = CAPACITY) -> None:
        """Records from now on: the last `capacity` steps, and as many exchanges of each rank and group.

        Raises:
            ParallelError: It is recording already.
            RankFailedError: The group is lost.
        """
        if self._log is not None:
            raise ParallelError("the ranks are being traced already; stop that trace first")
        if capacity < 1:
            raise ValueError(f"capacity={capacity} keeps nothing; give 1 or more")
        self._executor.drain()
        self._call("start_trace", {"capacity": capacity})
        self._log = StepLog(capacity)
        self._executor.trace(self._log)

    def stop(self) -> GroupTrace:
        """Records no more; returns what happened since `start`.

        Raises:
            ParallelError: Nothing is being recorded.
            RankFailedError: The group is lost, and the trace with it.
        """
        log, self._log = self._log, None
        if log is None:
            raise ParallelError("no trace was started")
        self._executor.drain()
        self._executor.trace(None)
        recorded = self._call("stop_trace", {})
        clocks = [self._clock(rank) for rank in range(self._group.size)]
        return GroupTrace(
            mesh=self._mesh,
            ranks=tuple(RankTrace.of(rank, recorded[rank], clocks[rank]) for rank in range(self._group.size)),
            steps=log.finished(),
            num_dropped_steps=log.num_dropped,
        )

    def _call(self, name: str, arguments: dict[str, Any]) -> list[Any]:
        return self._group.call(name, [arguments] * self._group.size, lambda stage, share: None)

    def _clock(self, rank: int) -> ClockOffset:
        """How the rank's clock differs from ours; processes of one host share theirs."""
        answers = [self._ask_clock(rank)]
        if answers[0][2] == host_identity():
            return ClockOffset()
        answers += [self._ask_clock(rank) for _ in range(_CLOCK_QUESTIONS - 1)]
        return estimate_offset([(asked, heard, theirs) for (asked, heard), theirs, _ in answers])

    def _ask_clock(self, rank: int) -> tuple[tuple[int, int], int, str]:
        asked = now()
        answer = self._group.call_rank(rank, "clock", {})
        return (asked, now()), answer["now"], answer["host"]


def estimate_offset(answers: list[tuple[int, int, int]]) -> ClockOffset:
    """The offset from questions about a clock: of the quickest answer, taken to lie halfway (as NTP does, RFC 5905).

    Args:
        answers: When each question was asked and its answer heard, on our clock, and what the other clock said.
    """
    asked, heard, theirs = min(answers, key=lambda answer: answer[1] - answer[0])
    return ClockOffset(nanoseconds=(asked + heard) // 2 - theirs, uncertainty=(heard - asked) // 2)
