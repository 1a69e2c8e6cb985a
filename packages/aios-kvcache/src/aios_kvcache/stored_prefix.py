"""How a sequence goes on in the tiers below the pool: what waits there for it, how that comes back, what is saved."""

from __future__ import annotations

from collections.abc import Sequence

from aios_kvcache.block import PageContent
from aios_kvcache.block_pool import BlockPool
from aios_kvcache.sequence_pages import SequencePages
from aios_kvcache.tier_level import StoredPage
from aios_kvcache.tiers import PageTiers


def await_stored_pages(
    pool: BlockPool,
    tiers: PageTiers,
    sequence_id: str,
    sequence: SequencePages,
    token_ids: Sequence[int],
    *,
    block_size: int,
    by_content: bool,
) -> None:
    """Continues a prefix with pages of a tier, which stay there until `fetch_stored_pages` has a place for them.

    Args:
        pool: The pages.
        tiers: What lies below them.
        sequence_id: Whose.
        sequence: Its pages so far: the prefix that the pool had.
        token_ids: Its tokens, of which the last is always computed.
        block_size: Tokens per page.
        by_content: Whether to look for published pages; else for those only that were saved for this very sequence.
    """
    parent, pages = pool.last_published(sequence), []
    begin = start = sequence.num_published * block_size
    while by_content and start + block_size < len(token_ids):
        tokens = tuple(token_ids[start : start + block_size])
        page_hash = pool.cache.hash_of(parent, tokens, sequence.salt)
        page = tiers.find(parent, tokens, sequence.salt, page_hash=page_hash)
        if page is None:
            break
        pages.append(page)
        parent, start = page.content, start + block_size
    pages += tiers.find_saved(sequence_id, parent, token_ids, start=start, salt=sequence.salt)
    num_tokens = sum(len(page.content.tokens) for page in pages)
    num_host = sum(page.level is tiers.host for page in pages)
    if not pages or not tiers.costs.worth_fetching(
        num_host_pages=num_host, num_disk_pages=len(pages) - num_host, num_tokens=num_tokens
    ):
        return
    assert begin + num_tokens < len(token_ids), "the last token is always computed"
    tiers.pin(pages)
    sequence.awaited, sequence.num_awaited_tokens = pages, num_tokens


def fetch_stored_pages(pool: BlockPool, tiers: PageTiers, sequence: SequencePages, block_ids: Sequence[int]) -> None:
    """Plans the way back of what was found, into the first of the pages that were just taken."""
    pages, sequence.awaited = sequence.awaited, []
    tiers.unpin(pages)
    for page, block_id in zip(pages, block_ids, strict=False):
        tiers.fetch(page, block_id)
        if sequence.num_queried:
            _count_hit(pool, tiers, page)
    if pages and pages[-1].owner is not None:
        tiers.forget(pages[-1].owner)


def save_pages(
    pool: BlockPool,
    tiers: PageTiers,
    sequence_id: str,
    sequence: SequencePages,
    token_ids: Sequence[int],
    *,
    block_size: int,
) -> bool:
    """Keeps the pages behind the published ones, which hold all of `token_ids`; returns whether that was worth it."""
    first = sequence.num_published
    table = sequence.table[first : -(-len(token_ids) // block_size)]
    if not table or any(pool.blocks[block_id].content for block_id in table):
        return False
    pages: list[tuple[PageContent, int]] = []
    parent = pool.last_published(sequence)
    for index, block_id in enumerate(table, start=first):
        tokens = tuple(token_ids[index * block_size : (index + 1) * block_size])
        parent = pool.cache.new_content(parent, tokens, sequence.salt)
        pages.append((parent, block_id))
    return tiers.save(sequence_id, pages)


def known_content(
    pool: BlockPool, tiers: PageTiers, parent: PageContent | None, tokens: tuple[int, ...], salt: str
) -> PageContent | None:
    """What a tier knows `tokens` behind `parent` as: a page that is computed again keeps the id of its content."""
    page = tiers.find(parent, tokens, salt, page_hash=pool.cache.hash_of(parent, tokens, salt))
    return None if page is None else page.content


def _count_hit(pool: BlockPool, tiers: PageTiers, page: StoredPage) -> None:
    num_tokens = len(page.content.tokens)
    pool.stats.hits += num_tokens
    if page.level is tiers.host:
        pool.stats.host_hits += num_tokens
    else:
        pool.stats.disk_hits += num_tokens
