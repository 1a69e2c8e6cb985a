"""What is simulated: engines of one kind, and a router before them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast, get_args

from aios_kvcache.block_manager import BlockManager
from aios_model.errors import ConfigError
from aios_sched.config import SchedulerConfig
from aios_sched.policy.registry import PolicyName, make_policy
from aios_sched.routing.router import ROUTING_POLICIES, Router
from aios_sched.simulator.leaping_scheduler import LeapingScheduler

if TYPE_CHECKING:
    from collections.abc import Callable

POLICIES: tuple[str, ...] = get_args(PolicyName)
"""Scheduling policies by the names that options use."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemConfig:
    """Engines and their router; names and meanings are those of `aios-serve`.

    Attributes:
        num_blocks: Pages of each engine.
        block_size: Tokens per page.
        max_num_seqs: See SchedulerConfig, as for the next four.
        max_num_batched_tokens: Tokens of a step.
        max_model_len: Longest prompt plus output.
        enable_chunked_prefill: Whether prompts are cut.
        max_num_queued: Requests that may wait at each engine.
        enable_prefix_caching: Whether pages of finished prompts are found again.
        policy: Who is admitted next; one of POLICIES.
        replicas: Engines.
        routing: Who gets a request; one of ROUTING_POLICIES. With one engine nobody asks.

    Raises:
        ConfigError: A value is out of range, or no such policy exists.
    """

    num_blocks: int
    block_size: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 2048
    max_model_len: int = 4096
    enable_chunked_prefill: bool = True
    max_num_queued: int | None = None
    enable_prefix_caching: bool = True
    policy: str = "fcfs"
    replicas: int = 1
    routing: str = "prefix-affinity"

    def __post_init__(self) -> None:
        if self.replicas < 1:
            raise ConfigError(f"replicas={self.replicas} cannot be simulated: give at least 1")
        if self.num_blocks < 1 or self.block_size < 1:
            raise ConfigError(f"num_blocks={self.num_blocks}, block_size={self.block_size}: both must be positive")
        if self.policy not in POLICIES:
            raise ConfigError(f"policy {self.policy!r} is unknown; use one of {', '.join(POLICIES)}")
        if self.routing not in ROUTING_POLICIES:
            raise ConfigError(f"routing {self.routing!r} is unknown; use one of {', '.join(ROUTING_POLICIES)}")
        self.scheduler_config()

    def scheduler_config(self) -> SchedulerConfig:
        """The limits of one engine."""
        return SchedulerConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_model_len=self.max_model_len,
            enable_chunked_prefill=self.enable_chunked_prefill,
            max_num_queued=self.max_num_queued,
        )

    def make_scheduler(self, clock: Callable[[], float]) -> LeapingScheduler:
        """The scheduler of one engine and its pages, as an engine would have them."""
        pages = BlockManager(
            num_blocks=self.num_blocks,
            block_size=self.block_size,
            enable_prefix_caching=self.enable_prefix_caching,
        )
        policy = make_policy(cast("PolicyName", self.policy), block_manager=pages)
        return LeapingScheduler(self.scheduler_config(), pages, policy, clock=clock)

    def make_router(self) -> Router | None:
        """The router, if there is anything to choose."""
        if self.replicas == 1:
            return None
        router = Router(ROUTING_POLICIES[self.routing])
        for replica in range(self.replicas):
            router.add(replica)
        return router
