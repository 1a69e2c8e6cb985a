"""The pages themselves: who holds how many, which are free, and which is given up when a new one is needed.

Between use and reuse a page passes through the free queue. One that is published stays findable there, and leaves by
age: the pool is the page cache of the operating system, and evicting from it is how memory that is "free" is found.
"""

from __future__ import annotations

from collections.abc import Sequence

from aios_kvcache.block import Block, FreeQueue, PageContent
from aios_kvcache.layout import FIRST_BLOCK
from aios_kvcache.page_events import Evicted, PageEventStream
from aios_kvcache.prefix_cache import PageHash, PrefixCache, PrefixCacheStats
from aios_kvcache.sequence_pages import SequencePages
from aios_kvcache.tiers import PageTiers


class BlockPool:
    """Pages 1..`num_blocks`, their reference counts, and the prefix cache over those that are published.

    Args:
        num_blocks: Pages to hand out.
        hash_function: Files published pages; see `prefix_cache.py`.
        tiers: Where pages go that are evicted; None forgets them.

    Attributes:
        blocks: All pages by their id; page 0, the null page, is never handed out.
        free_queue: Those that nobody holds.
        cache: Finds the published ones, held or not.
        stats: What was found and what was evicted.
        events: Tells of all this, the tiers included, whoever listens.
    """

    __slots__ = ("blocks", "cache", "events", "free_queue", "stats", "tiers")

    def __init__(self, *, num_blocks: int, hash_function: PageHash, tiers: PageTiers | None) -> None:
        self.blocks = [Block(block_id) for block_id in range(FIRST_BLOCK + num_blocks)]
        self.free_queue = FreeQueue(self.blocks[FIRST_BLOCK:])
        self.cache = PrefixCache(hash_function)
        self.stats = PrefixCacheStats()
        self.tiers = tiers
        self.events = PageEventStream() if tiers is None else tiers.events

    def last_published(self, sequence: SequencePages) -> PageContent | None:
        """What the newest published page of a sequence holds; None if it has none."""
        if not sequence.num_published:
            return None
        return self.blocks[sequence.table[sequence.num_published - 1]].content

    def take(self) -> Block:
        """The free page whose content is worth least, private now and held once; what it held moves to a tier."""
        block = self.free_queue.pop_front()
        content = block.content
        if self.tiers is not None:
            self.tiers.retake(block.block_id)
            if content is not None:
                self.tiers.store(content, block.block_id)
        if content is not None:
            self.cache.remove(block)
            self.stats.evictions += 1
            if self.events.is_watched:
                self.events.emit(Evicted(block.block_id, content.content_id))
        block.ref_count = 1
        return block

    def hold(self, block: Block) -> None:
        """One more holder for a page, free or not."""
        if block.ref_count == 0:
            self.free_queue.remove(block)
        block.ref_count += 1

    def release(self, block_ids: Sequence[int], *, undo: bool = False) -> None:
        """Lets go of pages, the last one first: the end of a prefix is worth less than its beginning.

        Args:
            block_ids: In the order of their tokens.
            undo: Nothing has changed since `hold` took them: the free queue is to look as it did before.
        """
        for block_id in reversed(block_ids):
            block = self.blocks[block_id]
            block.ref_count -= 1
            if block.ref_count:
                continue
            if undo:
                self.free_queue.put_back(block)
            elif block.content is None:  # worth nothing to anyone: used next, while it is still warm
                self.free_queue.push_front(block)
            else:
                self.free_queue.push_back(block)
