"""The engine around whatever runs the steps: pages to keep the books of, a scheduler, a port. No torch."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.sizing import PoolPlan
from aios_kvcache.tier_costs import TierCosts, TransferSeconds
from aios_kvcache.tier_sizing import TierPlan, plan_tiers
from aios_kvcache.tiers import PageTiers
from aios_model.weights.hub import ModelFiles
from aios_parallel.expert_load import ExpertLoad
from aios_parallel.tracing.group_tracer import GroupTracer
from aios_sched.config import SchedulerConfig
from aios_sched.drafting import Drafting
from aios_sched.engine import Engine
from aios_sched.executor import Executor
from aios_sched.policy.priority import DEFAULT_AGING_SECONDS
from aios_sched.policy.registry import make_policy
from aios_sched.scheduler import Scheduler
from aios_sched.speculative.registry import make_controller, make_proposer
from aios_serve.config import EngineConfig
from aios_serve.engine_port import EnginePort, StepTokenCounter
from aios_serve.model_info import EngineInfo

if TYPE_CHECKING:
    from aios_sched.speculative.base import Proposer
    from aios_serve.engine_port import Prepare

CPU_STEP_TOKENS = 256
DEVICE_STEP_TOKENS = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine ready to run.

    Attributes:
        port: Takes requests and runs steps.
        info: What was built.
        files: Where the model came from, for whoever turns text into requests.
        close: Lets go of whatever runs the steps.
        expert_load: Tells what a mixture's experts have had to do; to be asked between steps.
        tracer: Shows where the time of a group of ranks goes; None for a single device.
    """

    port: EnginePort
    info: EngineInfo
    files: ModelFiles
    close: Callable[[], None]
    expert_load: Callable[[], ExpertLoad]
    tracer: GroupTracer | None = None


def assemble(
    config: EngineConfig,
    plan: PoolPlan,
    limits: SchedulerConfig,
    executor: Executor,
    *,
    tiers: PageTiers | None = None,
    prepare: Prepare | None = None,
    drafting: Drafting | None = None,
) -> EnginePort:
    """The engine that plans steps within `limits` over the pages of `plan`, and has `executor` run them.

    `tiers` are the books of what lies below the pool, `drafting` guesses tokens ahead; `prepare` is for the port.
    """
    block_manager = BlockManager(
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        enable_prefix_caching=caches_prefixes(config),
        tiers=tiers,
    )
    step_tokens = StepTokenCounter()
    policy = make_policy(
        config.scheduling_policy,
        block_manager=block_manager,
        aging_seconds=config.priority_aging_seconds or DEFAULT_AGING_SECONDS,
        tenant_weights=config.tenant_weights,
    )
    scheduler = Scheduler(limits, block_manager, policy)
    engine = Engine(scheduler, executor, listeners=[step_tokens], drafting=drafting)
    return EnginePort(
        engine,
        step_tokens=step_tokens,
        reset_prefix_cache=block_manager.reset_prefix_cache,
        request_timeout=config.request_timeout,
        prepare=prepare,
    )


def make_drafting(config: EngineConfig, *, vocab_size: int, proposer: Proposer | None = None) -> Drafting | None:
    """Who guesses tokens ahead, as `config` asks for; None for nobody.

    Args:
        config: The options.
        vocab_size: Width of the model's output.
        proposer: A draft model, if `config` asks for one.
    """
    speculative = config.speculative
    if speculative is None:
        return None
    return Drafting(proposer or make_proposer(speculative), make_controller(speculative), vocab_size=vocab_size)


def close_all(executor: Executor, drafting: Drafting | None) -> Callable[[], None]:
    """What lets go of whatever runs the steps, and of who guesses for them."""

    def close() -> None:
        if drafting is not None:
            drafting.close()
        executor.shutdown()

    return close


def tier_plan(config: EngineConfig, *, page_bytes: int) -> TierPlan | None:
    """The tiers below the pool that `config` asks for; None for none.

    Args:
        config: The options.
        page_bytes: Bytes of a page in all layers and on all ranks.

    Raises:
        ConfigError: Not one page fits.
    """
    return plan_tiers(
        page_bytes=page_bytes,
        host_bytes=config.kv_offloading_size,
        disk_bytes=config.kv_offloading_disk_size,
        directory=config.kv_offloading_path or tempfile.gettempdir(),
    )


def tier_books(config: EngineConfig, plan: TierPlan | None, transfers: Sequence[TransferSeconds]) -> PageTiers | None:
    """The books of the tiers, which know what moving a page takes on the slowest rank."""
    if plan is None:
        return None
    costs = TierCosts(TransferSeconds.slowest(transfers), mode=config.preemption_mode, block_size=config.block_size)
    return PageTiers(num_host_pages=plan.num_host_pages, num_disk_pages=plan.num_disk_pages, costs=costs)


def scheduler_config(
    config: EngineConfig, plan: PoolPlan, *, on_cpu: bool, num_stages: int = 1, schedule_ahead: bool = False
) -> SchedulerConfig:
    """The limits that `config` asks for, or that suit the device.

    Args:
        config: The options.
        plan: The pool.
        on_cpu: Whether the model computes on one.
        num_stages: Stages of the pipeline.
        schedule_ahead: Whether steps are launched before the one before them has returned.
    """
    budget = config.max_num_batched_tokens
    if budget is None:
        budget = CPU_STEP_TOKENS if on_cpu else DEVICE_STEP_TOKENS
        budget = max(budget, config.max_num_seqs, 0 if config.enable_chunked_prefill else plan.max_model_len)
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=plan.max_model_len,
        enable_chunked_prefill=config.enable_chunked_prefill,
        max_num_queued=config.max_num_queued_reqs,
        max_steps_in_flight=num_stages,
        schedule_ahead=schedule_ahead,
    )


def caches_prefixes(config: EngineConfig) -> bool:
    """A contiguous reservation is one page, which is never full: there is nothing to share."""
    return config.enable_prefix_caching and config.kv_cache_policy == "paged"
