"""`aios-serve`: every flag of the server. Options become EngineConfig and ServerConfig, which know what is allowed.

Nothing heavy is imported before the arguments are known to be right: `--help` and a typing error answer at once.
"""

from __future__ import annotations

import json
import os
import re
from importlib.metadata import version
from typing import TYPE_CHECKING

import typer

from aios_model.command_line import run_command
from aios_model.errors import ConfigError
from aios_serve.cli_options import batching, http, memory, parallelism, process
from aios_serve.cli_options import model as model_options
from aios_serve.config import EngineConfig, parse_count, read_speculative
from aios_serve.server_config import ServerConfig

if TYPE_CHECKING:
    from collections.abc import Sequence


ENGINE = EngineConfig()
SERVER = ServerConfig()

HELP = """
Serve a model behind an OpenAI-compatible endpoint.

MODEL is a folder, a GGUF file, or a name on the Hugging Face hub.
Without it, a small bundled model is served and nothing is downloaded.

[bold]Examples[/bold]

  [cyan]aios-serve[/cyan]
  the bundled model, on http://127.0.0.1:8000

  [cyan]aios-serve Qwen/Qwen3-0.6B --port 9000[/cyan]
  a model from the hub

  [cyan]aios-serve ./llama.gguf --max-model-len 8k --served-model-name llama[/cyan]
  a local file, with 8192 tokens of context per request, called "llama" in requests

  [cyan]AIOS_API_KEY=secret aios-serve --host 0.0.0.0[/cyan]
  open to the network, for those who have the key
"""

app = typer.Typer(add_completion=False, rich_markup_mode="rich")


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `aios-serve`; ends the process. Every mistake in the arguments is one line and status 2."""
    run_command(app, "aios-serve", args, in_flags=_in_flags)


@app.command(help=HELP)
def serve(
    model: model_options.Model = None,
    *,
    served_model_name: model_options.ServedModelName = None,
    tokenizer: model_options.Tokenizer = None,
    revision: model_options.Revision = None,
    download_dir: model_options.DownloadDir = None,
    load_format: model_options.LoadFormatOption = ENGINE.load_format,
    quantization: model_options.Quantization = ENGINE.quantization,
    dtype: model_options.DTypeOption = ENGINE.dtype,
    device: model_options.DeviceOption = ENGINE.device,
    max_model_len: model_options.MaxModelLen = "auto",
    generation_config: model_options.GenerationConfig = ENGINE.generation_config,
    chat_template: model_options.ChatTemplate = None,
    max_logprobs: model_options.MaxLogprobs = ENGINE.max_logprobs,
    seed: model_options.Seed = ENGINE.seed or 0,
    host: http.Host = SERVER.host,
    port: http.Port = SERVER.port,
    uds: http.UDS = None,
    api_key: http.APIKey = None,
    allowed_origins: http.AllowedOrigins = None,
    ssl_certfile: http.SSLCertfile = None,
    ssl_keyfile: http.SSLKeyfile = None,
    shutdown_timeout: http.ShutdownTimeout = SERVER.shutdown_timeout,
    device_memory_utilization: memory.DeviceMemoryUtilization = None,
    kv_cache_memory_bytes: memory.KVCacheMemoryBytes = None,
    cpu_offload_gb: memory.CPUOffloadGB = ENGINE.cpu_offload_gb,
    num_gpu_blocks_override: memory.NumGPUBlocksOverride = None,
    block_size: memory.BlockSize = ENGINE.block_size,
    enable_prefix_caching: memory.EnablePrefixCaching = ENGINE.enable_prefix_caching,
    kv_cache_policy: memory.KVCachePolicyOption = ENGINE.kv_cache_policy,
    kv_cache_dtype: memory.KVCacheDTypeOption = ENGINE.kv_cache_dtype,
    kv_offloading_size: memory.KVOffloadingSize = "0",
    kv_offloading_disk_size: memory.KVOffloadingDiskSize = "0",
    kv_offloading_path: memory.KVOffloadingPath = None,
    preemption_mode: memory.PreemptionModeOption = ENGINE.preemption_mode,
    max_num_seqs: batching.MaxNumSeqs = ENGINE.max_num_seqs,
    max_num_batched_tokens: batching.MaxNumBatchedTokens = None,
    enable_chunked_prefill: batching.EnableChunkedPrefill = ENGINE.enable_chunked_prefill,
    scheduling_policy: batching.SchedulingPolicy = ENGINE.scheduling_policy,
    priority_aging_seconds: batching.PriorityAgingSeconds = None,
    request_timeout: batching.RequestTimeout = None,
    max_num_queued_reqs: batching.MaxNumQueuedReqs = ENGINE.max_num_queued_reqs or 0,
    speculative_config: batching.SpeculativeConfig = None,
    tensor_parallel_size: parallelism.TensorParallelSize = ENGINE.tensor_parallel,
    pipeline_parallel_size: parallelism.PipelineParallelSize = ENGINE.pipeline_parallel,
    enable_expert_parallel: parallelism.EnableExpertParallel = ENGINE.expert_parallel,
    distributed_executor_backend: parallelism.DistributedExecutorBackend = ENGINE.distributed_executor,
    ray_address: parallelism.RayAddress = None,
    rank_timeout: parallelism.RankTimeout = ENGINE.rank_timeout,
    threads: process.Threads = None,
    cpu_bind: process.CPUBind = ENGINE.cpu_bind,
    engine_process: process.EngineProcess = ENGINE.engine_process,
    data_parallel_size: process.DataParallelSize = ENGINE.data_parallel,
    data_parallel_routing: process.DataParallelRouting = ENGINE.data_parallel_routing,
    heartbeat_timeout: process.HeartbeatTimeout = ENGINE.heartbeat_timeout,
    max_engine_restarts: process.MaxEngineRestarts = ENGINE.max_engine_restarts,
    log_level: process.LogLevelOption = ENGINE.log_level,
    version: process.Version = False,
) -> int:
    """Check the options and serve; returns the exit status."""
    engine_config = EngineConfig(
        model=model,
        tokenizer=tokenizer,
        revision=revision,
        download_dir=None if download_dir is None else str(download_dir),
        load_format=load_format,
        dtype=dtype,
        device=device,
        seed=seed,
        max_model_len=None if max_model_len == "auto" else parse_count(max_model_len, option="max_model_len"),
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        enable_chunked_prefill=enable_chunked_prefill,
        enable_prefix_caching=enable_prefix_caching,
        block_size=block_size,
        kv_cache_memory_bytes=None
        if kv_cache_memory_bytes is None
        else parse_count(kv_cache_memory_bytes, option="kv_cache_memory_bytes"),
        num_gpu_blocks_override=num_gpu_blocks_override,
        device_memory_utilization=device_memory_utilization,
        cpu_offload_gb=cpu_offload_gb,
        kv_cache_policy=kv_cache_policy,
        kv_cache_dtype=kv_cache_dtype,
        scheduling_policy=scheduling_policy,
        priority_aging_seconds=priority_aging_seconds,
        request_timeout=request_timeout,
        kv_offloading_size=parse_count(kv_offloading_size, option="kv_offloading_size"),
        kv_offloading_disk_size=parse_count(kv_offloading_disk_size, option="kv_offloading_disk_size"),
        kv_offloading_path=None if kv_offloading_path is None else str(kv_offloading_path),
        preemption_mode=preemption_mode,
        speculative=read_speculative(speculative_config),
        max_num_queued_reqs=max_num_queued_reqs,
        max_logprobs=max_logprobs,
        served_model_name=tuple(served_model_name or ()),
        generation_config=generation_config,
        chat_template=chat_template,
        threads=threads,
        cpu_bind=cpu_bind,
        quantization=quantization,
        tensor_parallel=tensor_parallel_size,
        pipeline_parallel=pipeline_parallel_size,
        expert_parallel=enable_expert_parallel,
        distributed_executor=distributed_executor_backend,
        ray_address=ray_address,
        rank_timeout=rank_timeout,
        engine_process=engine_process,
        data_parallel=data_parallel_size,
        data_parallel_routing=data_parallel_routing,
        heartbeat_timeout=heartbeat_timeout,
        max_engine_restarts=max_engine_restarts,
        log_level=log_level,
    )
    server_config = ServerConfig(
        host=host,
        port=port,
        uds=uds,
        api_keys=tuple(api_key or ()),
        allowed_origins=_origins(allowed_origins or []),
        ssl_certfile=ssl_certfile,
        ssl_keyfile=ssl_keyfile,
        shutdown_timeout=shutdown_timeout,
    )
    return _run(engine_config, server_config, log_level)


def _run(engine_config: EngineConfig, server_config: ServerConfig, log_level: str) -> int:
    """Everything is right so far: now import the server, which takes half a second.

    Of the processes that torchrun starts, the first serves; the others compute for it.
    """
    from aios_parallel.launch.torchrun import TorchrunPlace

    place = TorchrunPlace.from_environment(os.environ)
    if place is not None:
        from aios_parallel.mesh import Mesh
        from aios_serve.launching import check_world
        from aios_serve.torchrun_rank import keep_rank

        check_world(Mesh(tensor=engine_config.tensor_parallel, pipeline=engine_config.pipeline_parallel), place)
        if place.rank > 0:
            return keep_rank(place.rank, log_level=log_level)
    from rich.console import Console

    console = Console(stderr=True)
    console.print(f"aios-serve {version('aios-serve')}", highlight=False)

    from aios_serve.logging_setup import configure_logging
    from aios_serve.server import run_server

    configure_logging(log_level, console)
    return run_server(engine_config, server_config, console=console)


def _origins(values: Sequence[str]) -> tuple[str, ...]:
    """Origins as given one by one, or as a JSON list, which is how vLLM takes them."""
    origins: list[str] = []
    for value in values:
        if not value.lstrip().startswith("["):
            origins.append(value)
            continue
        try:
            listed = json.loads(value)
        except ValueError:
            listed = None
        if not isinstance(listed, list) or not all(isinstance(origin, str) for origin in listed):
            raise ConfigError(f"allowed_origins={value!r} cannot be used: write a JSON list of strings, or one origin")
        origins.extend(listed)
    return tuple(origins)


def _in_flags(message: str) -> str:
    """A ConfigError in the words of the command line: `max_model_len=0 ...` becomes `--max-model-len=0 ...`."""
    names = {*EngineConfig.__dataclass_fields__, *ServerConfig.__dataclass_fields__, "tensor_parallel_size"}
    flags = {name: "--" + name.replace("_", "-") for name in names}
    flags |= {
        "tensor_parallel": "--tensor-parallel-size",
        "pipeline_parallel": "--pipeline-parallel-size",
        "expert_parallel": "--enable-expert-parallel",
        "data_parallel": "--data-parallel-size",
        "distributed_executor": "--distributed-executor-backend",
        "speculative": "--speculative-config",
    }
    return re.sub(r"\b[a-z]+(?:_[a-z]+)*\b(?==)|\b[a-z]+(?:_[a-z]+)+\b", lambda m: flags.get(m[0], m[0]), message)


if __name__ == "__main__":
    main()
