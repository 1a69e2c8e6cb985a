"""One page of the pool, and the queue in which free pages wait.

A page is what operating systems call a frame: room for `block_size` tokens' keys and values, in every layer at once.
This file only keeps the books; the numbers themselves lie in `paged_cache.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class PageContent(NamedTuple):
    """What a published page holds; it never changes while the page carries it.

    Attributes:
        content_id: Unique among all contents ever published, from 1.
        parent_id: Content id of the page before it in the sequence; 0 for the first page.
        tokens: The `block_size` tokens whose keys and values the page holds.
        salt: Only sequences of the same salt may share the page.
        page_hash: Where the prefix cache files it.
    """

    content_id: int
    parent_id: int
    tokens: tuple[int, ...]
    salt: str
    page_hash: int

    def holds(self, parent: PageContent | None, tokens: tuple[int, ...], salt: str) -> bool:
        """Whether this is exactly `tokens` behind exactly that parent (None: at the start), for that salt."""
        parent_id = 0 if parent is None else parent.content_id
        return self.parent_id == parent_id and self.tokens == tokens and self.salt == salt


class Block:
    """One page.

    Attributes:
        block_id: Its number; the pool tensors are indexed with it.
        ref_count: How many sequences' block tables hold it.
        content: What the prefix cache may hand out; None while the page is private.
        previous: Neighbour in the free queue; meaningless while the page is in use.
        next: Neighbour in the free queue; meaningless while the page is in use.
    """

    __slots__ = ("block_id", "content", "next", "previous", "ref_count")

    def __init__(self, block_id: int) -> None:
        self.block_id = block_id
        self.ref_count = 0
        self.content: PageContent | None = None
        self.previous: Block = self
        self.next: Block = self

    def __repr__(self) -> str:
        content = self.content.content_id if self.content else None
        return f"Block({self.block_id}, ref_count={self.ref_count}, content={content})"


@dataclass(frozen=True, slots=True)
class BlockCopy:
    """A page to be copied before the step runs: copy-on-write. A step's copies happen in the order of their list."""

    source: int
    destination: int


def independent_waves(copies: Sequence[BlockCopy]) -> list[list[BlockCopy]]:
    """Cuts a step's copies where one touches what an earlier one of the same wave wrote: a wave's may run together."""
    waves: list[list[BlockCopy]] = []
    written: set[int] = set()
    for copy in copies:
        if not waves or copy.source in written or copy.destination in written:
            waves.append([])
            written = set()
        waves[-1].append(copy)
        written.add(copy.destination)
    return waves


class FreeQueue:
    """Free pages from the one to be used next to the one used last, as a doubly linked ring.

    The links live in the pages, so that a page which the prefix cache finds leaves from the middle in constant time.

    Args:
        blocks: The pages, all of them free, in the order in which they are to be used.
    """

    __slots__ = ("_ring", "num_blocks")

    def __init__(self, blocks: Iterable[Block]) -> None:
        self._ring = Block(-1)  # stands between the last page and the first, so that no link is ever None
        self.num_blocks = 0
        for block in blocks:
            self.push_back(block)

    def pop_front(self) -> Block:
        """Takes the page that was released longest ago."""
        block = self._ring.next
        assert block is not self._ring, "the free queue is empty"
        self.remove(block)
        return block

    def push_front(self, block: Block) -> None:
        """Puts a page where it is used next."""
        self._link(block, self._ring, self._ring.next)

    def push_back(self, block: Block) -> None:
        """Puts a page where it is used last."""
        self._link(block, self._ring.previous, self._ring)

    def remove(self, block: Block) -> None:
        """Takes a page out of wherever it stands; the page remembers its neighbours."""
        block.previous.next = block.next
        block.next.previous = block.previous
        self.num_blocks -= 1

    def put_back(self, block: Block) -> None:
        """Undoes `remove`, if everything since then has been undone as well, newest first (Knuth's dancing links)."""
        self._link(block, block.previous, block.next)

    def __iter__(self) -> Iterator[Block]:
        block = self._ring.next
        while block is not self._ring:
            assert block.next.previous is block, f"broken links around {block}"
            yield block
            block = block.next

    def _link(self, block: Block, previous: Block, following: Block) -> None:
        block.previous, block.next = previous, following
        previous.next = following.previous = block
        self.num_blocks += 1
