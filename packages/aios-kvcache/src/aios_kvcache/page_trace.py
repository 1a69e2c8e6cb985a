"""A stretch of a pool's history: how its pages stood at the start, and every event since. In memory, or in a file.

The file is JSON lines. The first one says what it is and how the pages stood:

    {"format": "aios-page-trace", "version": 1, "num_blocks": 24, "block_size": 16, "number": 0, "time": 0.0,
     "end": 6.5, "owners": {"3": ["r1", "r2"]}, "contents": {"3": 7}, "stored": {"5": ["host", 0]}}

`number` and `time` are those of the last event before the first one here, `end` is when recording ended, in seconds of
one clock. `owners` names the sequences that hold a page, `contents` the number of what it holds if it is published,
`stored` tier and slot of contents below the pool; what is not named is free, private or not stored. Every further line
is an event, in order:

    {"n": 1, "t": 0.02, "event": "taken", "sequence": "r3", "pages": [4, 5]}

with the attributes of `aios_kvcache.page_events` by their names. Readers ignore keys that they don't know; the version
is raised when the meaning of one changes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from aios_kvcache.page_events import EVENT_TYPES, PageEvent
from aios_kvcache.page_states import PageHistoryError, PageStates
from aios_model.errors import AiosError

FORMAT, VERSION = "aios-page-trace", 1


class PageTraceError(AiosError, ValueError):
    """A file is no page trace, or a broken one; the message names file and line."""


class PageRecord(NamedTuple):
    """An event and when it was.

    Attributes:
        number: Counts all events of a recorder, from 1.
        time: In seconds of the recorder's clock.
        event: What happened.
    """

    number: int
    time: float
    event: PageEvent


@dataclass(frozen=True, slots=True, kw_only=True)
class PageTrace:
    """Events, and the state before them.

    Attributes:
        num_blocks: Pages of the pool.
        block_size: Tokens per page.
        number: Of the last event before the first record.
        time: When the state was as `start` says, in seconds.
        end: When recording ended, in seconds.
        start: The pages before the first record; not to be changed.
        records: The events, in their order.
    """

    num_blocks: int
    block_size: int
    number: int
    time: float
    end: float
    start: PageStates
    records: tuple[PageRecord, ...]

    def at(self, number: int) -> PageStates:
        """How the pages stood after the event of this number.

        Raises:
            PageTraceError: It is not in here.
            PageHistoryError: The events do not fit each other.
        """
        last = self.number + len(self.records)
        if not self.number <= number <= last:
            raise PageTraceError(f"event {number} is not in this trace, which has {self.number} to {last}")
        states = self.start.copy()
        for record in self.records[: number - self.number]:
            states.apply(record.event)
        return states

    def at_time(self, seconds: float) -> PageStates:
        """How the pages stood after all events up to a time of the recorder's clock.

        Raises:
            PageTraceError: It is before the start.
            PageHistoryError: The events do not fit each other.
        """
        if seconds < self.time:
            raise PageTraceError(f"{seconds} s is before the start of this trace, {self.time} s")
        return self.at(self.number + sum(record.time <= seconds for record in self.records))

    def write(self, path: Path) -> None:
        """Writes the file.

        Raises:
            AiosError: It cannot be written.
        """
        try:
            with path.open("w", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in self._lines())
        except OSError as error:
            raise AiosError(f"{path} cannot be written: {error}") from error

    @classmethod
    def read(cls, path: Path) -> PageTrace:
        """Reads what `write` wrote, and checks that each event fits those before it.

        Raises:
            PageTraceError: The file cannot be read, is something else, or is broken.
        """
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeError) as error:
            raise PageTraceError(f"{path} cannot be read: {error}") from error
        records: list[PageRecord] = []
        trace = states = None
        for number, line in enumerate(text.splitlines() or [""], start=1):
            try:
                if trace is None or states is None:
                    trace = _parse_head(json.loads(line))
                    states = trace.start.copy()
                else:
                    records.append(_parse_record(json.loads(line)))
                    states.apply(records[-1].event)
            except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
                ours = isinstance(error, PageHistoryError | PageTraceError)
                what = error if ours else f"{type(error).__name__}: {error}"
                raise PageTraceError(f"{path}, line {number} is no part of a page trace: {what}") from error
        assert trace is not None
        return replace(trace, records=tuple(records))

    def _lines(self) -> Iterator[dict[str, Any]]:
        start = self.start
        yield {
            "format": FORMAT,
            "version": VERSION,
            "num_blocks": self.num_blocks,
            "block_size": self.block_size,
            "number": self.number,
            "time": self.time,
            "end": self.end,
            "owners": {page: owners for page, owners in enumerate(start.owners) if owners},
            "contents": {page: content for page, content in enumerate(start.contents) if content},
            "stored": start.stored,
        }
        for number, time, event in self.records:
            yield {"n": number, "t": time, "event": type(event).__name__.lower(), **event._asdict()}


def _parse_head(head: Any) -> PageTrace:
    if not isinstance(head, dict) or head.get("format") != FORMAT:
        raise PageTraceError(f'the first line must say {{"format": "{FORMAT}", …}}')
    if head["version"] != VERSION:
        raise PageTraceError(f"version {head['version']} is unknown; this reads version {VERSION}")
    states = PageStates(int(head["num_blocks"]))
    for page, owners in head["owners"].items():
        states.owners[int(page)] = tuple(owners)
    for page, content in head["contents"].items():
        states.contents[int(page)] = int(content)
    states.stored = {int(content): (tier, int(slot)) for content, (tier, slot) in head["stored"].items()}
    numbers = {name: head[name] for name in ("num_blocks", "block_size", "number", "time", "end")}
    return PageTrace(**numbers, start=states, records=())


def _parse_record(line: Any) -> PageRecord:
    kind = EVENT_TYPES.get(line["event"])
    if kind is None:
        raise PageTraceError(f"event {line['event']!r} is unknown; it must be one of {', '.join(EVENT_TYPES)}")
    values: list[Any] = [line[name] for name in kind._fields]
    event = kind._make([tuple(value) if type(value) is list else value for value in values])
    return PageRecord(line["n"], line["t"], event)
