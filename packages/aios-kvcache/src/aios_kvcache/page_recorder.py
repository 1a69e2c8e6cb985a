"""The latest events of a pool, with a state to start from: what every page was at any of these moments."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from aios_kvcache.page_events import PageEvent
from aios_kvcache.page_states import PageStates
from aios_kvcache.page_trace import PageRecord, PageTrace
from aios_model.errors import ConfigError

if TYPE_CHECKING:
    from aios_kvcache.block_manager import BlockManager


class PageRecorder:
    """Listens to a block manager from now on, and remembers the last events.

        with PageRecorder(block_manager) as recorder:
            ...
        recorder.trace().write(path)

    A viewer takes a `snapshot` once and then, as often as it likes, the events `since` the last one it knows. Like the
    block manager it belongs to one thread.

    Args:
        block_manager: Whose pages.
        max_events: How many to remember, a few hundred bytes each.
        clock: Tells the time in seconds.

    Attributes:
        num_events: Events so far; the number of the last one.

    Raises:
        ConfigError: `max_events` is below 1.
    """

    def __init__(
        self, block_manager: BlockManager, *, max_events: int = 100_000, clock: Callable[[], float] = time.monotonic
    ) -> None:
        if max_events < 1:
            raise ConfigError(f"a record of {max_events} page events shows nothing; give at least 1")
        self.num_events = 0
        self._block_manager = block_manager
        self._max_events = max_events
        self._clock = clock
        self._states = block_manager.page_states()
        self._start = PageSnapshot(0, clock(), self._states.copy())
        self._records: deque[PageRecord] = deque()
        block_manager.events.add(self)

    def note(self, event: PageEvent) -> None:
        """Remembers an event."""
        self._states.apply(event)
        self.num_events += 1
        self._records.append(PageRecord(self.num_events, self._clock(), event))
        if len(self._records) > self._max_events:
            self._forget_oldest()

    def snapshot(self) -> PageSnapshot:
        """How the pages stand after the last event."""
        return PageSnapshot(self.num_events, self._clock(), self._states.copy())

    def since(self, number: int) -> list[PageRecord] | None:
        """The events after number `number`; None if some of them are forgotten, and a new snapshot is needed."""
        if number < self._start.number:
            return None
        records: list[PageRecord] = []
        for record in reversed(self._records):
            if record.number <= number:
                break
            records.append(record)
        records.reverse()
        return records

    def trace(self) -> PageTrace:
        """What is remembered: the state before the first event that is, and all events since."""
        start = self._start
        manager = self._block_manager
        return PageTrace(
            num_blocks=manager.num_blocks,
            block_size=manager.block_size,
            number=start.number,
            time=start.time,
            end=self._clock(),
            start=start.states.copy(),
            records=tuple(self._records),
        )

    def close(self) -> None:
        """Listens no more; what is remembered stays. Calling it twice is fine."""
        self._block_manager.events.remove(self)

    def __enter__(self) -> PageRecorder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _forget_oldest(self) -> None:
        record = self._records.popleft()
        self._start.states.apply(record.event)
        self._start = PageSnapshot(record.number, record.time, self._start.states)


class PageSnapshot(NamedTuple):
    """How the pages stood.

    Attributes:
        number: Of the last event before.
        time: When it was taken, in seconds.
        states: The pages.
    """

    number: int
    time: float
    states: PageStates
