"""The composition root for a group of ranks: starts them, has them load their parts, puts an engine in front.

This process drives: it plans steps and keeps the books of pages, and needs no torch for it.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from aios_kvcache.sizing import PoolPlan
from aios_kvcache.tier_costs import TransferSeconds
from aios_model.config_file import read_model_config
from aios_parallel.executor import GroupExecutor
from aios_parallel.expert_load import ExpertLoad
from aios_parallel.mesh import Mesh
from aios_parallel.tracing.group_tracer import GroupTracer
from aios_serve.assembly import (
    BuiltEngine,
    assemble,
    close_all,
    make_drafting,
    scheduler_config,
    tier_books,
    tier_plan,
)
from aios_serve.launching import start_ranks
from aios_serve.model_info import EngineInfo, with_tiers
from aios_serve.parallel_checks import check_mesh
from aios_serve.served_model import find_model

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_kvcache.tier_sizing import TierPlan
    from aios_parallel.control.driver import RankGroup
    from aios_serve.config import EngineConfig
    from aios_serve.launching import StartedRanks


def build_parallel_engine(config: EngineConfig, progress: Callable[[str, float | None], None]) -> BuiltEngine:
    """Build everything that `config` asks for, on as many ranks as it asks for.

    Raises:
        ModelError: the model cannot be found or read.
        ConfigError: an option cannot be honoured with this model or on this machine.
        ParallelError: a rank could not be started, or failed.
    """
    started = time.perf_counter()
    files = find_model(config)
    mesh = Mesh(tensor=config.tensor_parallel, pipeline=config.pipeline_parallel)
    check_mesh(config, read_model_config(files, allow_quantized=True), mesh)
    progress(f"starting {mesh.size} ranks", None)
    ranks = start_ranks(config, mesh, progress)
    try:
        plan, reports, tiers, transfers = _set_up(ranks, config, progress)
    except BaseException:
        ranks.group.close()
        raise
    ranks.group.start_steps()
    limits = scheduler_config(config, plan, on_cpu=reports[0].device == "cpu", num_stages=mesh.pipeline)
    executor = GroupExecutor(ranks.group, mesh=mesh, vocab_size=reports[0].vocab_size)
    drafting = make_drafting(config, vocab_size=executor.vocab_size)
    port = assemble(config, plan, limits, executor, tiers=tier_books(config, tiers, transfers), drafting=drafting)
    info = _describe(reports, plan, limits.max_num_batched_tokens, mesh, seconds=time.perf_counter() - started)
    info = with_tiers(info, tiers)
    tracer = GroupTracer(ranks.group, executor, mesh=mesh)

    def expert_load() -> ExpertLoad:
        answers = ranks.group.call("expert_load", [{}] * mesh.size, lambda *_: None)
        return ExpertLoad.merged(ExpertLoad({layer: tuple(tokens) for layer, tokens in answer}) for answer in answers)

    close = close_all(executor, drafting)
    return BuiltEngine(port=port, info=info, files=files, close=close, expert_load=expert_load, tracer=tracer)


def _set_up(
    ranks: StartedRanks, config: EngineConfig, progress: Callable[[str, float | None], None]
) -> tuple[PoolPlan, list[EngineInfo], TierPlan | None, list[TransferSeconds]]:
    """Has the ranks meet, load and reserve their pages: as many as the one with the least room has.

    Returns:
        The pool of all ranks, what each one looks like, the tiers below the pool, and what moving a page takes each.
    """
    group: RankGroup = ranks.group
    common: dict[str, Any] = {
        "config": asdict(config),
        "run_id": secrets.token_hex(8),
        "hosts": ranks.hosts,
        "addresses": ranks.addresses,
    }
    ports = group.call("meet", [{**common, "rank": rank} for rank in range(group.size)], progress)
    store = None if ports[0] is None else (ranks.addresses[0] or "127.0.0.1", ports[0])
    answers = group.call("load", [{"store": store}] * group.size, progress)
    plans = [PoolPlan(**answer["plan"]) for answer in answers]
    num_blocks, length = min(plan.num_blocks for plan in plans), min(plan.max_model_len for plan in plans)
    agreed = [
        PoolPlan(
            num_blocks=num_blocks,
            block_size=plan.block_size,
            max_model_len=length,
            num_bytes=plan.num_bytes * (num_blocks + 1) // (plan.num_blocks + 1),
        )
        for plan in plans
    ]
    tiers = tier_plan(config, page_bytes=sum(plan.page_bytes for plan in agreed))
    progress("reserving the pool of pages", None)
    slots = None if tiers is None else asdict(tiers)
    answers_to_plan = group.call("allocate", [{"plan": asdict(plan), "tiers": slots} for plan in agreed], progress)
    transfers = [TransferSeconds(**answer) for answer in answers_to_plan if answer is not None]
    total = PoolPlan(
        num_blocks=num_blocks,
        block_size=plans[0].block_size,
        max_model_len=length,
        num_bytes=sum(plan.num_bytes for plan in agreed),
    )
    return total, [EngineInfo(**answer["info"]) for answer in answers], tiers, transfers


def _describe(
    reports: list[EngineInfo], plan: PoolPlan, max_num_batched_tokens: int, mesh: Mesh, *, seconds: float
) -> EngineInfo:
    """What was built, of all ranks together."""
    fields = asdict(reports[0])
    import_seconds = max(report.import_seconds for report in reports)
    fields |= {
        "num_weight_bytes": sum(report.num_weight_bytes for report in reports),
        "num_offloaded_bytes": sum(report.num_offloaded_bytes for report in reports),
        "num_staging_bytes": sum(report.num_staging_bytes for report in reports),
        "num_blocks": plan.num_blocks,
        "num_kv_bytes": plan.num_bytes,
        "max_model_len": plan.max_model_len,
        "max_num_batched_tokens": max_num_batched_tokens,
        "threads": sum(report.threads for report in reports),
        "import_seconds": import_seconds,
        "load_seconds": seconds - import_seconds,
        "tensor_parallel": mesh.tensor,
        "pipeline_parallel": mesh.pipeline,
    }
    return EngineInfo(**fields)
