"""Do the books of pages balance? Walks over everything, for tests and for idle moments."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from aios_kvcache.block_pool import BlockPool
from aios_kvcache.layout import FIRST_BLOCK
from aios_kvcache.sequence_pages import SequencePages
from aios_kvcache.tiers import PageTiers


def check_books(pool: BlockPool, sequences: Mapping[str, SequencePages], *, block_size: int) -> None:
    """Asserts that every page is free or held, as often as block tables say, and filed under what it holds.

    Raises:
        AssertionError: They do not balance; the message names the page or the sequence.
    """
    holders = Counter(block_id for sequence in sequences.values() for block_id in sequence.table)
    for block in pool.blocks:
        assert block.ref_count == holders[block.block_id], f"{block} is held {holders[block.block_id]} times"
    free = [block.block_id for block in pool.free_queue]
    usable = pool.blocks[FIRST_BLOCK:]
    assert len(free) == len(set(free)) == pool.free_queue.num_blocks, "the free queue miscounts"
    assert set(free) == {block.block_id for block in usable if block.ref_count == 0}, "free is not unused"
    assert len(free) + len(holders) == len(usable), "free + used pages are not all pages"
    assert set(pool.cache) == {block for block in pool.blocks if block.content}, "published pages are misfiled"
    pool.cache.check_invariants()
    if pool.tiers is not None:
        _check_tiers(pool, pool.tiers)
    for sequence_id, sequence in sequences.items():
        _check_sequence(pool, sequence_id, sequence, block_size)


def _check_tiers(pool: BlockPool, tiers: PageTiers) -> None:
    tiers.check_invariants()
    contents = {block.content.content_id: block.content for block in pool.cache if block.content}
    for page in (*tiers.host, *tiers.disk):
        known = contents.get(page.content.content_id, page.content)
        assert known == page.content, f"{page} shares its id with another content"


def _check_sequence(pool: BlockPool, sequence_id: str, sequence: SequencePages, block_size: int) -> None:
    assert len(set(sequence.table)) == len(sequence.table), f"{sequence_id!r} holds a page twice"
    assert sequence.num_published <= len(sequence.table), f"{sequence_id!r} published what it does not hold"
    parent_id = 0
    for block_id in sequence.table[: sequence.num_published]:
        content = pool.blocks[block_id].content
        assert content is not None, f"{sequence_id!r} counts the private page {block_id} as published"
        assert content.parent_id == parent_id, f"page {block_id} of {sequence_id!r} stands in a wrong chain"
        assert content.salt == sequence.salt, f"page {block_id} of {sequence_id!r} has another salt"
        assert len(content.tokens) == block_size, f"page {block_id} was published before it was full"
        parent_id = content.content_id
