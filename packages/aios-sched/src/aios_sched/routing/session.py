"""One session, one replica: by rendezvous hashing (Thaler and Ravishankar, 1998)."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from hashlib import blake2b
from typing import TYPE_CHECKING

from aios_sched.routing.base import Choice

if TYPE_CHECKING:
    from aios_sched.routing.base import RoutedRequest
    from aios_sched.routing.loads import ReplicaLoads

_MASK = 2**64 - 1


class SessionAffinity:
    """Each session has a weight for each replica, and goes to the one with the largest.

    So a replica that leaves moves its own sessions and no others, and one that comes, or comes back, takes over only
    those for which it weighs most. The same session finds the same replica from any router that knows the same ones.
    Requests without a session go to the least loaded replica.

    Args:
        loads: Who is there, and has how much to do.
        max_sessions: Sessions whose replica is remembered; for others all weights are computed anew.
    """

    def __init__(self, loads: ReplicaLoads, *, max_sessions: int = 65536) -> None:
        self._loads = loads
        self._max_sessions = max_sessions
        self._homes: OrderedDict[str, _Home] = OrderedDict()
        self._arrivals: list[int] = []  # every `add` so far, so that a home knows who came since it was found

    def add(self, replica: int) -> None:
        """It takes over the sessions for which it weighs most, each when it is next seen."""
        self._arrivals.append(replica)
        if len(self._arrivals) > 64 + 4 * len(self._loads):
            self._arrivals.clear()
            self._homes.clear()

    def remove(self, replica: int) -> None:
        """Its sessions find another one when they are next seen."""

    def choose(self, request: RoutedRequest) -> Choice | None:
        """The replica of the session, or the least loaded one."""
        least = self._loads.least()
        if least is None:
            return None
        if not request.session:
            return Choice(least.replica)
        return Choice(self._home(request.session).replica)

    def _home(self, session: str) -> _Home:
        home = self._homes.get(session)
        if home is None or home.replica not in self._loads:
            key = int.from_bytes(blake2b(session.encode(errors="surrogatepass"), digest_size=8).digest(), "big")
            weight, replica = max((_weight(key, replica), replica) for replica in self._loads)
            home = self._homes[session] = _Home(key, weight, replica, len(self._arrivals))
        else:
            self._compare_with_newcomers(home)
        self._homes.move_to_end(session)
        if len(self._homes) > self._max_sessions:
            self._homes.popitem(last=False)
        return home

    def _compare_with_newcomers(self, home: _Home) -> None:
        for replica in self._arrivals[home.num_arrivals :]:
            if replica in self._loads:
                home.weight, home.replica = max((home.weight, home.replica), (_weight(home.key, replica), replica))
        home.num_arrivals = len(self._arrivals)


@dataclass(slots=True)
class _Home:
    """Where a session lives, found when there had been so many arrivals."""

    key: int
    weight: int
    replica: int
    num_arrivals: int


def _weight(key: int, replica: int) -> int:
    """64 well-mixed bits of a session and a replica: the finaliser of splitmix64 (Steele et al., 2014)."""
    mixed = (key + (replica + 1) * 0x9E3779B97F4A7C15) & _MASK
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
    return mixed ^ (mixed >> 31)
