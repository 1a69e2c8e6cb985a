"""Who wants to hear what the engines do: metrics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from aios_sched.stats import EngineStats
    from aios_serve.outputs import RequestTiming


class EngineListener(Protocol):
    """Is told what happens, on the event loop, for metrics. Must return quickly; what it raises is logged.

    `replica` is the number of the engine it happened in.
    """

    def on_step(self, *, stats: EngineStats, num_tokens: int, replica: int) -> None:
        """A step (or several, coalesced) ended with `stats` after handling `num_tokens` prompt and output tokens."""
        ...

    def on_tokens(self, *, num_tokens: int, seconds: float, first: bool, replica: int) -> None:
        """One choice gained `num_tokens`, `seconds` after its last ones, or after arrival if they are its `first`."""
        ...

    def on_finished(self, timing: RequestTiming) -> None:
        """A request ended, for whatever reason."""
        ...
