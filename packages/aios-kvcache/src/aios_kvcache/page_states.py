"""Whose is each page? The state of a pool as events leave it: who holds what, what can be found, what is stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from aios_kvcache.page_events import (
    Copied,
    Demoted,
    Dropped,
    Evicted,
    Forked,
    Held,
    PageEvent,
    Published,
    Released,
    Reset,
    Stored,
    Taken,
)
from aios_kvcache.tier_level import TierName
from aios_model.errors import AiosError

PageStatus = Literal["free", "cached", "private", "published", "shared"]
"""`free`: nobody's and empty. `cached`: nobody's, but to be found. `private`: one sequence's, unpublished. `published`:
one sequence's, and to be found by others. `shared`: several sequences'."""


class PageHistoryError(AiosError, ValueError):
    """An event does not fit the state before it: events are missing, doubled or in another order."""


class PageStates:
    """The pages of a pool, and of the tiers below it, at one moment.

    Args:
        num_blocks: Pages of the pool; their ids are 1 to `num_blocks`, all free at first.

    Attributes:
        owners: The sequences that hold each page, by its id; nobody holds page 0.
        contents: Number of what each page holds as far as it is published, by its id; 0 for private pages.
        stored: Tier and slot of what is kept below the pool, by the number of the content.
    """

    __slots__ = ("contents", "owners", "stored")

    def __init__(self, num_blocks: int) -> None:
        self.owners: list[tuple[str, ...]] = [()] * (num_blocks + 1)
        self.contents = [0] * (num_blocks + 1)
        self.stored: dict[int, tuple[TierName, int]] = {}

    @property
    def num_blocks(self) -> int:
        """Pages of the pool."""
        return len(self.owners) - 1

    def ref_count(self, page: int) -> int:
        """How many sequences hold a page."""
        return len(self.owners[page])

    def status(self, page: int) -> PageStatus:
        """What is to be said of a page in one word."""
        owners = self.owners[page]
        if not owners:
            return "cached" if self.contents[page] else "free"
        if len(owners) > 1:
            return "shared"
        return "published" if self.contents[page] else "private"

    def copy(self) -> PageStates:
        """The same, unmoved by later events. 0.1 ms for ten thousand pages."""
        copy = PageStates(0)
        copy.owners, copy.contents, copy.stored = self.owners.copy(), self.contents.copy(), self.stored.copy()
        return copy

    def apply(self, event: PageEvent) -> None:
        """What an event did.

        Raises:
            PageHistoryError: It cannot have happened in this state; the state is no longer to be relied on.
        """
        effect = _EFFECTS.get(type(event))
        if effect is not None:
            effect(self, event)

    # -- Effects ---------------------------------------------------------------------------------

    def _taken(self, event: Taken) -> None:
        for page in event.pages:
            _check(not self.owners[page] and not self.contents[page], event, page, "which was not free")
            self.owners[page] = (event.sequence,)

    def _held(self, event: Held) -> None:
        for page, ref_count in zip(event.pages, event.ref_counts, strict=True):
            _check(bool(self.contents[page]), event, page, "which was not published")
            self._add_owner(event, event.sequence, page)
            _check(len(self.owners[page]) == ref_count, event, page, f"which {len(self.owners[page])} hold")

    def _forked(self, event: Forked) -> None:
        for page in event.pages:
            _check(event.parent in self.owners[page], event, page, "which the parent does not hold")
            self._add_owner(event, event.sequence, page)

    def _copied(self, event: Copied) -> None:
        free = not self.owners[event.target] and not self.contents[event.target]
        _check(free, event, event.target, "which was not free")
        self._remove_owner(event, event.sequence, event.source)
        self.owners[event.target] = (event.sequence,)

    def _released(self, event: Released) -> None:
        for page in event.pages:
            self._remove_owner(event, event.sequence, page)

    def _published(self, event: Published) -> None:
        _check(not self.contents[event.page], event, event.page, "which was published already")
        _check(bool(self.owners[event.page]), event, event.page, "which nobody holds")
        self.contents[event.page] = event.content

    def _evicted(self, event: Evicted) -> None:
        _check(not self.owners[event.page], event, event.page, "which is held")
        _check(self.contents[event.page] == event.content, event, event.page, "which held something else")
        self.contents[event.page] = 0

    def _stored(self, event: Stored) -> None:
        _check(event.content not in self.stored, event, event.page, "whose content is stored already")
        self.stored[event.content] = "host", event.slot

    def _demoted(self, event: Demoted) -> None:
        _check(event.content in self.stored, event, None, "which is not in host memory")
        self.stored[event.content] = "disk", event.slot

    def _dropped(self, event: Dropped) -> None:
        place = self.stored.pop(event.content, None)
        _check(place == (event.tier, event.slot), event, None, "which is not there")

    def _reset(self, event: Reset) -> None:
        _check(not any(self.owners), event, None, "while pages are held")
        self.contents = [0] * len(self.contents)

    def _add_owner(self, event: PageEvent, sequence: str, page: int) -> None:
        owners = self.owners[page]
        _check(sequence not in owners, event, page, "which it holds already")
        self.owners[page] = (*owners, sequence)

    def _remove_owner(self, event: PageEvent, sequence: str, page: int) -> None:
        owners = self.owners[page]
        if owners == (sequence,):
            self.owners[page] = ()
            return
        _check(sequence in owners, event, page, "which it does not hold")
        self.owners[page] = tuple(owner for owner in owners if owner != sequence)


def _check(fits: bool, event: PageEvent, page: int | None, why_not: str) -> None:
    if not fits:
        what = "" if page is None else f" names page {page},"
        raise PageHistoryError(f"{event}{what} {why_not}: events before it are missing or out of order")


_EFFECTS: dict[type[PageEvent], Callable[[PageStates, Any], None]] = {
    Taken: PageStates._taken,
    Held: PageStates._held,
    Forked: PageStates._forked,
    Copied: PageStates._copied,
    Released: PageStates._released,
    Published: PageStates._published,
    Evicted: PageStates._evicted,
    Stored: PageStates._stored,
    Demoted: PageStates._demoted,
    Dropped: PageStates._dropped,
    Reset: PageStates._reset,
}
