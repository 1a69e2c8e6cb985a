"""Which pages of a draft model hold what: the same block manager as the target's, with eviction instead of a scheduler.

Plain Python. Known tokens of a request never change, so what was computed stays valid up to the first draft that was
wrong; from there it is truncated and written again.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from aios_kvcache.block import BlockCopy
    from aios_kvcache.block_manager import BlockManager
    from aios_sched.speculative.base import DraftContext


class DraftPages:
    """Pages by request, taken from whoever drafted least recently when they run short.

    Args:
        block_manager: Hands them out.
    """

    def __init__(self, block_manager: BlockManager) -> None:
        self._blocks = block_manager
        self._sequences: OrderedDict[str, _Computed] = OrderedDict()  # who drafted last is last
        self._copies: list[BlockCopy] = []

    @property
    def num_requests(self) -> int:
        """Requests that have pages."""
        return len(self._sequences)

    def open(self, context: DraftContext) -> int:
        """Finds or begins a request's pages; returns how many leading tokens are computed: not the last one.

        What was computed of drafts that turned out to be wrong is truncated.
        """
        request_id, token_ids = context.request_id, context.token_ids
        computed = self._sequences.get(request_id)
        if computed is not None and computed.num_known > len(token_ids):  # another request of that name
            self.forget(request_id)
            computed = None
        if computed is None:
            num_cached = self._blocks.open(request_id, token_ids, salt=context.salt)
            computed = self._sequences[request_id] = _Computed(num_cached)
        self._sequences.move_to_end(request_id)
        before = computed.num_tokens
        computed.settle(token_ids)
        if computed.num_tokens < before:
            self._blocks.truncate(request_id, computed.num_tokens)
        return computed.num_tokens

    def reserve(self, request_id: str, *, start: int, end: int, kept: Collection[str]) -> bool:
        """Makes the slots up to `end` exist; if pages run short, takes those of others, but not of the `kept` ones.

        All that a text needs is reserved at once: requests with half of their pages would wait for each other for ever.

        Returns:
            Whether there is room; if not, the request has lost its own pages, too.
        """
        while (copies := self._blocks.reserve(request_id, start=start, end=end)) is None:
            victim = next((name for name in self._sequences if name not in kept and name != request_id), None)
            self.forget(request_id if victim is None else victim)
            if victim is None:
                return False
        self._copies += copies
        return True

    def take_copies(self) -> list[BlockCopy]:
        """Pages to copy before anything is written."""
        copies, self._copies = self._copies, []
        return copies

    def block_table(self, request_id: str) -> list[int]:
        """The request's pages, in the order of its tokens."""
        return self._blocks.block_table(request_id)

    def computed(self, context: DraftContext, num_tokens: int, drafts: Sequence[int]) -> None:
        """The first `num_tokens` of the known tokens and the drafts behind them are in the pages now."""
        computed = self._sequences[context.request_id]
        num_known = min(num_tokens, len(context.token_ids))
        computed.num_known, computed.drafts = num_known, list(drafts[: num_tokens - num_known])
        # Drafts may be wrong: no other request may find them.
        self._blocks.publish(context.request_id, context.token_ids, num_known)

    def forget(self, request_id: str) -> None:
        """Gives a request's pages back; unknown ids are ignored."""
        if self._sequences.pop(request_id, None) is not None:
            self._blocks.free(request_id)

    def clear(self) -> None:
        """Gives all pages back."""
        for request_id in list(self._sequences):
            self.forget(request_id)


class _Computed:
    """What of a request is in its pages: known tokens, and drafts behind them."""

    __slots__ = ("drafts", "num_known")

    def __init__(self, num_known: int) -> None:
        self.num_known = num_known
        self.drafts: list[int] = []

    @property
    def num_tokens(self) -> int:
        return self.num_known + len(self.drafts)

    def settle(self, token_ids: Sequence[int]) -> None:
        """Compares the drafts with what came in their place; keeps those that were right, less the last token."""
        came = token_ids[self.num_known : self.num_known + len(self.drafts)]
        right = next((place for place, token in enumerate(came) if token != self.drafts[place]), len(came))
        self.num_known = min(self.num_known + right, len(token_ids) - 1)
        self.drafts = []
