"""What one process holds of a model: all of it, or a rank's part. Loaded, given pages, made ready to run steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch

from aios_kvcache.native.native_cache import NativePagedKVCache
from aios_kvcache.page_mover import PageMover
from aios_kvcache.paged_cache import PagedKVCache
from aios_kvcache.sizing import PoolPlan, available_memory, device_budget, plan_pool
from aios_kvcache.tier_sizing import TierPlan, check_host_room
from aios_model.config import ModelConfig
from aios_model.config_file import read_model_config
from aios_model.decoder import DecoderModel
from aios_model.errors import ConfigError
from aios_model.model import ModelTransform, load_decoder, resolve_device, resolve_dtype
from aios_model.native.cores import usable_cores
from aios_model.sampling.sampler import Sampler
from aios_model.weights.hub import ModelFiles
from aios_parallel.offload.device import StreamingDevice, streaming_device
from aios_parallel.offload.weights import OffloadedWeights, WeightOffload
from aios_quant.checkpoints.source import quantized_checkpoint
from aios_quant.native.decoder import NativeDecoder, unsupported
from aios_quant.native.reduction import StepReduction
from aios_sched.model_runner import Pages, StepModel
from aios_serve.backend import Backend, choose_backend
from aios_serve.config import EngineConfig

# What is being done, and how much of it is done (0..1) where that is known.
Progress: TypeAlias = Callable[[str, float | None], None]

DEVICE_MEMORY_SHARE = 0.9
TORCH_THREADS = torch.get_num_threads()  # torch's own choice, as it was before any engine changed it


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPart:
    """Weights in memory, and the choices that go with them.

    Attributes:
        config: The options.
        decoder: The network, or what of it this process holds.
        backend: What computes.
        num_neighbours: Processes that share this host's memory, this one included.
        offloaded: Weights in host memory that stream to the device; None if all are where they are computed with.
    """

    config: EngineConfig
    decoder: DecoderModel
    backend: Backend
    num_neighbours: int = 1
    offloaded: OffloadedWeights | None = None

    @classmethod
    def load(
        cls,
        config: EngineConfig,
        files: ModelFiles,
        *,
        transforms: Sequence[ModelTransform] = (),
        num_neighbours: int = 1,
        streaming: StreamingDevice | None = None,
        progress: Progress,
    ) -> ModelPart:
        """Reads the weights.

        Args:
            config: The options.
            files: Where the checkpoint is.
            transforms: What leaves parts of the model to other ranks.
            num_neighbours: As the attribute.
            streaming: What offloaded weights stream to; None for the device of the options.
            progress: Told what is being done.

        Raises:
            ModelError: The model cannot be read or run.
            ConfigError: An option cannot be honoured with this model or on this machine.
            PoolTooSmallError: The options give the pool fewer bytes or pages than one sequence needs.
        """
        torch.set_num_threads(config.threads or default_threads())
        progress("choosing kernels", None)
        backend = choose_backend(config, files)
        if not transforms:  # a rank knows what it holds of each page only when the model is cut
            _check_pool(config, files, backend)
        offload = _prepare_offload(config, files, backend, num_neighbours, streaming)
        decoder = load_decoder(
            files,
            dtype=backend.dtype,
            device=config.device,
            load_format=config.load_format,
            context_length=config.max_model_len,
            transforms=[*backend.transforms, *transforms, *([] if offload is None else [offload.choose])],
            source_transforms=[quantized_checkpoint],
            seed=config.seed or 0,
            on_loaded=None if offload is None else offload.take,
            progress=progress,
        )
        return cls(
            config=config,
            decoder=decoder,
            backend=backend,
            num_neighbours=num_neighbours,
            offloaded=None if offload is None else offload.install(decoder),
        )

    @property
    def num_threads(self) -> int:
        """Threads that compute on the CPU."""
        return torch.get_num_threads() if self.backend.pool is None else self.backend.pool.num_threads

    def plan(self) -> PoolPlan:
        """The pool of pages that fits beside the weights.

        Raises:
            PoolTooSmallError: The memory does not hold one sequence of the length asked for.
        """
        return _plan_pool(
            self.config,
            self.backend,
            self.decoder.local_config,
            dtype=self.decoder.dtype,
            memory_bytes=self._pool_bytes(),
            available_bytes=self._available_bytes(),
        )

    def build(self, plan: PoolPlan, reduce: StepReduction | None = None) -> tuple[StepModel, Pages, Sampler]:
        """What a runner needs: the model, its pages, the sampler.

        Args:
            plan: How many pages.
            reduce: Adds up the partial sums of a tensor-parallel group in native steps; the modules do so by hooks.
        """
        decoder, backend = self.decoder, self.backend
        sampler = Sampler(vocab_size=decoder.config.vocab_size, device=decoder.device, pool=backend.pool)
        if backend.pool is None or backend.kv_dtype is None or not backend.native_pages:
            cache = PagedKVCache(
                decoder.local_config,
                num_blocks=plan.num_blocks,
                block_size=plan.block_size,
                dtype=decoder.dtype,
                device=decoder.device,
                kv_dtype=backend.kv_dtype,
            )
            return decoder, cache, sampler
        pages = NativePagedKVCache(
            decoder.local_config,
            num_blocks=plan.num_blocks,
            block_size=plan.block_size,
            pool=backend.pool,
            kv_dtype=backend.kv_dtype,
        )
        if unsupported(decoder) is not None:  # its modules run, each with native kernels
            return decoder, pages, sampler
        native = NativeDecoder(decoder, pages, pool=backend.pool, max_positions=plan.max_model_len, reduce=reduce)
        return native, pages, sampler

    def open_tiers(self, pages: Pages, plan: TierPlan) -> PageMover:
        """What moves pages between the pool and the tiers below it.

        Args:
            pages: The pool, as `build` made it.
            plan: How many slots.

        Raises:
            ConfigError: There is no memory for the host tier, or no room for the disk tier's file.
        """
        assert isinstance(pages, PagedKVCache | NativePagedKVCache)
        tensors = pages.page_tensors
        page_bytes = sum(tensor[0].nbytes for tensor in tensors)
        pool_bytes = pages.num_bytes if self.decoder.device.type == "cpu" else 0  # it takes memory as it fills
        available = _host_share(self.config, self.num_neighbours)
        check_host_room(plan.num_host_pages * page_bytes, available_bytes=available - pool_bytes)
        return PageMover(tensors, plan)

    def _available_bytes(self) -> int:
        if self.decoder.device.type == "cuda":
            return torch.cuda.mem_get_info(self.decoder.device)[0]
        return _host_share(self.config, self.num_neighbours)

    def _pool_bytes(self) -> int | None:
        """Bytes for the pool; None lets the plan take its share of host memory, as far as it has use for it."""
        config = self.config
        if config.kv_cache_memory_bytes is not None or config.num_gpu_blocks_override is not None:
            return config.kv_cache_memory_bytes
        if self.decoder.device.type == "cuda":
            free_bytes, total_bytes = torch.cuda.mem_get_info(self.decoder.device)
            share = config.device_memory_utilization or DEVICE_MEMORY_SHARE
            return device_budget(free_bytes=free_bytes, total_bytes=total_bytes, device_memory_utilization=share)
        share = config.device_memory_utilization
        return None if share is None else int(self._available_bytes() * share)


def _plan_pool(
    config: EngineConfig,
    backend: Backend,
    model: ModelConfig,
    *,
    dtype: torch.dtype,
    memory_bytes: int | None,
    available_bytes: int | None = None,
) -> PoolPlan:
    return plan_pool(
        model,
        dtype_bytes=dtype.itemsize,
        bytes_per_token=backend.kv_bytes_per_token(model),
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        memory_bytes=memory_bytes,
        num_blocks=config.num_gpu_blocks_override,
        policy=config.kv_cache_policy,
        available_bytes=available_bytes,
    )


def _check_pool(config: EngineConfig, files: ModelFiles, backend: Backend) -> None:
    """Refuses a pool whose size is given and too small, before weights are read, which may take minutes."""
    if config.kv_cache_memory_bytes is None and config.num_gpu_blocks_override is None:
        return
    model = read_model_config(files, allow_quantized=True)
    dtype = resolve_dtype(backend.dtype, model, resolve_device(config.device))
    _plan_pool(config, backend, model, dtype=dtype, memory_bytes=config.kv_cache_memory_bytes)


def _host_share(config: EngineConfig, num_neighbours: int) -> int:
    """Bytes of host memory that each process may take where ranks and replicas share it."""
    return available_memory() // (num_neighbours * config.data_parallel)


def _prepare_offload(
    config: EngineConfig,
    files: ModelFiles,
    backend: Backend,
    num_neighbours: int,
    streaming: StreamingDevice | None,
) -> WeightOffload | None:
    """What keeps layers in host memory, if that was asked for.

    Raises:
        ConfigError: The model computes from host memory, or that has too little room.
    """
    if not config.cpu_offload_gb:
        return None
    device = resolve_device(config.device)
    num_bytes = math.ceil(config.cpu_offload_gb * 2**30)
    target = streaming or streaming_device(device)
    room = _host_share(config, num_neighbours)
    if num_bytes > room:
        raise ConfigError(
            f"cpu_offload_gb={config.cpu_offload_gb:g} cannot be used: {room / 2**30:.1f} GiB of host memory are free "
            f"for each of {num_neighbours * config.data_parallel} processes here; ask for less, or spread the model "
            "over more devices"
        )
    dtype = resolve_dtype(backend.dtype, read_model_config(files, allow_quantized=True), device)
    return WeightOffload(num_bytes, target, dtype=dtype)


def default_threads() -> int:
    """Torch's own choice (physical cores), but no more than this process may use at once."""
    return max(1, min(TORCH_THREADS, usable_cores()))
