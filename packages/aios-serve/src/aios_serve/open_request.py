"""One request on its way through the engine, and the times that are told of it."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aios_serve.outputs import RequestTiming

if TYPE_CHECKING:
    from aios_sched.routing.router import Ticket
    from aios_serve.messages import AddRequest, ChildOutput


@dataclass(slots=True, kw_only=True, eq=False)
class OpenRequest:
    """A request on its way: what the engine was given, and when what happened (`time.monotonic()`).

    `replica` is the engine that has it, or had it last, and `ticket` its share of that engine's load.
    """

    request_id: str
    add_request: AddRequest
    session: str = ""
    replica: int = 0
    ticket: Ticket | None = None
    num_moves: int = 0
    finish_reason: str | None = None
    num_cached_tokens: int = 0
    num_generation_tokens: int = 0
    num_running: int = field(init=False)
    scheduled_time: float | None = None
    first_token_time: float | None = None
    last_token_time: float | None = None
    _last_times: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.num_running = len(self.add_request.children)

    @property
    def key(self) -> str:
        """Names this request among all that this process ever opened."""
        return self.add_request.key

    def note_tokens(self, output: ChildOutput, num_tokens: int, *, now: float) -> tuple[int, float, bool]:
        """Count tokens of one choice; returns (how many, seconds since its last or since arrival, are they first)."""
        last = self._last_times.get(output.engine_id)
        self._last_times[output.engine_id] = now
        if self.first_token_time is None:
            self.first_token_time = now
            self.scheduled_time = output.scheduled_time
            self.num_cached_tokens = output.num_cached_tokens
        self.last_token_time = now
        self.num_generation_tokens += num_tokens
        return num_tokens, now - (self.add_request.arrival_time if last is None else last), last is None

    def timing(self) -> RequestTiming:
        """The times as of now, which should be the end."""
        arrival, first, scheduled = self.add_request.arrival_time, self.first_token_time, self.scheduled_time
        return RequestTiming(
            request_id=self.request_id,
            finish_reason=self.finish_reason or "abort",
            num_prompt_tokens=len(self.add_request.prompt_token_ids),
            num_cached_tokens=self.num_cached_tokens,
            num_generation_tokens=self.num_generation_tokens,
            queue_seconds=None if scheduled is None else max(scheduled - arrival, 0.0),
            prefill_seconds=None if first is None or scheduled is None else first - scheduled,
            decode_seconds=None if first is None or self.last_token_time is None else self.last_token_time - first,
            first_token_seconds=None if first is None else first - arrival,
            total_seconds=time.monotonic() - arrival,
            replica=self.replica,
        )
