"""Who has computed the longest prefix of this prompt? It need not be computed twice, unless waiting costs more.

The router cannot see the caches of the replicas, but it knows which prompts it sent where. Prompts are cut into blocks
and named by chained hashes, as pages are (`aios_kvcache.prefix_cache`). Here a hash is believed: a collision sends a
request to a replica that has to compute its prompt, and nothing worse.
"""

from __future__ import annotations

from collections import OrderedDict
from itertools import islice
from typing import TYPE_CHECKING

from aios_sched.routing.base import Choice

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_sched.routing.base import RoutedRequest
    from aios_sched.routing.loads import ReplicaLoad, ReplicaLoads

_MOST_COMPARED = 32
"""Of the replicas that hold the same prefix, those whose loads are compared."""


class PrefixAffinity:
    """The replica whose recent prompts share the longest prefix, unless it is overloaded.

    Overloaded means: it has more outstanding tokens than the least loaded replica, by more than the prefix saves plus
    `slack_tokens`. Among equals the less loaded one is taken; a prompt that nobody knows goes to the least loaded.

    A decision costs time proportional to the blocks of the prompt, and does not grow with the number of replicas.

    Args:
        loads: Who has how much to do.
        block_size: Tokens per block.
        max_blocks: Blocks remembered per replica, the least recently used forgotten first: about what its cache holds.
        max_prompt_blocks: Blocks of a prompt that are looked at; a longer prompt is told by its beginning.
        slack_tokens: Imbalance that is tolerated beyond what the prefix saves.
    """

    def __init__(
        self,
        loads: ReplicaLoads,
        *,
        block_size: int = 16,
        max_blocks: int = 16384,
        max_prompt_blocks: int = 512,
        slack_tokens: int = 64,
    ) -> None:
        self._loads = loads
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._max_prompt_blocks = min(max_prompt_blocks, max_blocks)
        self._slack_tokens = slack_tokens
        self._recent: dict[int, OrderedDict[int, None]] = {}  # per replica its blocks, least recently used first
        self._holders: dict[int, dict[int, None]] = {}  # per block its replicas, the one longest not chosen first

    def add(self, replica: int) -> None:
        """It has computed nothing yet."""
        self._recent[replica] = OrderedDict()

    def remove(self, replica: int) -> None:
        """What it has computed is lost."""
        for block in self._recent.pop(replica):
            self._forget(block, replica)

    def choose(self, request: RoutedRequest) -> Choice | None:
        """The replica that has the longest prefix, or the least loaded one."""
        least = self._loads.least()
        if least is None:
            return None
        blocks = self._blocks(request)
        chosen, num_blocks = self._best_holder(blocks, least)
        saved = num_blocks * self._block_size
        if chosen is not least and chosen.num_tokens > least.num_tokens + saved + self._slack_tokens:
            chosen, saved = least, self._num_leading(blocks, least.replica) * self._block_size
        self._remember(blocks, chosen.replica)
        return Choice(chosen.replica, saved)

    def _best_holder(self, blocks: Sequence[int], least: ReplicaLoad) -> tuple[ReplicaLoad, int]:
        """The least loaded of those that hold the longest prefix, and its blocks; `least` and 0 if nobody holds any."""
        for depth in range(len(blocks), 0, -1):
            holders = self._holders.get(blocks[depth - 1])
            if not holders:
                continue
            # Everybody may hold a popular prefix. The least loaded of all is the least loaded of those, too.
            best = least
            if least.replica not in holders:
                best = min((self._loads[each] for each in islice(holders, _MOST_COMPARED)), key=lambda load: load.rank)
            del holders[best.replica]
            holders[best.replica] = None
            return best, depth
        return least, 0

    def _num_leading(self, blocks: Sequence[int], replica: int) -> int:
        """How many blocks of the prompt the replica holds, from the first on."""
        held = self._recent[replica]
        return next((number for number, block in enumerate(blocks) if block not in held), len(blocks))

    def _remember(self, blocks: Sequence[int], replica: int) -> None:
        """From the last to the first, so that a prefix is never forgotten before what follows it."""
        recent = self._recent[replica]
        for block in reversed(blocks):
            if block in recent:
                recent.move_to_end(block)
            else:
                recent[block] = None
                self._holders.setdefault(block, {})[replica] = None
        while len(recent) > self._max_blocks:
            block, _ = recent.popitem(last=False)
            self._forget(block, replica)

    def _forget(self, block: int, replica: int) -> None:
        holders = self._holders[block]
        del holders[replica]
        if not holders:
            del self._holders[block]

    def _blocks(self, request: RoutedRequest) -> list[int]:
        """A name for each full block of the prompt, which stands for all tokens up to its end."""
        token_ids, size = request.prompt_token_ids, self._block_size
        # The last token is always computed, cached or not.
        num_blocks = min((len(token_ids) - 1) // size, self._max_prompt_blocks)
        name, names = hash(request.cache_salt), []
        for start in range(0, num_blocks * size, size):
            name = hash((name, *token_ids[start : start + size]))
            names.append(name)
        return names

    def check_invariants(self) -> None:
        """Asserts that both maps agree, and that nobody remembers too much."""
        assert set(self._recent) == set(self._loads), "it knows other replicas than there are"
        by_block = {(block, replica) for block, holders in self._holders.items() for replica in holders}
        by_replica = {(block, replica) for replica, blocks in self._recent.items() for block in blocks}
        assert by_block == by_replica, "blocks and replicas disagree"
        assert all(self._holders.values()), "a block without holders is kept"
        assert all(len(blocks) <= self._max_blocks for blocks in self._recent.values()), "too much is remembered"
