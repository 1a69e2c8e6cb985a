"""One tier's slots, and the pages in them by age. Plain Python."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Literal

from aios_kvcache.block import PageContent

TierName = Literal["host", "disk"]


class StoredPage:
    """A page in a tier.

    Attributes:
        content: What it holds.
        owner: The preempted sequence it was saved for; None if whoever has this prefix may have it.
        level: Where it is.
        slot: Its number there.
        serial: Number of the move that put it there.
        num_pins: Sequences that are about to fetch it.
    """

    __slots__ = ("content", "level", "num_pins", "owner", "serial", "slot")

    def __init__(self, content: PageContent, owner: str | None, level: Level, slot: int, serial: int) -> None:
        self.content = content
        self.owner = owner
        self.level = level
        self.slot = slot
        self.serial = serial
        self.num_pins = 0

    def __repr__(self) -> str:
        return f"StoredPage({self.content.content_id}, {self.level.name} slot {self.slot}, owner={self.owner!r})"


class Level:
    """One tier: its slots, and its pages from the least recently stored to the newest."""

    def __init__(self, name: TierName, num_slots: int) -> None:
        self.name: TierName = name
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._pages: OrderedDict[int, StoredPage] = OrderedDict()  # by slot

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return bool(self._free)

    @property
    def num_pages(self) -> int:
        """Pages that are here."""
        return len(self._pages)

    def take_slot(self) -> int:
        """A free slot, which a page is to be added in."""
        return self._free.pop()

    def add(self, page: StoredPage) -> None:
        """Puts a page into the slot it names, as the newest."""
        self._pages[page.slot] = page

    def touch(self, page: StoredPage) -> None:
        """Makes a page the newest."""
        self._pages.move_to_end(page.slot)

    def remove(self, page: StoredPage) -> None:
        """Empties a slot."""
        del self._pages[page.slot]
        self._free.append(page.slot)

    def page_in(self, slot: int) -> StoredPage | None:
        """What a slot holds; None if it is free."""
        return self._pages.get(slot)

    def oldest(self) -> StoredPage | None:
        """The page to give up next; those about to be fetched are passed over."""
        return next((page for page in self._pages.values() if not page.num_pins), None)

    def __iter__(self) -> Iterator[StoredPage]:
        return iter(self._pages.values())

    def check_invariants(self) -> None:
        """Asserts that slots and pages agree."""
        used = set(self._pages)
        assert len(self._free) == len(set(self._free)), f"a {self.name} slot is free twice"
        assert used.isdisjoint(self._free), f"a {self.name} slot is free and used"
        assert len(used) + len(self._free) == self.num_slots, f"{self.name} slots were lost"
        for slot, page in self._pages.items():
            assert page.slot == slot, f"{page} is filed under slot {slot}"
            assert page.level is self, f"{page} is filed in {self.name}"
