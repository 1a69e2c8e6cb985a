"""Which page holds which token: block tables, reference counts, sharing and eviction. Plain Python.

The virtual memory of an inference engine (Kwon et al. 2023, arXiv 2309.06180). A sequence sees its tokens in a row; its
block table says in which page each run of `block_size` tokens lies. Pages may be shared: by sequences with the same
prefix, found through the prefix cache, and by forks. A page that no one holds stays findable until its room is needed.

A sequence's life:

    open      the block table starts with the longest cached prefix
    reserve   room for the tokens of the next step, all or nothing
    publish   pages that the step filled can be found by others
    truncate  the newest tokens are dropped again (speculation that failed)
    save      pages that no cache knows go to a tier below the pool, if there is one
    free      the pages go back

With tiers below the pool (`tiers.py`), pages that are evicted move there, `open` finds them there, and `reserve` plans
their way back. The scheduler is its only caller, from one thread; nothing here is locked.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from aios_kvcache.block import Block, BlockCopy, FreeQueue, PageContent
from aios_kvcache.errors import DuplicateSequenceError, SequenceError, UnknownSequenceError
from aios_kvcache.layout import FIRST_BLOCK, num_blocks_for
from aios_kvcache.prefix_cache import PageHash, PrefixCache, PrefixCacheStats
from aios_kvcache.swap import Swap
from aios_kvcache.tier_level import StoredPage
from aios_kvcache.tiers import PageTiers
from aios_model.errors import ConfigError

__all__ = ["BlockCopy", "BlockManager", "PrefixCacheStats"]


class BlockManager:
    """Hands out the pages 1..`num_blocks`; page 0 is the null page, which padding reads and nobody owns.

    Args:
        num_blocks: Pages to hand out.
        block_size: Tokens per page.
        enable_prefix_caching: Whether published pages are found by later sequences.
        hash_function: Files published pages; see `prefix_cache.py`.
        tiers: Where pages go that are evicted; None forgets them.

    Raises:
        ConfigError: A size is below one.
    """

    def __init__(
        self,
        *,
        num_blocks: int,
        block_size: int = 16,
        enable_prefix_caching: bool = True,
        hash_function: PageHash = hash,
        tiers: PageTiers | None = None,
    ) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ConfigError(f"num_blocks and block_size must be positive, got {num_blocks} and {block_size}")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.stats = PrefixCacheStats()
        self.tiers = tiers
        self._blocks = [Block(block_id) for block_id in range(FIRST_BLOCK + num_blocks)]
        self._free_queue = FreeQueue(self._blocks[FIRST_BLOCK:])
        self._cache = PrefixCache(hash_function)
        self._sequences: dict[str, _Sequence] = {}
        self._just_opened: _Sequence | None = None  # nothing else has changed since it was opened

    # -- Reading ---------------------------------------------------------------------------------

    @property
    def num_free_blocks(self) -> int:
        """Pages that `reserve` can take: unused ones, and cached ones that no sequence holds."""
        return self._free_queue.num_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Pages that the prefix cache can find, held by a sequence or not."""
        return len(self._cache)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold, 0 to 1."""
        return 1.0 - self._free_queue.num_blocks / self.num_blocks

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens fits into the pool when it has the pool to itself."""
        return num_blocks_for(num_tokens, self.block_size) <= self.num_blocks

    def count_cached_tokens(self, token_ids: Sequence[int], *, salt: str = "") -> int:
        """How many leading tokens `open` would find in the cache now; changes nothing, stops at the first miss."""
        size, parent = self.block_size, None
        if not self.enable_prefix_caching:
            return 0
        for start in range(0, len(token_ids) - size, size):
            block = self._cache.find(parent, tuple(token_ids[start : start + size]), salt)
            if block is None:
                return start
            parent = block.content
        return (len(token_ids) - 1) // size * size

    def block_table(self, sequence_id: str) -> list[int]:
        """The sequence's pages in the order of its tokens; a copy, which a step's plan may keep."""
        return self._get(sequence_id).table.copy()

    # -- A sequence's life -----------------------------------------------------------------------

    def open(self, sequence_id: str, token_ids: Sequence[int], *, salt: str = "", use_tiers: bool = True) -> int:
        """Starts a sequence with the longest cached prefix of `token_ids`: whole pages, at most all but one token.

        What waits in a tier is counted as found; its pages are taken by the first `reserve`. Behind whole pages follows
        what `save` kept of this very sequence, which may end within a page.

        One token is always left to compute, since its logits are wanted. If there turns out to be no room
        (`reserve` returns None), `free` undoes this without a trace in the order of eviction or in the statistics.

        Args:
            sequence_id: A name that no open sequence has.
            token_ids: The tokens known so far.
            salt: Only sequences of equal salt share pages: one per tenant that must not notice the others.
            use_tiers: Whether to look below the pool.

        Returns:
            How many tokens were found; computing starts behind them.

        Raises:
            DuplicateSequenceError: The id is open already.
        """
        if sequence_id in self._sequences:
            raise DuplicateSequenceError(sequence_id)
        sequence = _Sequence(salt, num_queried=len(token_ids))
        self._sequences[sequence_id] = sequence
        if self.enable_prefix_caching:
            self._hold_cached_prefix(sequence, token_ids)
        if self.tiers is not None and use_tiers and not self.tiers.is_suspended:
            self._await_stored_pages(self.tiers, sequence_id, sequence, token_ids)
        self._just_opened = sequence
        return sequence.num_published * self.block_size + sequence.num_awaited_tokens

    def reserve(self, sequence_id: str, *, start: int, end: int) -> list[BlockCopy] | None:
        """Makes the slots [start, end) exist and writable, and those before `start` exist.

        Pages in that range which others can see, through a fork or through the prefix cache, are replaced by copies.

        Returns:
            Copies to carry out, in this order, before anything is written; None if there are not enough free pages,
            in which case nothing has changed.

        Raises:
            UnknownSequenceError: No such sequence.
            SequenceError: `start` and `end` are no range.
        """
        sequence = self._get(sequence_id)
        if not 0 <= start <= end:
            raise SequenceError(f"sequence {sequence_id!r}: [{start}, {end}) is no range of slots")
        blocks, table, num_blocks = self._blocks, sequence.table, -(-end // self.block_size)
        num_held = len(table)
        shared: list[int] = []
        for index in range(start // self.block_size, num_blocks if num_blocks < num_held else num_held):
            block = blocks[table[index]]
            if block.ref_count > 1 or block.content is not None:
                shared.append(index)
        copies: list[BlockCopy] = []
        if num_blocks > num_held or shared:
            if max(num_blocks - num_held, 0) + len(shared) > self._free_queue.num_blocks:
                return None
            self._just_opened = None
            copies = [self._copy_on_write(sequence, index) for index in shared]
            table.extend([self._take_free_block().block_id for _ in range(num_blocks - num_held)])
            if self.tiers is not None:
                if copies:
                    self.tiers.suspend()
                self._fetch_stored_pages(self.tiers, sequence, table[num_held:])
        if sequence.num_queried:
            self._count_admission(sequence)
        return copies

    def publish(self, sequence_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> None:
        """Lets others find the pages that are full and computed by now.

        A page whose content another sequence published in the meantime is given back, and the other's page takes its
        place in the block table: two sequences that computed the same prefix in the same step end up sharing it.

        Args:
            sequence_id: The sequence.
            token_ids: Its tokens; at least the computed ones.
            num_computed_tokens: Leading tokens whose keys and values are in the pages, in every layer.

        Raises:
            UnknownSequenceError: No such sequence.
            SequenceError: More is said to be computed than there are tokens or slots, or the tokens of a page that
                is published already have changed without `reserve`.
        """
        sequence = self._get(sequence_id)
        if num_computed_tokens // self.block_size > sequence.num_published and self.enable_prefix_caching:
            if num_computed_tokens > min(len(token_ids), len(sequence.table) * self.block_size):
                raise SequenceError(
                    f"sequence {sequence_id!r} has {len(token_ids)} tokens and {len(sequence.table)} pages of "
                    f"{self.block_size}; {num_computed_tokens} tokens cannot be computed"
                )
            self._publish_pages(sequence, token_ids, num_computed_tokens // self.block_size)

    def fork(self, parent_id: str, child_id: str) -> None:
        """Starts a sequence that shares all pages of another; whoever writes into a shared page first copies it.

        Raises:
            UnknownSequenceError: No such parent.
            DuplicateSequenceError: The child's id is open already.
        """
        parent = self._get(parent_id)
        if child_id in self._sequences:
            raise DuplicateSequenceError(child_id)
        child = _Sequence(parent.salt, num_queried=0)
        child.table = parent.table.copy()
        child.num_published = parent.num_published
        for block_id in child.table:
            self._hold(self._blocks[block_id])
        self._sequences[child_id] = child
        self._just_opened = None

    def truncate(self, sequence_id: str, num_tokens: int) -> None:
        """Forgets all tokens but the first `num_tokens` and gives back the pages that no longer hold any.

        Raises:
            UnknownSequenceError: No such sequence.
            SequenceError: It does not have that many slots.
        """
        sequence = self._get(sequence_id)
        num_kept = num_blocks_for(num_tokens, self.block_size)
        if not 0 <= num_kept <= len(sequence.table):
            raise SequenceError(
                f"sequence {sequence_id!r} cannot be truncated to {num_tokens} tokens: "
                f"it has {len(sequence.table)} pages of {self.block_size}"
            )
        self._release(sequence.table[num_kept:])
        del sequence.table[num_kept:]
        sequence.num_published = min(sequence.num_published, num_tokens // self.block_size)
        self._just_opened = None

    def save(self, sequence_id: str, token_ids: Sequence[int], num_computed_tokens: int) -> bool:
        """Keeps in a tier what would be lost with `free`, for when the sequence is opened again.

        Published pages need no saving: they stay findable, and move to a tier when they are evicted.

        Args:
            sequence_id: A sequence that no step on its way writes to.
            token_ids: Its tokens.
            num_computed_tokens: Leading tokens whose keys and values are in the pages.

        Returns:
            Whether its private pages are kept; False without tiers, and where computing them again is cheaper.

        Raises:
            UnknownSequenceError: No such sequence.
        """
        sequence = self._get(sequence_id)
        first, end = sequence.num_published, num_blocks_for(num_computed_tokens, self.block_size)
        table = sequence.table[first:end]
        if self.tiers is None or not table or any(self._blocks[block_id].content for block_id in table):
            return False
        pages, parent = [], self._last_published(sequence)
        for index, block_id in enumerate(table, start=first):
            start = index * self.block_size
            tokens = tuple(token_ids[start : min(start + self.block_size, num_computed_tokens)])
            parent = self._cache.new_content(parent, tokens, sequence.salt)
            pages.append((parent, block_id))
        return self.tiers.save(sequence_id, pages)

    def forget_saved(self, sequence_id: str) -> None:
        """Gives up what `save` kept; nothing happens if it kept nothing."""
        if self.tiers is not None:
            self.tiers.forget(sequence_id)

    def settle_swaps(self, first_swap: int, swaps: Sequence[Swap], lost: Sequence[int]) -> list[str]:
        """A step with these moves returned; `lost` are the numbers of those that could not read their page.

        Returns:
            Sequences with a page that did not come back.
        """
        if self.tiers is None or not swaps:
            return []
        broken = self.tiers.settle(first_swap, swaps, lost)
        if not broken:
            return []
        return [name for name, sequence in self._sequences.items() if not broken.isdisjoint(sequence.table)]

    def free(self, sequence_id: str) -> None:
        """Gives all pages of a sequence back; published ones stay findable until their room is needed.

        Raises:
            UnknownSequenceError: No such sequence; it may have been freed before.
        """
        sequence = self._get(sequence_id)
        del self._sequences[sequence_id]
        if sequence.awaited and self.tiers is not None:
            self.tiers.unpin(sequence.awaited)
        self._release(sequence.table, undo=sequence is self._just_opened)
        self._just_opened = None

    def reset_prefix_cache(self) -> bool:
        """Forgets all published pages, for instance because the weights changed; False if any page is in use."""
        if self._free_queue.num_blocks < self.num_blocks:
            return False
        self._cache.clear()
        if self.tiers is not None:
            self.tiers.clear()
        return True

    # -- Checking --------------------------------------------------------------------------------

    def check_invariants(self) -> None:
        """Asserts that the books balance; walks over everything, for tests and for idle moments."""
        holders = Counter(block_id for sequence in self._sequences.values() for block_id in sequence.table)
        usable = self._blocks[FIRST_BLOCK:]
        for block in self._blocks:
            assert block.ref_count == holders[block.block_id], f"{block} is held {holders[block.block_id]} times"
        free = [block.block_id for block in self._free_queue]
        assert len(free) == len(set(free)) == self.num_free_blocks, "the free queue miscounts"
        assert set(free) == {block.block_id for block in usable if block.ref_count == 0}, "free is not unused"
        assert len(free) + len(holders) == self.num_blocks, "free + used pages are not all pages"
        assert set(self._cache) == {block for block in self._blocks if block.content}, "published pages are misfiled"
        self._cache.check_invariants()
        if self.tiers is not None:
            self.tiers.check_invariants()
            contents = {block.content.content_id: block.content for block in self._cache if block.content}
            for page in (*self.tiers.host, *self.tiers.disk):
                known = contents.get(page.content.content_id, page.content)
                assert known == page.content, f"{page} shares its id with another content"
        for sequence_id, sequence in self._sequences.items():
            self._check_sequence(sequence_id, sequence)

    def _check_sequence(self, sequence_id: str, sequence: _Sequence) -> None:
        assert len(set(sequence.table)) == len(sequence.table), f"{sequence_id!r} holds a page twice"
        assert sequence.num_published <= len(sequence.table), f"{sequence_id!r} published what it does not hold"
        parent_id = 0
        for block_id in sequence.table[: sequence.num_published]:
            content = self._blocks[block_id].content
            assert content is not None, f"{sequence_id!r} counts the private page {block_id} as published"
            assert content.parent_id == parent_id, f"page {block_id} of {sequence_id!r} stands in a wrong chain"
            assert content.salt == sequence.salt, f"page {block_id} of {sequence_id!r} has another salt"
            assert len(content.tokens) == self.block_size, f"page {block_id} was published before it was full"
            parent_id = content.content_id

    # -- Moving pages ----------------------------------------------------------------------------

    def _get(self, sequence_id: str) -> _Sequence:
        try:
            return self._sequences[sequence_id]
        except KeyError:
            raise UnknownSequenceError(sequence_id) from None

    def _hold_cached_prefix(self, sequence: _Sequence, token_ids: Sequence[int]) -> None:
        size, parent = self.block_size, None
        for start in range(0, len(token_ids) - size, size):
            block = self._cache.find(parent, tuple(token_ids[start : start + size]), sequence.salt)
            if block is None:
                break
            self._hold(block)
            sequence.table.append(block.block_id)
            parent = block.content
        sequence.num_published = len(sequence.table)

    def _await_stored_pages(
        self, tiers: PageTiers, sequence_id: str, sequence: _Sequence, token_ids: Sequence[int]
    ) -> None:
        """Continues the prefix with pages of a tier, which stay there until `reserve` has a place for them."""
        size, parent, pages = self.block_size, self._last_published(sequence), []
        begin = start = sequence.num_published * size
        while self.enable_prefix_caching and start + size < len(token_ids):
            tokens = tuple(token_ids[start : start + size])
            page_hash = self._cache.hash_of(parent, tokens, sequence.salt)
            page = tiers.find(parent, tokens, sequence.salt, page_hash=page_hash)
            if page is None:
                break
            pages.append(page)
            parent, start = page.content, start + size
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

    def _fetch_stored_pages(self, tiers: PageTiers, sequence: _Sequence, block_ids: Sequence[int]) -> None:
        """Plans the way back of what was found, into the first of the pages that were just taken."""
        pages, sequence.awaited, sequence.num_awaited_tokens = sequence.awaited, [], 0
        tiers.unpin(pages)
        for page, block_id in zip(pages, block_ids, strict=False):
            tiers.fetch(page, block_id)
            if sequence.num_queried:
                num_tokens = len(page.content.tokens)
                self.stats.hits += num_tokens
                if page.level is tiers.host:
                    self.stats.host_hits += num_tokens
                else:
                    self.stats.disk_hits += num_tokens
        if pages and pages[-1].owner is not None:
            tiers.forget(pages[-1].owner)

    def _count_admission(self, sequence: _Sequence) -> None:
        self.stats.queries += sequence.num_queried
        self.stats.hits += sequence.num_published * self.block_size
        sequence.num_queried = 0

    def _publish_pages(self, sequence: _Sequence, token_ids: Sequence[int], num_full: int) -> None:
        size, table = self.block_size, sequence.table
        parent = self._last_published(sequence)
        for index in range(sequence.num_published, num_full):
            block = self._blocks[table[index]]
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            keeper = self._publish_page(block, parent, tokens, sequence.salt)
            if keeper is None:  # a hash collision: the page stays private, and so do those behind it
                return
            if keeper is not block:
                self._hold(keeper)
                table[index] = keeper.block_id
                self._release([block.block_id])
                self._just_opened = None
            sequence.num_published = index + 1
            parent = keeper.content

    def _publish_page(
        self, block: Block, parent: PageContent | None, tokens: tuple[int, ...], salt: str
    ) -> Block | None:
        if block.content is None:
            return self._cache.add(block, parent, tokens, salt, known=self._known_content(parent, tokens, salt))
        if not block.content.holds(parent, tokens, salt):
            raise SequenceError(f"page {block.block_id} is published with other tokens; reserve() before writing")
        return block  # a fork published it, or it was truncated and not written since

    def _known_content(self, parent: PageContent | None, tokens: tuple[int, ...], salt: str) -> PageContent | None:
        if self.tiers is None:
            return None
        page = self.tiers.find(parent, tokens, salt, page_hash=self._cache.hash_of(parent, tokens, salt))
        return None if page is None else page.content

    def _last_published(self, sequence: _Sequence) -> PageContent | None:
        if not sequence.num_published:
            return None
        return self._blocks[sequence.table[sequence.num_published - 1]].content

    def _copy_on_write(self, sequence: _Sequence, index: int) -> BlockCopy:
        source = sequence.table[index]
        destination = self._take_free_block().block_id
        sequence.table[index] = destination
        sequence.num_published = min(sequence.num_published, index)
        self._release([source])
        return BlockCopy(source, destination)

    def _take_free_block(self) -> Block:
        block = self._free_queue.pop_front()
        if self.tiers is not None:
            self.tiers.retake(block.block_id)
            if block.content is not None:
                self.tiers.store(block.content, block.block_id)
        if block.content is not None:
            self._cache.remove(block)
            self.stats.evictions += 1
        block.ref_count = 1
        return block

    def _hold(self, block: Block) -> None:
        if block.ref_count == 0:
            self._free_queue.remove(block)
        block.ref_count += 1

    def _release(self, block_ids: Sequence[int], *, undo: bool = False) -> None:
        """Lets go of pages, the last one first: the end of a prefix is worth less than its beginning."""
        for block_id in reversed(block_ids):
            block = self._blocks[block_id]
            block.ref_count -= 1
            if block.ref_count:
                continue
            if undo:
                self._free_queue.put_back(block)
            elif block.content is None:  # worth nothing to anyone: used next, while it is still warm
                self._free_queue.push_front(block)
            else:
                self._free_queue.push_back(block)


class _Sequence:
    """One sequence's pages.

    Attributes:
        table: Page ids in the order of the tokens.
        num_published: Leading pages that are published; their contents form one chain.
        num_queried: Tokens with which it was opened, until its admission has been counted.
        awaited: Pages of a tier that continue the published ones, until `reserve` plans their way back.
        num_awaited_tokens: Tokens in those.
    """

    __slots__ = ("awaited", "num_awaited_tokens", "num_published", "num_queried", "salt", "table")

    def __init__(self, salt: str, *, num_queried: int) -> None:
        self.table: list[int] = []
        self.salt = salt
        self.num_published = 0
        self.num_queried = num_queried
        self.awaited: list[StoredPage] = []
        self.num_awaited_tokens = 0
