"""A rank's end of tracing: steps and exchanges go to rings while the driver wants them. Off, nothing is kept."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aios_parallel.control.handshake import host_identity
from aios_parallel.tracing.clock import now
from aios_parallel.tracing.span_ring import SpanRing

if TYPE_CHECKING:
    from aios_parallel.communicator import Communicator
    from aios_parallel.control.messages import Step

TRACE_CALLS = ("clock", "start_trace", "stop_trace")
"""Functions of a rank that its tracer answers."""


class RankTracer:
    """Records what one rank does. All calls belong to the thread that runs its steps."""

    def __init__(self) -> None:
        self._groups: dict[str, Communicator] = {}
        self._steps: SpanRing | None = None
        self._exchanges: dict[str, SpanRing] = {}

    def watch(self, **groups: Communicator) -> None:
        """Names the groups whose exchanges are to be recorded: `tensor`, `pipeline`."""
        self._groups = groups

    def answer(self, name: str, arguments: dict[str, Any]) -> Any:
        """Runs one of `TRACE_CALLS`; the result is plain data."""
        match name:
            case "clock":
                return {"now": now(), "host": host_identity()}
            case "start_trace":
                return self.start(**arguments)
            case _:
                return self.stop(**arguments)

    def start(self, *, capacity: int) -> None:
        """Records from now on: the last `capacity` steps, and as many exchanges of each group."""
        self.stop()
        self._steps = SpanRing(capacity)
        for name, group in self._groups.items():
            self._exchanges[name] = SpanRing(capacity)
            group.trace(self._exchanges[name])

    def stop(self) -> dict[str, Any]:
        """Records no more, and lets go of the rings.

        Returns:
            Of `steps` and of each group: `spans`, as `unpack_spans` reads them, and `num_dropped`.
        """
        for group in self._groups.values():
            group.trace(None)
        rings = {"steps": self._steps, **self._exchanges}
        self._steps, self._exchanges = None, {}
        return {
            name: {"spans": ring.packed(), "num_dropped": ring.num_dropped}
            for name, ring in rings.items()
            if ring is not None
        }

    def now(self) -> int:
        """Nanoseconds on the clock of traces."""
        return now()

    def step(self, begin: int, step: Step) -> None:
        """A step has ended that began at `begin`."""
        if self._steps is not None:
            self._steps.record(begin, now(), step.step_id, sum(len(row.token_ids) for row in step.rows))
