"""What happens to pages, as events: who takes, shares and returns them, what is found, evicted, copied and moved.

`BlockManager.events` tells whoever listens; with nobody listening a change costs one look at a flag, and a token that
needs no page costs nothing. An event is told when the books have just been changed in that way, in the order of the
changes, on the thread that changes them. Applied one after the other to a `PageStates` they give the state of every
page at any time (`page_states.py`); `page_recorder.py` keeps them, `page_trace.py` writes them to a file.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple, Protocol

from aios_kvcache.tier_level import TierName

_log = logging.getLogger(__name__)


class Taken(NamedTuple):
    """A sequence got private pages at the end of its block table.

    Attributes:
        sequence: Whose.
        pages: Their ids, in the order of the tokens; unpublished.
    """

    sequence: str
    pages: tuple[int, ...]


class Held(NamedTuple):
    """A sequence holds pages that were published already, because it begins alike.

    Attributes:
        sequence: Whose block table they are in now.
        pages: Their ids.
        ref_counts: How many sequences hold each, this one included.
    """

    sequence: str
    pages: tuple[int, ...]
    ref_counts: tuple[int, ...]


class Forked(NamedTuple):
    """A sequence was started with pages of another, published or not.

    Attributes:
        parent: Whose pages they are.
        sequence: The child, which holds them, too.
        pages: Their ids.
        num_tokens: Tokens in them that both have in common.
    """

    parent: str
    sequence: str
    pages: tuple[int, ...]
    num_tokens: int


class Copied(NamedTuple):
    """Copy-on-write: a sequence will write into a page that others can see, and got one of its own for it.

    Attributes:
        sequence: Who writes.
        source: The page it gave back.
        target: The private page that took its place.
    """

    sequence: str
    source: int
    target: int


class Released(NamedTuple):
    """A sequence gave pages back; those that nobody holds are free, published ones still to be found.

    Attributes:
        sequence: Who held them.
        pages: Their ids.
    """

    sequence: str
    pages: tuple[int, ...]


class Published(NamedTuple):
    """A page is full and computed: sequences that begin alike find it from now on.

    Attributes:
        page: Its id.
        content: Number of what it holds; no other content ever had it.
        parent: Number of the content before it; 0 at the start of a sequence.
    """

    page: int
    content: int
    parent: int


class Evicted(NamedTuple):
    """A published page that nobody holds was given up, for the room; the next event says who takes it.

    Attributes:
        page: Its id.
        content: Number of what it held.
    """

    page: int
    content: int


class Found(NamedTuple):
    """A sequence was admitted: it was opened and got its pages.

    Attributes:
        sequence: Which.
        num_queried: Its tokens.
        num_found: How many of those were in the pool.
        num_stored: How many were in a tier below it.
    """

    sequence: str
    num_queried: int
    num_found: int
    num_stored: int


class Stored(NamedTuple):
    """A page of the pool is copied to host memory: it was evicted, or its sequence preempted.

    Attributes:
        page: Its id.
        content: Number of what it holds.
        slot: Where it goes.
        sequence: The preempted one it is saved for; "" if whoever begins alike may have it.
    """

    page: int
    content: int
    slot: int
    sequence: str


class Fetched(NamedTuple):
    """A page of a tier is copied into the pool; it stays in the tier, too.

    Attributes:
        page: The page that is filled.
        content: Number of what it will hold.
        tier: Where it comes from.
        slot: Its slot there.
    """

    page: int
    content: int
    tier: TierName
    slot: int


class Demoted(NamedTuple):
    """A page of host memory moves to disk.

    Attributes:
        content: Number of what it holds.
        slot: Its slot on disk.
    """

    content: int
    slot: int


class Dropped(NamedTuple):
    """A tier forgot a page: for room, because it is back, because its sequence is over, or because it was lost.

    Attributes:
        content: Number of what it held.
        tier: Which tier.
        slot: The slot that is free now.
    """

    content: int
    tier: TierName
    slot: int


class Reset(NamedTuple):
    """Every page of the pool was made private: the prefix cache is empty."""


PageEvent = (
    Taken
    | Held
    | Forked
    | Copied
    | Released
    | Published
    | Evicted
    | Found
    | Stored
    | Fetched
    | Demoted
    | Dropped
    | Reset
)

EVENT_TYPES: Mapping[str, type[PageEvent]] = MappingProxyType(
    {
        kind.__name__.lower(): kind
        for kind in (
            *(Taken, Held, Forked, Copied, Released, Published, Evicted, Found),
            *(Stored, Fetched, Demoted, Dropped, Reset),
        )
    }
)
"""All of them by the names that files use."""


class PageWatcher(Protocol):
    """Whoever wants to know."""

    def note(self, event: PageEvent) -> None:
        """An event; called on the engine's thread between two changes, so it must be quick and change nothing."""
        ...


class PageEventStream:
    """Those who listen to one block manager.

    Attributes:
        is_watched: Whether anybody does. Who changes a page looks here first, and makes no event for nobody.
    """

    __slots__ = ("_watchers", "is_watched")

    def __init__(self) -> None:
        self.is_watched = False
        self._watchers: tuple[PageWatcher, ...] = ()

    def add(self, watcher: PageWatcher) -> None:
        """Tells `watcher` of every event from now on."""
        self._watchers = (*self._watchers, watcher)
        self.is_watched = True

    def remove(self, watcher: PageWatcher) -> None:
        """Tells it of no more; nothing happens if it does not listen."""
        self._watchers = tuple(each for each in self._watchers if each is not watcher)
        self.is_watched = bool(self._watchers)

    def emit(self, event: PageEvent) -> None:
        """Tells everybody. Whoever fails at it is told no more: looking on must not break what is looked at."""
        for watcher in self._watchers:
            try:
                watcher.note(event)
            except Exception:
                _log.exception("%r failed at %r and is told of no more pages", watcher, event)
                self.remove(watcher)
