"""How much each replica has to do, as far as the router knows, and who has the least."""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import count
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(slots=True, kw_only=True, eq=False)
class ReplicaLoad:
    """What one replica has to do.

    Attributes:
        replica: Its number.
        num_tokens: Outstanding tokens: of prompts not computed yet, and of outputs expected.
        num_requests: Open requests.
        last_turn: When it was last given one, as a count over all replicas.
    """

    replica: int
    num_tokens: int = 0
    num_requests: int = 0
    last_turn: int = 0

    @property
    def rank(self) -> tuple[int, int, int]:
        """Sorts the least loaded first; of equals the one whose turn was the longest ago."""
        return self.num_tokens, self.num_requests, self.last_turn


class ReplicaLoads:
    """The loads of all replicas. Changing one and finding the least takes logarithmic time."""

    def __init__(self) -> None:
        self._loads: dict[int, ReplicaLoad] = {}
        # Entries whose rank is not that of their load any more are skipped when they come to the top.
        self._heap: list[tuple[tuple[int, int, int], int, ReplicaLoad]] = []
        self._serial = count()  # loads themselves cannot be compared
        self._num_turns = 0

    def __len__(self) -> int:
        return len(self._loads)

    def __iter__(self) -> Iterator[int]:
        return iter(self._loads)

    def __contains__(self, replica: int) -> bool:
        return replica in self._loads

    def __getitem__(self, replica: int) -> ReplicaLoad:
        return self._loads[replica]

    def add(self, replica: int) -> None:
        """A replica with nothing to do."""
        assert replica not in self._loads, f"replica {replica} is there already"
        load = self._loads[replica] = ReplicaLoad(replica=replica)
        self._push(load)

    def remove(self, replica: int) -> None:
        """Forget a replica. Whoever still holds its ReplicaLoad may go on changing it: it no longer counts."""
        del self._loads[replica]

    def take(self, load: ReplicaLoad, num_tokens: int) -> None:
        """It is given a request that will cost so many tokens."""
        self._num_turns += 1
        load.num_tokens += num_tokens
        load.num_requests += 1
        load.last_turn = self._num_turns
        self._push(load)

    def give_back(self, load: ReplicaLoad, num_tokens: int, *, finished: bool) -> None:
        """So many tokens are no longer outstanding, and perhaps the request is `finished`."""
        load.num_tokens -= num_tokens
        load.num_requests -= finished
        assert load.num_tokens >= 0, f"{load} has less than nothing to do"
        assert load.num_requests >= 0, f"{load} has less than nothing to do"
        self._push(load)

    def least(self) -> ReplicaLoad | None:
        """Who has the least to do; None if there is no replica."""
        while self._heap:
            rank, _, load = self._heap[0]
            if load.rank == rank and self._loads.get(load.replica) is load:
                return load
            heappop(self._heap)
        return None

    def _push(self, load: ReplicaLoad) -> None:
        if self._loads.get(load.replica) is not load:
            return
        if len(self._heap) > 4 * len(self._loads) + 64:
            self._heap = [(each.rank, next(self._serial), each) for each in self._loads.values()]
            heapify(self._heap)
        else:
            heappush(self._heap, (load.rank, next(self._serial), load))
