"""The composition root: from options to an engine, on one device.

With `build_parallel.py`, which does the same for a group of ranks, and `rank_process.py`, which builds one of those,
the only modules that know every concrete class.
"""

from __future__ import annotations

import time

from aios_kvcache.sizing import PoolPlan
from aios_model.host_memory import return_freed_memory
from aios_model.model import weight_bytes
from aios_model.sampling.device_sampler import DeviceSampler
from aios_model.transfers import is_asynchronous
from aios_model.weights.hub import ModelFiles
from aios_parallel.expert_load import ExpertCounter
from aios_sched.config import SchedulerConfig
from aios_sched.executor import LocalExecutor
from aios_sched.model_runner import ModelRunner
from aios_sched.overlapped_executor import OverlappedExecutor
from aios_serve.assembly import (
    BuiltEngine,
    assemble,
    caches_prefixes,
    close_all,
    make_drafting,
    scheduler_config,
    tier_books,
    tier_plan,
)
from aios_serve.config import EngineConfig
from aios_serve.draft_part import draft_proposer
from aios_serve.model_info import EngineInfo, with_tiers
from aios_serve.model_part import ModelPart, Progress
from aios_serve.served_model import find_model, served_vocabulary
from aios_serve.structured.processor import GrammarProcessor
from aios_serve.structured.store import GrammarStore


def build_engine(config: EngineConfig, *, progress: Progress | None = None, import_seconds: float = 0.0) -> BuiltEngine:
    """Build everything that `config` asks for.

    Args:
        config: The options.
        progress: Told what is being done.
        import_seconds: Time that importing torch took, for the record.

    Raises:
        ModelError: the model cannot be found, read or run.
        ConfigError: an option cannot be honoured with this model or on this machine.
        PoolTooSmallError: the memory does not hold one sequence of the length asked for.
    """
    started = time.perf_counter()
    report = progress or (lambda stage, fraction: None)
    files = find_model(config)
    part = ModelPart.load(config, files, progress=report)
    report("reserving the pool of pages", None)
    plan = part.plan()
    device = part.decoder.device
    overlaps = is_asynchronous(device)
    limits = scheduler_config(config, plan, on_cpu=device.type == "cpu", schedule_ahead=overlaps)
    width = part.decoder.config.vocab_size
    grammars = GrammarStore(lambda: served_vocabulary(config, files))
    processors = [GrammarProcessor(grammars, vocab_size=width)]
    model, pages, sampler = part.build(plan, logits_processors=processors)
    tiers = tier_plan(config, page_bytes=plan.page_bytes)
    mover = None if tiers is None else part.open_tiers(pages, tiers)
    if overlaps:
        sampler = DeviceSampler(vocab_size=width, device=device, logits_processors=processors)
    runner = ModelRunner(model, pages, sampler, mover=mover)
    executor = OverlappedExecutor(runner) if overlaps else LocalExecutor(runner)
    return_freed_memory()
    books = tier_books(config, tiers, [] if mover is None else [mover.measure()])
    proposer = draft_proposer(
        part, plan, logits_processors=[GrammarProcessor(grammars, vocab_size=width)], progress=report
    )
    drafting = make_drafting(config, vocab_size=width, proposer=proposer)
    port = assemble(config, plan, limits, executor, tiers=books, prepare=grammars.prepare, drafting=drafting)
    load_seconds = time.perf_counter() - started
    info = describe(config, files, part, plan, limits, import_seconds=import_seconds, load_seconds=load_seconds)
    info = with_tiers(info, tiers)
    counter = ExpertCounter(part.decoder)
    close = close_all(executor, drafting)
    return BuiltEngine(port=port, info=info, files=files, close=close, expert_load=counter.load)


def describe(
    config: EngineConfig,
    files: ModelFiles,
    part: ModelPart,
    plan: PoolPlan,
    limits: SchedulerConfig,
    *,
    import_seconds: float,
    load_seconds: float,
) -> EngineInfo:
    """What was built, of one process."""
    decoder, backend = part.decoder, part.backend
    return EngineInfo(
        model_name=config.served_model_name[0] if config.served_model_name else files.name,
        architecture=decoder.config.architecture,
        dtype=str(decoder.dtype if backend.pool is None else backend.weight_dtype).removeprefix("torch."),
        quantization=backend.scheme,
        kernels=backend.reason.partition("\n")[0],
        kv_dtype=backend.kv_dtype_name(decoder.dtype),
        device=str(decoder.device),
        vocab_size=decoder.config.vocab_size,
        num_weight_bytes=weight_bytes(decoder),
        kv_cache_policy=config.kv_cache_policy,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        num_kv_bytes=plan.num_bytes,
        max_model_len=plan.max_model_len,
        max_num_seqs=limits.max_num_seqs,
        max_num_batched_tokens=limits.max_num_batched_tokens,
        enable_prefix_caching=caches_prefixes(config),
        threads=part.num_threads,
        import_seconds=import_seconds,
        load_seconds=load_seconds,
        num_offloaded_bytes=0 if part.offloaded is None else part.offloaded.num_host_bytes,
        num_staging_bytes=0 if part.offloaded is None else part.offloaded.num_staging_bytes,
    )
