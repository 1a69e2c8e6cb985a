"""Policies by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from aios_sched.policy.fair import FairQueue
from aios_sched.policy.fcfs import FCFSQueue
from aios_sched.policy.prefix import PrefixQueue
from aios_sched.policy.priority import DEFAULT_AGING_SECONDS, PriorityQueue

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aios_kvcache.block_manager import BlockManager
    from aios_sched.policy.base import WaitingQueue

PolicyName = Literal["fcfs", "priority", "fair", "prefix"]


def make_policy(
    name: PolicyName,
    *,
    block_manager: BlockManager,
    aging_seconds: float = DEFAULT_AGING_SECONDS,
    tenant_weights: Mapping[str, float] | None = None,
) -> WaitingQueue:
    """A fresh policy.

    Args:
        name: Which.
        block_manager: The pages of the scheduler that it is for: "prefix" asks what they hold.
        aging_seconds: For "priority", see `PriorityQueue`.
        tenant_weights: For "fair", see `FairQueue`.

    Raises:
        ConfigError: a number is out of range.
    """
    match name:
        case "fcfs":
            return FCFSQueue()
        case "priority":
            return PriorityQueue(aging_seconds=aging_seconds)
        case "fair":
            return FairQueue(tenant_weights)
        case "prefix":
            return PrefixQueue(
                lambda request: block_manager.count_cached_tokens(request.token_ids, salt=request.cache_salt)
            )
