"""Which page holds these tokens after that prefix? The page cache of the operating system.

A page of keys and values depends on its own tokens and on all tokens before it. So pages are found by a chained hash,
over (hash of the page before, tokens, salt), as in vLLM's automatic prefix caching. A hash is a hint, never a proof:
two prefixes can collide, by accident or by an attacker's design, and then one user would read another's context
(GHSA-rm76-4mrf-v9r8). A page therefore counts as found only if its tokens and its salt are equal and its parent is
*the* page found before it, told by an id that no other content ever had. By induction the whole prefix is equal,
whatever the hash function does; a collision is a miss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aios_kvcache.block import Block, PageContent

PageHash = Callable[[tuple[int, tuple[int, ...], str]], int]
"""Hashes (hash of the page before, tokens, salt)."""


@dataclass(slots=True, kw_only=True)
class PrefixCacheStats:
    """Counters since the start; they only grow.

    Attributes:
        queries: Tokens of all admitted sequences: those that opened and then got their first pages.
        hits: How many of those were found, in the pool or in a tier below it.
        host_hits: How many of those came back from host memory.
        disk_hits: How many came back from disk.
        evictions: Pages whose content was given up for room.
    """

    queries: int = 0
    hits: int = 0
    host_hits: int = 0
    disk_hits: int = 0
    evictions: int = 0


class PrefixCache:
    """Published pages by what they hold.

    Args:
        hash_function: Any function gives right answers; a good one gives fast ones.
    """

    def __init__(self, hash_function: PageHash = hash) -> None:
        self._hash_function = hash_function
        self._blocks: dict[int, Block] = {}
        self._last_content_id = 0

    def find(self, parent: PageContent | None, tokens: tuple[int, ...], salt: str) -> Block | None:
        """The page that holds `tokens` directly behind the content `parent` (None: at the start), if there is one."""
        block = self._blocks.get(self.hash_of(parent, tokens, salt))
        if block is None:
            return None
        assert block.content is not None, f"{block} is filed but private"
        return block if block.content.holds(parent, tokens, salt) else None

    def add(
        self,
        block: Block,
        parent: PageContent | None,
        tokens: tuple[int, ...],
        salt: str,
        *,
        known: PageContent | None = None,
    ) -> Block | None:
        """Publishes a private page, unless its content is published already.

        Args:
            block: The page.
            parent: The content before it; None at the start.
            tokens: What it holds.
            salt: Who may share it.
            known: This very content, if a tier below the pool has it: it keeps its id.

        Returns:
            The page that holds this content from now on: `block`, or an older twin of it. None if another content
            occupies the hash; then `block` stays private.
        """
        assert block.content is None, f"{block} is published with another content"
        page_hash = self.hash_of(parent, tokens, salt)
        occupant = self._blocks.get(page_hash)
        if occupant is not None:
            assert occupant.content is not None, f"{occupant} is filed but private"
            return occupant if occupant.content.holds(parent, tokens, salt) else None
        block.content = known or self.new_content(parent, tokens, salt, page_hash=page_hash)
        self._blocks[page_hash] = block
        return block

    def new_content(
        self, parent: PageContent | None, tokens: tuple[int, ...], salt: str, *, page_hash: int = 0
    ) -> PageContent:
        """A content with an id of its own; without a hash if it is not to be published."""
        self._last_content_id += 1
        parent_id = 0 if parent is None else parent.content_id
        return PageContent(self._last_content_id, parent_id, tokens, salt, page_hash)

    def hash_of(self, parent: PageContent | None, tokens: tuple[int, ...], salt: str) -> int:
        """Where a content is filed."""
        return self._hash_function((0 if parent is None else parent.page_hash, tokens, salt))

    def remove(self, block: Block) -> None:
        """Makes a page private again. Pages behind it can no longer be found, and leave by age."""
        assert block.content is not None, f"{block} is not published"
        del self._blocks[block.content.page_hash]
        block.content = None

    def clear(self) -> None:
        """Makes every page private."""
        for block in self._blocks.values():
            block.content = None
        self._blocks.clear()

    def __len__(self) -> int:
        return len(self._blocks)

    def __iter__(self) -> Iterator[Block]:
        return iter(self._blocks.values())

    def check_invariants(self) -> None:
        """Asserts that pages and map agree, and that every page stands in the chain it claims."""
        contents = {}
        for page_hash, block in self._blocks.items():
            assert block.content is not None, f"{block} is filed but private"
            assert block.content.page_hash == page_hash, f"{block} is filed under another hash"
            assert block.content.content_id not in contents, f"{block} shares its content id"
            contents[block.content.content_id] = block.content
        for content in contents.values():
            parent = contents.get(content.parent_id)  # None: the first page of a sequence, or its parent was evicted
            assert content.parent_id < content.content_id <= self._last_content_id, f"{content} is its own ancestor"
            assert parent is None or parent.salt == content.salt, f"{content} hangs behind another salt"
            if parent is not None or content.parent_id == 0:
                assert content.page_hash == self.hash_of(parent, content.tokens, content.salt), f"{content} is misfiled"
