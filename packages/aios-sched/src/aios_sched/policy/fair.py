"""Tenants share the engine by weight: the virtual token counter (Sheng et al., OSDI 2024, arXiv 2401.00588)."""

from __future__ import annotations

from heapq import heappop, heappush, heapreplace
from typing import TYPE_CHECKING

from aios_model.errors import ConfigError, InvalidRequestError
from aios_sched.policy.base import refuse_priority
from aios_sched.policy.ranked import RankedQueue
from aios_sched.request import DEFAULT_TENANT, RequestStatus

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aios_sched.request import Request

_MAX_IDLE_TENANTS = 1024


class FairQueue:
    """Admits a request of the tenant that has been served least.

    Each tenant has a counter of the service it got, divided by its weight: `input_weight` for a prompt token that was
    computed (one from the prefix cache costs nobody anything), counted on admission, and `output_weight` for a token
    that was generated, counted as it comes. Within a tenant, the order of arrival counts.

    - *Idle time is not saved up.* When the first request of a tenant comes to wait, its counter is lifted to the
      smallest of those that wait, less `burst`; if nobody waits, of the tenant that left the queue last. In the paper
      `burst` is 0: then a tenant within its share waits whenever two of its requests come close together.
    - *The difference is bounded.* Of tenants that have requests waiting all the time, none gets more than
      `(input_weight * longest prompt + output_weight * tokens that all seats generate) / weight` ahead of another: it
      had the smallest counter when a request of it was admitted last, and that is all that can be charged since. One
      that returns may get `burst` / weight more.
    - *Seats and memory are shared likewise.* With all seats taken, the next request takes that of a tenant that runs
      more for its weight: a flood does not keep the others waiting until one of its requests ends. The k-th request
      that a tenant runs at a time has rank k / weight, so when pages run out, or prompts are read, the tenant that runs
      most for its weight gives way. The rank stays as it is while the request has pages.
      A tenant's oldest preempted request is the first that it has admitted again, and the fewer it runs the better
      that one's new rank: in the end it is 0, and the oldest request of rank 0 gives way to nobody.

    Args:
        weights: Tenants with their shares; others are refused, but "default" always exists. None: any name is a
            tenant, of the weight that its latest request brought. A new weight counts for service from then on.
        input_weight: What a prompt token costs.
        output_weight: What a generated token costs.
        burst: What a tenant that was idle may get before it takes turns with the others, in weighted tokens.

    Raises:
        ConfigError: a weight is not a positive number, or `burst` is negative.
    """

    def __init__(
        self,
        weights: Mapping[str, float] | None = None,
        *,
        input_weight: float = 1.0,
        output_weight: float = 2.0,
        burst: float = 8192.0,
    ) -> None:
        for name, weight in {**(weights or {}), "input": input_weight, "output": output_weight}.items():
            if not 0 < weight < float("inf"):
                raise ConfigError(f"the weight {weight} of {name!r} cannot be used: it must be a positive number")
        if not 0 <= burst < float("inf"):
            raise ConfigError(f"burst={burst} cannot be used: it must be 0 or more")
        self._weights = None if weights is None else {DEFAULT_TENANT: 1.0, **weights}
        self._input_weight = input_weight
        self._output_weight = output_weight
        self._burst = burst
        self._tenants: dict[str, _Tenant] = {}
        self._order: list[tuple[float, str]] = []  # of those that wait, by a counter that may have grown since
        self._last_to_leave: _Tenant | None = None
        self._num_waiting = 0

    def push(self, request: Request) -> None:
        """Takes a request; one with a priority, or of a tenant that does not exist, is refused."""
        refuse_priority(request)
        is_preempted = request.status is RequestStatus.PREEMPTED
        weight = self._weight_of(request)
        tenant = self._tenants.get(request.tenant) or self._new_tenant(request.tenant, weight)
        if not is_preempted:  # one that comes back may bring a weight of long ago
            tenant.weight = weight
        if is_preempted:
            tenant.num_running -= 1
        if not tenant.waiting:
            if not is_preempted:
                tenant.counter = max(tenant.counter, self._floor() - self._burst / tenant.weight)
            if not tenant.in_order:
                tenant.in_order = True
                heappush(self._order, (tenant.counter, tenant.name))
        tenant.waiting.push(request)
        self._num_waiting += 1

    def peek(self) -> Request | None:
        """The first request of the tenant with the smallest counter."""
        tenant = self._least_served()
        request = None if tenant is None else tenant.waiting.peek()
        if request is not None:
            request.rank = self._tenants[request.tenant].load
        return request

    def admit(self, request: Request) -> None:
        """Charges the prompt, once: to be preempted is no service."""
        tenant = self._leave(request)
        if not request.num_preemptions:
            num_tokens = request.num_tokens - request.num_computed_tokens
            tenant.counter += self._input_weight * num_tokens / tenant.weight
        request.rank = tenant.load
        tenant.num_running += 1

    def may_displace(self, request: Request, other: Request) -> bool:
        """If its tenant, one that was served less, will not run more for its weight than the other's then does."""
        mine, theirs = self._tenants[request.tenant], self._tenants[other.tenant]
        return (mine.num_running + 1) / mine.weight <= (theirs.num_running - 1) / theirs.weight

    def charge(self, request: Request, num_tokens: int) -> None:
        """Charges generated tokens."""
        tenant = self._tenants[request.tenant]
        tenant.counter += self._output_weight * num_tokens / tenant.weight

    def remove(self, request: Request) -> None:
        """Drops a request that waits, or counts one less that runs."""
        if request.status is RequestStatus.RUNNING:
            self._tenants[request.tenant].num_running -= 1
        else:
            self._leave(request)

    def __len__(self) -> int:
        return self._num_waiting

    @property
    def counters(self) -> dict[str, float]:
        """What each tenant was served, by its weight; only differences mean something."""
        return {tenant.name: tenant.counter for tenant in self._tenants.values()}

    def _leave(self, request: Request) -> _Tenant:
        tenant = self._tenants[request.tenant]
        tenant.waiting.admit(request)
        self._num_waiting -= 1
        if not tenant.waiting:
            self._last_to_leave = tenant
        return tenant

    def _least_served(self) -> _Tenant | None:
        """Counters only grow, so an entry that is out of date moves down, and one that is not is the smallest."""
        while self._order:
            counter, name = self._order[0]
            tenant = self._tenants[name]
            if not tenant.waiting:
                heappop(self._order)
                tenant.in_order = False
            elif tenant.counter > counter:
                heapreplace(self._order, (tenant.counter, name))
            else:
                return tenant
        return None

    def _floor(self) -> float:
        """Where the counter of a tenant that returns starts, at least."""
        tenant = self._least_served() or self._last_to_leave
        return 0.0 if tenant is None else tenant.counter

    def _weight_of(self, request: Request) -> float:
        name = request.tenant
        weight = request.tenant_weight if self._weights is None else self._weights.get(name)
        if weight is None:
            raise InvalidRequestError(
                f"tenant {name!r} does not exist; known are {', '.join(sorted(self._weights or ()))}", param="tenant"
            )
        if not 0 < weight < float("inf"):
            raise InvalidRequestError(
                f"the weight {weight} of tenant {name!r} cannot be used: it must be a positive number", param="tenant"
            )
        return weight

    def _new_tenant(self, name: str, weight: float) -> _Tenant:
        if len(self._tenants) >= _MAX_IDLE_TENANTS:
            self._forget_idle_tenants()
        tenant = self._tenants[name] = _Tenant(name, weight)
        return tenant

    def _forget_idle_tenants(self) -> None:
        """Those that would start at the floor anyway, when they return."""
        floor = self._floor()
        self._tenants = {
            name: tenant
            for name, tenant in self._tenants.items()
            if tenant.in_order or tenant.num_running or tenant.counter > floor
        }


class _Tenant:
    """What is known of a tenant: its requests that wait and how many run, and the service it got by its weight."""

    __slots__ = ("counter", "in_order", "name", "num_running", "waiting", "weight")

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.weight = weight
        self.counter = 0.0
        self.in_order = False  # has an entry in the queue's heap of tenants
        self.num_running = 0
        self.waiting = RankedQueue(_turn)

    @property
    def load(self) -> float:
        """What it runs, for its weight."""
        return self.num_running / self.weight


def _turn(request: Request) -> tuple[float, int]:
    """Order within a tenant: preempted requests had their turn already."""
    return (0.0 if request.num_preemptions else 1.0, request.arrival_order)
