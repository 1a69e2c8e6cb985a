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

`fork` starts one with what another computed already, down to the token.

With tiers below the pool (`tiers.py`), pages that are evicted move there, `open` finds them there, and `reserve` plans
their way back. Changes are told to those who listen (`page_events.py`).
The scheduler is the only caller, from one thread; nothing here is locked.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from aios_kvcache.block import Block, BlockCopy, PageContent
from aios_kvcache.block_pool import BlockPool
from aios_kvcache.errors import DuplicateSequenceError, SequenceError, UnknownSequenceError
from aios_kvcache.invariants import check_books
from aios_kvcache.layout import num_blocks_for
from aios_kvcache.page_events import Copied, Forked, Found, Held, PageEventStream, Published, Released, Reset, Taken
from aios_kvcache.page_states import PageStates
from aios_kvcache.prefix_cache import PageHash, PrefixCacheStats
from aios_kvcache.sequence_pages import SequencePages
from aios_kvcache.stored_prefix import await_stored_pages, fetch_stored_pages, known_content, save_pages
from aios_kvcache.swap import Swap
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

    Attributes:
        events: Tells whoever listens what happens to pages; `PageRecorder` does.

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
        self.tiers = tiers
        self._pool = BlockPool(num_blocks=num_blocks, hash_function=hash_function, tiers=tiers)
        self.events: PageEventStream = self._pool.events
        self._sequences: dict[str, SequencePages] = {}
        self._just_opened: SequencePages | None = None  # nothing else has changed since it was opened

    # -- Reading ---------------------------------------------------------------------------------

    @property
    def stats(self) -> PrefixCacheStats:
        """What the prefix cache found, and what was evicted."""
        return self._pool.stats

    @property
    def num_free_blocks(self) -> int:
        """Pages that `reserve` can take: unused ones, and cached ones that no sequence holds."""
        return self._pool.free_queue.num_blocks

    @property
    def num_cached_blocks(self) -> int:
        """Pages that the prefix cache can find, held by a sequence or not."""
        return len(self._pool.cache)

    @property
    def usage(self) -> float:
        """Share of the pages that sequences hold, 0 to 1."""
        return 1.0 - self._pool.free_queue.num_blocks / self.num_blocks

    def can_fit(self, num_tokens: int) -> bool:
        """Whether a sequence of so many tokens fits into the pool when it has the pool to itself."""
        return num_blocks_for(num_tokens, self.block_size) <= self.num_blocks

    def count_cached_tokens(self, token_ids: Sequence[int], *, salt: str = "") -> int:
        """How many leading tokens `open` would find in the cache now; changes nothing, stops at the first miss."""
        size, parent = self.block_size, None
        if not self.enable_prefix_caching:
            return 0
        for start in range(0, len(token_ids) - size, size):
            block = self._pool.cache.find(parent, tuple(token_ids[start : start + size]), salt)
            if block is None:
                return start
            parent = block.content
        return (len(token_ids) - 1) // size * size

    def block_table(self, sequence_id: str) -> list[int]:
        """The sequence's pages in the order of its tokens; a copy, which a step's plan may keep."""
        return self._get(sequence_id).table.copy()

    def page_states(self) -> PageStates:
        """Whose each page is and what is to be found, as the events so far left it; walks over everything."""
        states = PageStates(self.num_blocks)
        for sequence_id, sequence in self._sequences.items():
            for block_id in sequence.table:
                states.owners[block_id] += (sequence_id,)
        for block in self._pool.cache:
            states.contents[block.block_id] = block.content.content_id if block.content else 0
        for page in () if self.tiers is None else (*self.tiers.host, *self.tiers.disk):
            states.stored[page.content.content_id] = page.level.name, page.slot
        return states

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
        sequence = SequencePages(sequence_id, salt, num_queried=len(token_ids))
        self._sequences[sequence_id] = sequence
        if self.enable_prefix_caching:
            self._hold_cached_prefix(sequence, token_ids)
        if self.tiers is not None and use_tiers and not self.tiers.is_suspended:
            await_stored_pages(
                self._pool,
                self.tiers,
                sequence_id,
                sequence,
                token_ids,
                block_size=self.block_size,
                by_content=self.enable_prefix_caching,
            )
        self._just_opened = sequence
        sequence.num_found = sequence.num_published * self.block_size
        return sequence.num_found + sequence.num_awaited_tokens

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
        blocks, table, num_blocks = self._pool.blocks, sequence.table, -(-end // self.block_size)
        num_held = len(table)
        shared: list[int] = []
        for index in range(start // self.block_size, num_blocks if num_blocks < num_held else num_held):
            block = blocks[table[index]]
            if block.ref_count > 1 or block.content is not None:
                shared.append(index)
        copies: list[BlockCopy] = []
        if num_blocks > num_held or shared:
            if max(num_blocks - num_held, 0) + len(shared) > self._pool.free_queue.num_blocks:
                return None
            copies = self._take_pages(sequence, shared, num_blocks - num_held)
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

    def fork(self, parent_id: str, child_id: str, *, num_tokens: int | None = None, num_queried: int = 0) -> None:
        """Starts a sequence that shares the pages of another; whoever writes into a shared page first copies it.

        Args:
            parent_id: A sequence.
            child_id: A name that no open sequence has.
            num_tokens: How many leading tokens they have in common, computed by the parent; None shares all its pages.
            num_queried: Tokens of the child for the statistics of the prefix cache, where the fork stands in for
                `open`; 0 counts nothing.

        Raises:
            UnknownSequenceError: No such parent.
            DuplicateSequenceError: The child's id is open already.
            SequenceError: The parent has fewer slots than `num_tokens`.
        """
        parent = self._get(parent_id)
        if child_id in self._sequences:
            raise DuplicateSequenceError(child_id)
        size, num_slots = self.block_size, len(parent.table) * self.block_size
        num_tokens = num_slots if num_tokens is None else num_tokens
        if not 0 <= num_tokens <= num_slots:
            raise SequenceError(f"sequence {parent_id!r} has {num_slots} slots, which cannot share {num_tokens} tokens")
        child = SequencePages(child_id, parent.salt, num_queried=num_queried)
        child.table = parent.table[: num_blocks_for(num_tokens, size)]
        child.num_published = min(parent.num_published, num_tokens // size)
        child.num_found = num_tokens
        for block_id in child.table:
            self._pool.hold(self._pool.blocks[block_id])
        self._sequences[child_id] = child
        self._just_opened = None
        if self.events.is_watched:
            self.events.emit(Forked(parent_id, child_id, tuple(child.table), num_tokens))

    def can_share(self, sequence_id: str, num_tokens: int) -> bool:
        """Whether the pages of a sequence's first tokens can be forked: none of them is still on its way from a tier.

        Raises:
            UnknownSequenceError: No such sequence.
        """
        table = self._get(sequence_id).table[: num_blocks_for(num_tokens, self.block_size)]
        return self.tiers is None or not any(map(self.tiers.is_arriving, table))

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
        dropped = sequence.table[num_kept:]
        self._pool.release(dropped)
        del sequence.table[num_kept:]
        sequence.num_published = min(sequence.num_published, num_tokens // self.block_size)
        self._just_opened = None
        if self.events.is_watched and dropped:
            self.events.emit(Released(sequence_id, tuple(dropped)))

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
        if self.tiers is None:
            return False
        token_ids = token_ids[:num_computed_tokens]
        return save_pages(self._pool, self.tiers, sequence_id, sequence, token_ids, block_size=self.block_size)

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
        return self.holders(self.tiers.settle(first_swap, swaps, lost))

    def holders(self, block_ids: Set[int]) -> list[str]:
        """The sequences that hold any of these pages."""
        if not block_ids:
            return []
        return [name for name, sequence in self._sequences.items() if not block_ids.isdisjoint(sequence.table)]

    def free(self, sequence_id: str) -> None:
        """Gives all pages of a sequence back; published ones stay findable until their room is needed.

        Raises:
            UnknownSequenceError: No such sequence; it may have been freed before.
        """
        sequence = self._get(sequence_id)
        del self._sequences[sequence_id]
        if sequence.awaited and self.tiers is not None:
            self.tiers.unpin(sequence.awaited)
        self._pool.release(sequence.table, undo=sequence is self._just_opened)
        self._just_opened = None
        if self.events.is_watched and sequence.table:
            self.events.emit(Released(sequence_id, tuple(sequence.table)))

    def reset_prefix_cache(self) -> bool:
        """Forgets all published pages, for instance because the weights changed; False if any page is in use."""
        if self._pool.free_queue.num_blocks < self.num_blocks:
            return False
        self._pool.cache.clear()
        if self.events.is_watched:
            self.events.emit(Reset())
        if self.tiers is not None:
            self.tiers.clear()
        return True

    def check_invariants(self) -> None:
        """Asserts that the books balance; walks over everything, for tests and for idle moments."""
        check_books(self._pool, self._sequences, block_size=self.block_size)

    # -- Moving pages ----------------------------------------------------------------------------

    def _get(self, sequence_id: str) -> SequencePages:
        try:
            return self._sequences[sequence_id]
        except KeyError:
            raise UnknownSequenceError(sequence_id) from None

    def _take_pages(self, sequence: SequencePages, shared: Sequence[int], num_new: int) -> list[BlockCopy]:
        """Replaces the pages at the indexes `shared` by copies, and appends new ones."""
        self._just_opened = None
        pool = self._pool
        copies = [self._copy_on_write(sequence, index) for index in shared]
        new = [pool.take().block_id for _ in range(num_new)]
        sequence.table += new
        if self.events.is_watched and new:
            self.events.emit(Taken(sequence.sequence_id, tuple(new)))
        if self.tiers is not None:
            if copies:
                self.tiers.suspend()
            fetch_stored_pages(pool, self.tiers, sequence, new)
        return copies

    def _hold_cached_prefix(self, sequence: SequencePages, token_ids: Sequence[int]) -> None:
        size, parent = self.block_size, None
        for start in range(0, len(token_ids) - size, size):
            block = self._pool.cache.find(parent, tuple(token_ids[start : start + size]), sequence.salt)
            if block is None:
                break
            self._pool.hold(block)
            sequence.table.append(block.block_id)
            parent = block.content
        sequence.num_published = len(sequence.table)
        if self.events.is_watched and sequence.table:
            self._tell_held(sequence.sequence_id, sequence.table)

    def _count_admission(self, sequence: SequencePages) -> None:
        self._pool.stats.queries += sequence.num_queried
        self._pool.stats.hits += sequence.num_found
        if self.events.is_watched:
            stored = sequence.num_awaited_tokens
            self.events.emit(Found(sequence.sequence_id, sequence.num_queried, sequence.num_found, stored))
        sequence.num_queried = 0

    def _publish_pages(self, sequence: SequencePages, token_ids: Sequence[int], num_full: int) -> None:
        size, table, blocks = self.block_size, sequence.table, self._pool.blocks
        parent = self._pool.last_published(sequence)
        for index in range(sequence.num_published, num_full):
            block = blocks[table[index]]
            tokens = tuple(token_ids[index * size : (index + 1) * size])
            keeper = self._publish_page(block, parent, tokens, sequence.salt)
            if keeper is None:  # a hash collision: the page stays private, and so do those behind it
                return
            if keeper is not block:
                self._pool.hold(keeper)
                table[index] = keeper.block_id
                if self.events.is_watched:
                    self._tell_held(sequence.sequence_id, [keeper.block_id])
                self._pool.release([block.block_id])
                self._just_opened = None
                if self.events.is_watched:
                    self.events.emit(Released(sequence.sequence_id, (block.block_id,)))
            sequence.num_published = index + 1
            parent = keeper.content

    def _publish_page(
        self, block: Block, parent: PageContent | None, tokens: tuple[int, ...], salt: str
    ) -> Block | None:
        if block.content is None:
            known = None if self.tiers is None else known_content(self._pool, self.tiers, parent, tokens, salt)
            keeper = self._pool.cache.add(block, parent, tokens, salt, known=known)
            if self.events.is_watched and block.content is not None:
                self.events.emit(Published(block.block_id, block.content.content_id, block.content.parent_id))
            return keeper
        if not block.content.holds(parent, tokens, salt):
            raise SequenceError(f"page {block.block_id} is published with other tokens; reserve() before writing")
        return block  # a fork published it, or it was truncated and not written since

    def _copy_on_write(self, sequence: SequencePages, index: int) -> BlockCopy:
        source = sequence.table[index]
        destination = self._pool.take().block_id
        sequence.table[index] = destination
        sequence.num_published = min(sequence.num_published, index)
        self._pool.release([source])
        if self.events.is_watched:
            self.events.emit(Copied(sequence.sequence_id, source, destination))
        return BlockCopy(source, destination)

    def _tell_held(self, sequence_id: str, block_ids: Sequence[int]) -> None:
        ref_counts = tuple(self._pool.blocks[block_id].ref_count for block_id in block_ids)
        self.events.emit(Held(sequence_id, tuple(block_ids), ref_counts))
