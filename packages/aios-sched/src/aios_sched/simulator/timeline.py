"""A simulation to look at: Chrome's trace format, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

Every replica is a process with its steps on one track, a counter of its requests and pages on others, and its requests
as asynchronous spans (waiting, reading the prompt, answering). The format: "Trace Event Format", Google, 2016.
"""

from __future__ import annotations

import json
from typing import IO, TYPE_CHECKING

from aios_model.errors import AiosError, ConfigError
from aios_sched.simulator.cost import FEMTOSECONDS

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path
    from types import TracebackType

    from aios_sched.simulator.replica import Replica
    from aios_sched.simulator.trace import TraceRequest
    from aios_sched.stats import RequestTiming

_MICROSECOND = FEMTOSECONDS // 10**6


class Timeline:
    """Writes events while they happen, until there are enough: viewers don't open files of any size.

    Args:
        path: The file.
        max_events: Events after which nothing more is recorded.

    Attributes:
        num_events: Events so far.
        num_left_out: Events that came after `max_events`.

    Raises:
        ConfigError: `max_events` is below 1.
        AiosError: The file cannot be written.
    """

    def __init__(self, path: Path, *, max_events: int = 200_000) -> None:
        if max_events < 1:
            raise ConfigError(f"a timeline of {max_events} events shows nothing; give at least 1")
        self.num_events = 0
        self.num_left_out = 0
        self._max_events = max_events
        self._named: set[int] = set()
        try:
            self._file: IO[str] = path.open("w", encoding="utf-8")
        except OSError as error:
            raise AiosError(f"{path} cannot be written: {error}") from error
        self._file.write('{"displayTimeUnit": "ms", "traceEvents": [')

    def __enter__(self) -> Timeline:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the file. Calling it twice is fine."""
        if not self._file.closed:
            self._file.write('\n], "otherData": ' + json.dumps({"events_left_out": self.num_left_out}) + "}\n")
            self._file.close()

    def add_steps(
        self, replica: Replica, start: int, durations: Sequence[int], *, num_decodes: int, num_tokens: int | None = None
    ) -> None:
        """Steps that followed each other, all with the same tokens.

        Args:
            replica: Whose.
            start: Of the first, in femtoseconds.
            durations: Of each, in femtoseconds.
            num_decodes: Requests that computed their next token.
            num_tokens: All tokens; None if there were no others.
        """
        pid, num_prefill = self._process(replica), 0 if num_tokens is None else num_tokens - num_decodes
        name = f"{num_prefill} prefill + {num_decodes} decode" if num_prefill else f"{num_decodes} decode"
        tokens = {"prefill tokens": num_prefill, "decode tokens": num_decodes}
        for duration in durations:
            self._write(name, "X", start, pid, tid=1, dur=duration / _MICROSECOND, cat="step", args=tokens)
            start += duration
        scheduler = replica.scheduler
        counts = {"running": scheduler.num_running, "waiting": scheduler.num_waiting}
        self._write("requests", "C", start, pid, args=counts)
        used = scheduler.block_manager.num_blocks - scheduler.block_manager.num_free_blocks
        self._write("pages in use", "C", start, pid, args={"pages": used})

    def add_request(self, replica: Replica, traced: TraceRequest, timing: RequestTiming) -> None:
        """A request that finished: its whole life, and within it what it did."""
        pid, key = self._process(replica), timing.request_id
        details = {
            "prompt tokens": timing.num_prompt_tokens,
            "cached tokens": timing.num_cached_tokens,
            "output tokens": timing.num_generation_tokens,
            "preemptions": timing.num_preemptions,
            "session": traced.session,
            "tenant": traced.tenant,
        }
        scheduled, first = timing.first_scheduled_time, timing.first_token_time
        assert scheduled is not None
        assert first is not None
        self._span("request", key, pid, timing.arrival_time, timing.finished_time, details)
        self._span("waiting", key, pid, timing.arrival_time, scheduled, {})
        self._span("prompt", key, pid, scheduled, first, {})
        self._span("answer", key, pid, first, timing.finished_time, {})

    def _span(self, name: str, key: str, pid: int, start_s: float, end_s: float, args: dict[str, object]) -> None:
        for phase, seconds in (("b", start_s), ("e", end_s)):
            self._write(name, phase, round(seconds * FEMTOSECONDS), pid, cat="request", id=key, args=args)

    def _process(self, replica: Replica) -> int:
        pid = replica.number + 1  # some viewers hide process 0
        if pid not in self._named:
            self._named.add(pid)
            self._write("process_name", "M", 0, pid, args={"name": f"replica {replica.number}"})
            self._write("thread_name", "M", 0, pid, tid=1, args={"name": "steps"})
        return pid

    def _write(self, name: str, phase: str, time: int, pid: int, *, tid: int = 0, **rest: object) -> None:
        if self.num_events >= self._max_events:
            self.num_left_out += 1
            return
        event = {"name": name, "ph": phase, "ts": time / _MICROSECOND, "pid": pid, "tid": tid, **rest}
        self._file.write(("," if self.num_events else "") + "\n" + json.dumps(event))
        self.num_events += 1
