"""Where pages go that the pool has no room for: a host tier, and a disk tier below it. The books only; plain Python.

Swap space and second-level page cache in one. A published page that is evicted from the pool moves to host memory, the
least recently evicted one of those to disk, the least recent one there is forgotten. Pages of a preempted request that
no prefix cache knows (the one that is not full yet, above all) are saved under the request's name.

A stored page keeps its `PageContent`: found by the same chained hash as in the pool, and verified in the same way, by
tokens, salt and the id of the content before it. That id stays with a content from level to level.

A page that is fetched stays in its tier too, where it ages; if it is still there when the pool evicts it again, nothing
has to be copied. What a page's slot held is decided when a step is planned, and carried out in the order of planning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aios_kvcache.block import PageContent
from aios_kvcache.page_events import Demoted, Dropped, Fetched, PageEventStream, Stored
from aios_kvcache.swap import Swap
from aios_kvcache.tier_costs import TierCosts
from aios_kvcache.tier_level import Level, StoredPage
from aios_model.errors import ConfigError


@dataclass(slots=True, kw_only=True)
class TierStats:
    """Pages counted since the start.

    Attributes:
        num_stored: Copied from the pool to host memory.
        num_fetched: Copied back, from either tier.
        num_demoted: Written to disk.
        num_forgotten: Given up for room.
        num_lost: Found unreadable on the way back.
        num_saves: Preempted requests whose pages were saved.
    """

    num_stored: int = 0
    num_fetched: int = 0
    num_demoted: int = 0
    num_forgotten: int = 0
    num_lost: int = 0
    num_saves: int = 0


class PageTiers:
    """Keeps the books of both tiers for one block manager.

    Args:
        num_host_pages: Slots in host memory.
        num_disk_pages: Slots on disk; 0 for no disk tier.
        costs: Decides what is worth moving; None moves everything.

    Attributes:
        stats: What happened.
        events: Tells of pages on the move whoever listens, and of those of the pool above.

    Raises:
        ConfigError: A number is out of range.
    """

    def __init__(self, *, num_host_pages: int, num_disk_pages: int = 0, costs: TierCosts | None = None) -> None:
        if num_host_pages < 1 or num_disk_pages < 0:
            raise ConfigError(
                f"num_host_pages={num_host_pages} and num_disk_pages={num_disk_pages} cannot be used: the disk tier is "
                "filled from the host tier, which needs at least one page"
            )
        self.costs = costs or TierCosts(mode="swap")
        self.stats = TierStats()
        self.events = PageEventStream()
        self.host = Level("host", num_host_pages)
        self.disk = Level("disk", num_disk_pages)
        self._filed: dict[int, StoredPage] = {}  # by the hash of their content, those without an owner
        self._saved: dict[str, list[StoredPage]] = {}  # by their owner, in the order of its tokens
        self._arriving: dict[int, int] = {}  # pool page: number of the move that fills it, until its step has returned
        self._swaps: list[Swap] = []  # planned, and in no step yet
        self._num_sent = 0  # moves in steps; the number of the first one in `_swaps`
        self._is_suspended = False

    # -- finding ---------------------------------------------------------------------------------

    def find(
        self, parent: PageContent | None, tokens: tuple[int, ...], salt: str, *, page_hash: int
    ) -> StoredPage | None:
        """The stored page that holds `tokens` directly behind the content `parent` (None: at the start)."""
        page = self._filed.get(page_hash)
        return page if page is not None and page.content.holds(parent, tokens, salt) else None

    def find_saved(
        self, sequence_id: str, parent: PageContent | None, token_ids: Sequence[int], *, start: int, salt: str
    ) -> list[StoredPage]:
        """The pages saved for a sequence, if they follow `parent` and hold its tokens from `start` on."""
        pages = self._saved.get(sequence_id, [])
        for page in pages:
            end = start + len(page.content.tokens)
            if end >= len(token_ids) or not page.content.holds(parent, tuple(token_ids[start:end]), salt):
                return []
            parent, start = page.content, end
        return list(pages)

    def pin(self, pages: Sequence[StoredPage]) -> None:
        """Keeps pages where they are until `unpin`."""
        for page in pages:
            page.num_pins += 1

    def unpin(self, pages: Sequence[StoredPage]) -> None:
        """Undoes `pin`."""
        for page in pages:
            assert page.num_pins, f"{page} is not pinned"
            page.num_pins -= 1

    # -- moving ----------------------------------------------------------------------------------

    def store(self, content: PageContent, block_id: int) -> None:
        """Keeps a published page that the pool evicts, if it is worth it and there is room."""
        if self._is_suspended or not self.costs.worth_keeping():
            return
        known = self._filed.get(content.page_hash)
        if known is not None and known.content.content_id != content.content_id:
            if known.num_pins:
                return
            self._drop(known)  # another prefix of this hash, or one whose beginning is gone: the newer is worth more
        elif known is not None and known.level is self.host:
            self.host.touch(known)
            return
        elif known is not None:
            if known.num_pins:
                return
            self._drop(known)
        page = self._put(content, block_id, owner=None)
        if page is not None:
            self._filed[content.page_hash] = page

    def save(self, sequence_id: str, pages: Sequence[tuple[PageContent, int]]) -> bool:
        """Keeps private pages of a sequence that is preempted: all or none.

        Args:
            sequence_id: Whose.
            pages: Their contents, a chain, and the pool pages that hold them.

        Returns:
            Whether they are kept. They may still be forgotten for room later.
        """
        self.forget(sequence_id)  # from an earlier time, and not fetched since
        num_tokens = sum(len(content.tokens) for content, _ in pages)
        fits = len(pages) <= self.host.num_slots + self.disk.num_slots
        arriving = any(block_id in self._arriving for _, block_id in pages)
        if self._is_suspended or not fits or arriving:
            return False
        if not self.costs.worth_saving(num_pages=len(pages), num_tokens=num_tokens):
            return False
        saved = self._saved[sequence_id] = []
        for content, block_id in pages:
            page = self._put(content, block_id, owner=sequence_id)
            if page is None or self._saved.get(sequence_id) is not saved:
                if page is not None:
                    self._drop(page)
                self.forget(sequence_id)
                return False
            saved.append(page)
        self.stats.num_saves += 1
        return True

    def forget(self, sequence_id: str) -> None:
        """Gives up what was saved for a sequence: it is back, or over."""
        for page in self._saved.pop(sequence_id, ()):
            self._drop(page)

    def fetch(self, page: StoredPage, block_id: int) -> None:
        """Plans to fill a pool page; the page stays where it is."""
        self._arriving[block_id] = self._emit("in" if page.level is self.host else "load", page.slot, block_id)
        self.stats.num_fetched += 1
        if self.events.is_watched:
            self.events.emit(Fetched(block_id, page.content.content_id, page.level.name, page.slot))

    def is_arriving(self, block_id: int) -> bool:
        """Whether a pool page is to be filled by a move whose step has not returned."""
        return block_id in self._arriving

    def retake(self, block_id: int) -> None:
        """A pool page was handed to someone else: whatever was to fill it no longer matters."""
        self._arriving.pop(block_id, None)

    def clear(self) -> None:
        """Forgets all pages, for instance because the weights changed."""
        for page in [*self.host, *self.disk]:
            self._drop(page)
        self._filed.clear()
        self._saved.clear()

    # -- steps -----------------------------------------------------------------------------------

    @property
    def is_suspended(self) -> bool:
        """Whether copies of pages are planned: a step makes those last, so moves behind them wait for the next step."""
        return self._is_suspended

    def suspend(self) -> None:
        """Copies of pages were planned."""
        self._is_suspended = True

    def take_swaps(self) -> tuple[int, tuple[Swap, ...]]:
        """What was planned since the last step, for the step that leaves now: the first one's number, and all."""
        first, swaps = self._num_sent, tuple(self._swaps)
        self._num_sent += len(swaps)
        self._swaps.clear()
        self._is_suspended = False
        return first, swaps

    def rollback(self, first_swap: int, swaps: Sequence[Swap]) -> None:
        """A step failed, the newest that was sent: the next one carries its moves again, under their old numbers."""
        assert first_swap + len(swaps) == self._num_sent, "steps are rolled back in another order than newest first"
        self._num_sent = first_swap
        self._swaps[:0] = swaps

    def settle(self, first_swap: int, swaps: Sequence[Swap], lost: Sequence[int]) -> set[int]:
        """A step returned. What could not be read is forgotten.

        Args:
            first_swap: Number of its first move.
            swaps: Its moves.
            lost: Numbers of those that found nothing, or something else than had been written.

        Returns:
            Pool pages without their content, whose sequences have to compute it.
        """
        broken: set[int] = set()
        for serial, swap in enumerate(swaps, start=first_swap):
            if swap.kind in ("out", "demote"):
                continue
            is_awaited = self._arriving.get(swap.target) == serial
            if is_awaited:
                del self._arriving[swap.target]
            if serial in lost:
                self.stats.num_lost += 1
                self._forget_slot(swap, serial)
                if is_awaited:
                    broken.add(swap.target)
        return broken

    # -- checking --------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Asserts that the books balance."""
        pages = [*self.host, *self.disk]
        ids = [page.content.content_id for page in pages]
        assert len(ids) == len(set(ids)), "a content is stored twice"
        for level in (self.host, self.disk):
            level.check_invariants()
        filed, saved = list(self._filed.values()), [page for pages in self._saved.values() for page in pages]
        assert sorted(map(id, filed + saved)) == sorted(map(id, pages)), "stored pages are not those that can be found"
        assert all(page.owner is None and page.content.page_hash == key for key, page in self._filed.items())
        for owner, chain in self._saved.items():
            assert all(page.owner == owner for page in chain), f"a page of {owner!r} belongs to another"
            ids = [page.content.content_id for page in chain]
            assert [page.content.parent_id for page in chain[1:]] == ids[:-1], f"pages of {owner!r} are no chain"
        assert len(self._arriving) == len(set(self._arriving.values())), "one move fills two pages"

    # -- slots -----------------------------------------------------------------------------------

    def _put(self, content: PageContent, block_id: int, *, owner: str | None) -> StoredPage | None:
        """A new page in host memory; None if everything there is about to be fetched."""
        if not self._make_room():
            return None
        slot = self.host.take_slot()
        page = StoredPage(content, owner, self.host, slot, self._emit("out", block_id, slot))
        self.host.add(page)
        self.stats.num_stored += 1
        if self.events.is_watched:
            self.events.emit(Stored(block_id, content.content_id, slot, owner or ""))
        return page

    def _make_room(self) -> bool:
        """Empties a host slot if none is free."""
        if self.host.has_room:
            return True
        victim = self.host.oldest()
        if victim is None:
            return False
        if not self.disk.num_slots or not self.costs.worth_demoting() or not self._make_room_on_disk():
            self._give_up(victim)
            return True
        if self.host.has_room:  # what left the disk took pages in host memory with it, perhaps the victim
            return True
        slot = self.disk.take_slot()
        victim.serial = self._emit("demote", victim.slot, slot)
        self.host.remove(victim)
        victim.level, victim.slot = self.disk, slot
        self.disk.add(victim)
        self.stats.num_demoted += 1
        if self.events.is_watched:
            self.events.emit(Demoted(victim.content.content_id, slot))
        return True

    def _make_room_on_disk(self) -> bool:
        if not self.disk.has_room:
            victim = self.disk.oldest()
            if victim is None:
                return False
            self._give_up(victim)
        return True

    def _give_up(self, page: StoredPage) -> None:
        """Forgets a page for room, and with it what only makes sense behind it."""
        self.stats.num_forgotten += 1
        self._drop_with_chain(page)

    def _drop_with_chain(self, page: StoredPage) -> None:
        if page.owner is None:
            self._drop(page)
        else:
            self.forget(page.owner)

    def _drop(self, page: StoredPage) -> None:
        page.level.remove(page)
        if page.owner is None and self._filed.get(page.content.page_hash) is page:
            del self._filed[page.content.page_hash]
        if self.events.is_watched:
            self.events.emit(Dropped(page.content.content_id, page.level.name, page.slot))

    def _forget_slot(self, swap: Swap, serial: int) -> None:
        """Forgets the page that a move tried to read, unless its slot has been filled again since."""
        level = self.host if swap.kind == "in" else self.disk
        page = level.page_in(swap.source)
        if page is not None and page.serial < serial:
            self._drop_with_chain(page)

    def _emit(self, kind: Literal["out", "in", "demote", "load"], source: int, target: int) -> int:
        self._swaps.append(Swap(kind, source, target))
        return self._num_sent + len(self._swaps) - 1
