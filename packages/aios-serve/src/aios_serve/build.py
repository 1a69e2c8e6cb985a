"""The composition root: the one module that knows every concrete class, from weights to engine."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.native.native_cache import NativePagedKVCache
from aios_kvcache.paged_cache import PagedKVCache
from aios_kvcache.sizing import PoolPlan, available_memory, device_budget, plan_pool
from aios_model.decoder import DecoderModel
from aios_model.host_memory import return_freed_memory
from aios_model.model import load_decoder, weight_bytes
from aios_model.native.cores import usable_cores
from aios_model.sampling.sampler import Sampler
from aios_model.weights.hub import ModelFiles
from aios_quant.checkpoints.source import quantized_checkpoint
from aios_quant.native.decoder import NativeDecoder, unsupported
from aios_sched.config import SchedulerConfig
from aios_sched.engine import Engine
from aios_sched.executor import LocalExecutor
from aios_sched.model_runner import ModelRunner
from aios_sched.policy.fcfs import FCFSQueue
from aios_sched.scheduler import Scheduler
from aios_serve.backend import Backend, choose_backend
from aios_serve.config import EngineConfig
from aios_serve.engine_port import EnginePort, StepTokenCounter
from aios_serve.model_info import EngineInfo
from aios_serve.served_model import find_model

# What is being done, and how much of it is done (0..1) where that is known.
Progress = Callable[[str, float | None], None]

CPU_STEP_TOKENS = 256
DEVICE_STEP_TOKENS = 2048
DEVICE_MEMORY_SHARE = 0.9
TORCH_THREADS = torch.get_num_threads()  # torch's own choice, as it was before any engine changed it


@dataclass(frozen=True, slots=True, kw_only=True)
class BuiltEngine:
    """An engine ready to run.

    Attributes:
        port: Takes requests and runs steps.
        info: What was built.
        files: Where the model came from, for whoever turns text into requests.
        close: Lets go of whatever runs the steps.
    """

    port: EnginePort
    info: EngineInfo
    files: ModelFiles
    close: Callable[[], None]


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
    torch.set_num_threads(config.threads or default_threads())
    report("choosing kernels", None)
    backend = choose_backend(config, files)
    decoder = load_decoder(
        files,
        dtype=backend.dtype,
        device=config.device,
        load_format=config.load_format,
        context_length=config.max_model_len,
        transforms=backend.transforms,
        source_transforms=[quantized_checkpoint],
        seed=config.seed or 0,
        progress=report,
    )
    report("reserving the pool of pages", None)
    plan = _plan(config, decoder, backend)
    limits = _scheduler_config(config, plan, decoder)
    block_manager = BlockManager(
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        enable_prefix_caching=_caches_prefixes(config),
    )
    executor = LocalExecutor(_model_runner(decoder, plan, backend))
    return_freed_memory()
    step_tokens = StepTokenCounter()
    engine = Engine(Scheduler(limits, block_manager, FCFSQueue()), executor, listeners=[step_tokens])
    port = EnginePort(engine, step_tokens=step_tokens, reset_prefix_cache=block_manager.reset_prefix_cache)
    info = _describe(
        config,
        files,
        decoder,
        plan,
        limits,
        backend,
        import_seconds=import_seconds,
        load_seconds=time.perf_counter() - started,
    )
    return BuiltEngine(port=port, info=info, files=files, close=executor.shutdown)


def default_threads() -> int:
    """Torch's own choice (physical cores), but no more than this process may use at once."""
    return max(1, min(TORCH_THREADS, usable_cores()))


def _plan(config: EngineConfig, decoder: DecoderModel, backend: Backend) -> PoolPlan:
    return plan_pool(
        decoder.config,
        dtype_bytes=decoder.dtype.itemsize,
        bytes_per_token=backend.kv_bytes_per_token(decoder.config),
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        memory_bytes=_pool_bytes(config, decoder.device),
        num_blocks=config.num_gpu_blocks_override,
        policy=config.kv_cache_policy,
        available_bytes=_available_bytes(config, decoder.device),
    )


def _available_bytes(config: EngineConfig, device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else _host_memory(config)


def _host_memory(config: EngineConfig) -> int:
    """Bytes that may be taken, by each of several replicas alike."""
    return available_memory() // config.data_parallel


def _pool_bytes(config: EngineConfig, device: torch.device) -> int | None:
    """Bytes for the pool; None lets the plan take its share of host memory, as far as it has use for it."""
    if config.kv_cache_memory_bytes is not None or config.num_gpu_blocks_override is not None:
        return config.kv_cache_memory_bytes
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        share = config.device_memory_utilization or DEVICE_MEMORY_SHARE
        return device_budget(free_bytes=free_bytes, total_bytes=total_bytes, device_memory_utilization=share)
    share = config.device_memory_utilization
    return None if share is None else int(_host_memory(config) * share)


def _scheduler_config(config: EngineConfig, plan: PoolPlan, decoder: DecoderModel) -> SchedulerConfig:
    budget = config.max_num_batched_tokens
    if budget is None:
        budget = DEVICE_STEP_TOKENS if decoder.device.type == "cuda" else CPU_STEP_TOKENS
        budget = max(budget, config.max_num_seqs, 0 if config.enable_chunked_prefill else plan.max_model_len)
    return SchedulerConfig(
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=budget,
        max_model_len=plan.max_model_len,
        enable_chunked_prefill=config.enable_chunked_prefill,
        max_num_queued=config.max_num_queued_reqs,
    )


def _caches_prefixes(config: EngineConfig) -> bool:
    """A contiguous reservation is one page, which is never full: there is nothing to share."""
    return config.enable_prefix_caching and config.kv_cache_policy == "paged"


def _model_runner(decoder: DecoderModel, plan: PoolPlan, backend: Backend) -> ModelRunner:
    sampler = Sampler(vocab_size=decoder.config.vocab_size, device=decoder.device, pool=backend.pool)
    if backend.pool is None or backend.kv_dtype is None:
        cache = PagedKVCache(
            decoder.config,
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            dtype=decoder.dtype,
            device=decoder.device,
        )
        return ModelRunner(decoder, cache, sampler)
    pages = NativePagedKVCache(
        decoder.config,
        num_blocks=plan.num_blocks,
        block_size=plan.block_size,
        pool=backend.pool,
        kv_dtype=backend.kv_dtype,
    )
    if unsupported(decoder) is not None:  # its modules run, each with native kernels
        return ModelRunner(decoder, pages, sampler)
    native = NativeDecoder(decoder, pages, pool=backend.pool, max_positions=plan.max_model_len)
    return ModelRunner(native, pages, sampler)


def _describe(
    config: EngineConfig,
    files: ModelFiles,
    decoder: DecoderModel,
    plan: PoolPlan,
    limits: SchedulerConfig,
    backend: Backend,
    *,
    import_seconds: float,
    load_seconds: float,
) -> EngineInfo:
    return EngineInfo(
        model_name=config.served_model_name[0] if config.served_model_name else files.name,
        architecture=decoder.config.architecture,
        dtype=str(decoder.dtype if backend.pool is None else backend.weight_dtype).removeprefix("torch."),
        quantization=backend.scheme,
        kernels=backend.reason.partition("\n")[0],
        kv_dtype=str(backend.kv_dtype or decoder.dtype).removeprefix("torch."),
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
        enable_prefix_caching=_caches_prefixes(config),
        threads=torch.get_num_threads() if backend.pool is None else backend.pool.num_threads,
        import_seconds=import_seconds,
        load_seconds=load_seconds,
    )
