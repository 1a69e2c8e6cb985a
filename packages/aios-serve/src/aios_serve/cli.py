"""`aios-serve`: every flag of the server. Options become EngineConfig and ServerConfig, which know what is allowed.

Nothing heavy is imported before the arguments are known to be right: `--help` and a typing error answer at once.
"""

from __future__ import annotations

import json
import os
import re
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from aios_model.command_line import run_command
from aios_model.errors import ConfigError
from aios_parallel.launch.torchrun import TorchrunPlace
from aios_parallel.mesh import Mesh
from aios_serve.config import EngineConfig, parse_count, read_speculative
from aios_serve.launching import check_world
from aios_serve.server_config import ServerConfig
from aios_serve.torchrun_rank import keep_rank

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


class LoadFormat(StrEnum):
    """Values of --load-format."""

    auto = "auto"
    safetensors = "safetensors"
    gguf = "gguf"
    dummy = "dummy"


class DType(StrEnum):
    """Values of --dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"
    float64 = "float64"


class Device(StrEnum):
    """Values of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class PreemptionMode(StrEnum):
    """Values of --preemption-mode."""

    auto = "auto"
    recompute = "recompute"
    swap = "swap"


class KVCachePolicy(StrEnum):
    """Values of --kv-cache-policy."""

    paged = "paged"
    contiguous = "contiguous"


class KVCacheDType(StrEnum):
    """Values of --kv-cache-dtype."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    int8 = "int8"
    fp8 = "fp8"
    fp8_e4m3 = "fp8_e4m3"


class ExecutorBackend(StrEnum):
    """Values of --distributed-executor-backend."""

    auto = "auto"
    mp = "mp"
    torchrun = "torchrun"
    ray = "ray"


class DataParallelRouting(StrEnum):
    """Values of --data-parallel-routing."""

    prefix_affinity = "prefix-affinity"
    least_loaded = "least-loaded"
    session = "session"
    round_robin = "round-robin"


class SchedulingPolicy(StrEnum):
    """Values of --scheduling-policy."""

    fcfs = "fcfs"
    priority = "priority"
    fair = "fair"
    prefix = "prefix"


class LogLevel(StrEnum):
    """Values of --log-level."""

    debug = "debug"
    info = "info"
    warning = "warning"
    error = "error"


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `aios-serve`; ends the process. Every mistake in the arguments is one line and status 2."""
    run_command(app, "aios-serve", args, in_flags=_in_flags)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aios-serve {version('aios-serve')}")
        raise typer.Exit


_MODEL, _HTTP, _MEMORY, _BATCHING = "Model", "HTTP", "Memory", "Batching"
_PARALLEL, _PROCESS = "Parallelism", "Process"


def _option(*names: str, panel: str, help: str, **settings: object) -> typer.models.OptionInfo:
    return typer.Option(*names, rich_help_panel=panel, help=help, **settings)  # type: ignore[arg-type]


@app.command(help=HELP)
def serve(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder, GGUF file or hub name.", show_default="bundled")
    ] = None,
    *,
    served_model_name: Annotated[
        list[str] | None,
        _option(
            "--served-model-name",
            panel=_MODEL,
            metavar="NAME",
            help="What requests call the model. Can be given several times; the first stands in answers.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None, _option("--tokenizer", panel=_MODEL, help="Take the tokenizer from here instead.")
    ] = None,
    revision: Annotated[
        str | None, _option("--revision", panel=_MODEL, help="Branch, tag or commit on the hub.")
    ] = None,
    download_dir: Annotated[
        Path | None, _option("--download-dir", panel=_MODEL, help="Folder for downloads, instead of the hub's cache.")
    ] = None,
    load_format: Annotated[
        LoadFormat,
        _option("--load-format", panel=_MODEL, help="Which weights to read. dummy draws random ones."),
    ] = LoadFormat.auto,
    quantization: Annotated[
        str,
        _option(
            "--quantization",
            "-q",
            panel=_MODEL,
            metavar="SCHEME",
            help="Bits per weight: int8, int4, int4-g32, fp8, as-stored (a packed file as it is), none. "
            "auto: on a CPU as-stored for packed files, int8 for others.",
        ),
    ] = ENGINE.quantization,
    dtype: Annotated[
        DType,
        _option(
            "--dtype",
            panel=_MODEL,
            help="Numbers to compute with, and weights unless quantised. auto: float32 on CPU, else the file's.",
        ),
    ] = DType.auto,
    device: Annotated[
        Device, _option("--device", panel=_MODEL, help="auto takes a GPU if there is one.")
    ] = Device.auto,
    max_model_len: Annotated[
        str,
        _option(
            "--max-model-len",
            panel=_MODEL,
            metavar="TOKENS",
            help="Longest prompt plus answer: 8192, 8k, or auto for what the model and the memory allow.",
        ),
    ] = "auto",
    generation_config: Annotated[
        str,
        _option(
            "--generation-config",
            panel=_MODEL,
            metavar="auto|none|FOLDER",
            help="Where sampling defaults come from: the model (auto), nowhere (none), or a folder.",
        ),
    ] = ENGINE.generation_config,
    chat_template: Annotated[
        str | None,
        _option("--chat-template", panel=_MODEL, metavar="FILE", help="Jinja template to use instead of the model's."),
    ] = None,
    max_logprobs: Annotated[
        int, _option("--max-logprobs", panel=_MODEL, help="Most alternatives per token that a request may ask for.")
    ] = ENGINE.max_logprobs,
    seed: Annotated[
        int, _option("--seed", panel=_MODEL, help="Seeds requests that bring no seed of their own, and dummy weights.")
    ] = ENGINE.seed or 0,
    host: Annotated[
        str, _option("--host", panel=_HTTP, help="Address to listen on. 0.0.0.0 opens the server to the network.")
    ] = SERVER.host,
    port: Annotated[int, _option("--port", panel=_HTTP, help="TCP port; 0 takes a free one.")] = SERVER.port,
    uds: Annotated[
        Path | None, _option("--uds", panel=_HTTP, help="Listen on this Unix domain socket instead of a port.")
    ] = None,
    api_key: Annotated[
        list[str] | None,
        _option(
            "--api-key",
            panel=_HTTP,
            metavar="KEY",
            envvar="AIOS_API_KEY",
            help="Ask every request for a key. Can be given several times. The variable hides it from `ps`.",
        ),
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        _option(
            "--allowed-origins",
            panel=_HTTP,
            metavar="ORIGIN",
            help='Web pages that may call the server (CORS): an origin, several times, or a JSON list; "*" for all.',
        ),
    ] = None,
    ssl_certfile: Annotated[
        Path | None, _option("--ssl-certfile", panel=_HTTP, help="Certificate chain (PEM): turns on HTTPS.")
    ] = None,
    ssl_keyfile: Annotated[
        Path | None, _option("--ssl-keyfile", panel=_HTTP, help="Private key of the certificate (PEM).")
    ] = None,
    shutdown_timeout: Annotated[
        float,
        _option("--shutdown-timeout", panel=_HTTP, help="Seconds that requests may go on after SIGTERM or Ctrl+C."),
    ] = SERVER.shutdown_timeout,
    device_memory_utilization: Annotated[
        float | None,
        _option(
            "--device-memory-utilization",
            "--gpu-memory-utilization",
            panel=_MEMORY,
            show_default="GPU 0.9, CPU 0.25",
            help="Share of the memory to use: on a GPU for everything, on the CPU for the KV cache.",
        ),
    ] = None,
    kv_cache_memory_bytes: Annotated[
        str | None,
        _option("--kv-cache-memory-bytes", panel=_MEMORY, metavar="BYTES", help="Size of the KV cache, such as 4GiB."),
    ] = None,
    cpu_offload_gb: Annotated[
        float,
        _option(
            "--cpu-offload-gb",
            panel=_MEMORY,
            metavar="GIB",
            help="GiB of weights of each GPU that stay in host memory, in whole layers that stream in ahead of use.",
        ),
    ] = ENGINE.cpu_offload_gb,
    num_gpu_blocks_override: Annotated[
        int | None,
        _option("--num-gpu-blocks-override", panel=_MEMORY, help="Number of KV pages, whatever the memory; CPU too."),
    ] = None,
    block_size: Annotated[int, _option("--block-size", panel=_MEMORY, help="Tokens per KV page.")] = ENGINE.block_size,
    enable_prefix_caching: Annotated[
        bool,
        _option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            panel=_MEMORY,
            help="Keep the pages of finished prompts, so that prompts that begin alike are not computed again.",
        ),
    ] = ENGINE.enable_prefix_caching,
    kv_cache_policy: Annotated[
        KVCachePolicy,
        _option(
            "--kv-cache-policy",
            panel=_MEMORY,
            help="contiguous reserves a whole context per request: the naive way, to compare with.",
        ),
    ] = KVCachePolicy.paged,
    kv_cache_dtype: Annotated[
        KVCacheDType,
        _option(
            "--kv-cache-dtype",
            panel=_MEMORY,
            help="Numbers in the KV pages. auto: bfloat16 with native kernels, else what the model computes with. "
            "fp8_e4m3 is fp8.",
        ),
    ] = KVCacheDType.auto,
    kv_offloading_size: Annotated[
        str,
        _option(
            "--kv-offloading-size",
            panel=_MEMORY,
            metavar="BYTES",
            help="Host memory for pages that the pool has no room for, such as 4GiB: evicted ones, preempted ones.",
        ),
    ] = "0",
    kv_offloading_disk_size: Annotated[
        str,
        _option(
            "--kv-offloading-disk-size", panel=_MEMORY, metavar="BYTES", help="Disk for pages that leave host memory."
        ),
    ] = "0",
    kv_offloading_path: Annotated[
        Path | None,
        _option(
            "--kv-offloading-path",
            "--kv-offloading-dir",
            panel=_MEMORY,
            show_default="temporary files",
            help="Folder for that; the file has no name and is gone when the engine is.",
        ),
    ] = None,
    preemption_mode: Annotated[
        PreemptionMode,
        _option(
            "--preemption-mode",
            panel=_MEMORY,
            help="Save a preempted request's pages there, or compute them again. auto: what is faster.",
        ),
    ] = PreemptionMode.auto,
    max_num_seqs: Annotated[
        int, _option("--max-num-seqs", panel=_BATCHING, help="Requests that run at once.")
    ] = ENGINE.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int | None,
        _option(
            "--max-num-batched-tokens",
            panel=_BATCHING,
            show_default="CPU 256, GPU 2048",
            help="Tokens per step: more reads prompts faster, fewer keeps answers flowing meanwhile.",
        ),
    ] = None,
    enable_chunked_prefill: Annotated[
        bool,
        _option(
            "--enable-chunked-prefill/--no-enable-chunked-prefill",
            panel=_BATCHING,
            help="Read long prompts in pieces between the steps of other requests.",
        ),
    ] = ENGINE.enable_chunked_prefill,
    scheduling_policy: Annotated[
        SchedulingPolicy,
        _option(
            "--scheduling-policy",
            panel=_BATCHING,
            help="Who goes first: by arrival (fcfs), by the requests' priorities and their age (priority), whoever was "
            "served least (fair), or cached prompts (prefix).",
        ),
    ] = SchedulingPolicy.fcfs,
    priority_aging_seconds: Annotated[
        float | None,
        _option(
            "--priority-aging-seconds",
            panel=_BATCHING,
            show_default="10",
            help="With --scheduling-policy priority: seconds of waiting that count like one level of priority.",
        ),
    ] = None,
    request_timeout: Annotated[
        float | None,
        _option(
            "--request-timeout",
            panel=_BATCHING,
            metavar="SECONDS",
            show_default="none",
            help='Longest that a request may wait and run; it then ends with finish_reason "timeout".',
        ),
    ] = None,
    max_num_queued_reqs: Annotated[
        int, _option("--max-num-queued-reqs", panel=_BATCHING, help="Requests that may wait; more get a 503.")
    ] = ENGINE.max_num_queued_reqs or 0,
    speculative_config: Annotated[
        str | None,
        _option(
            "--speculative-config",
            panel=_BATCHING,
            metavar="JSON",
            show_default="none",
            help="Guess tokens ahead and check them together, for the same output in fewer steps, such as "
            '\'{"method": "ngram", "num_speculative_tokens": 4}\'.',
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int,
        _option(
            "--tensor-parallel-size",
            "-tp",
            panel=_PARALLEL,
            help="Ranks that share each layer: GPUs, or processes on the CPU.",
        ),
    ] = ENGINE.tensor_parallel,
    pipeline_parallel_size: Annotated[
        int,
        _option(
            "--pipeline-parallel-size",
            "-pp",
            panel=_PARALLEL,
            help="Stages that hold some of the layers each, every one of them a tensor-parallel group.",
        ),
    ] = ENGINE.pipeline_parallel,
    enable_expert_parallel: Annotated[
        bool,
        _option(
            "--enable-expert-parallel/--no-enable-expert-parallel",
            panel=_PARALLEL,
            help="Deal the experts of a mixture out to the ranks, rather than cutting each of them.",
        ),
    ] = ENGINE.expert_parallel,
    distributed_executor_backend: Annotated[
        ExecutorBackend,
        _option(
            "--distributed-executor-backend",
            panel=_PARALLEL,
            help="Who starts the ranks: this process (mp), torchrun on several hosts, or a Ray cluster. "
            "auto: torchrun under torchrun, else mp.",
        ),
    ] = ExecutorBackend.auto,
    ray_address: Annotated[
        str | None,
        _option(
            "--ray-address",
            panel=_PARALLEL,
            metavar="HOST:PORT",
            help="Of the Ray cluster; default: the one this host belongs to.",
        ),
    ] = None,
    rank_timeout: Annotated[
        float,
        _option(
            "--rank-timeout",
            panel=_PARALLEL,
            help="Seconds without a sign of life, or of progress, after which a rank counts as lost.",
        ),
    ] = ENGINE.rank_timeout,
    threads: Annotated[
        int | None,
        _option(
            "--threads", panel=_PROCESS, show_default="one per core", help="CPU threads of the engine, of each rank."
        ),
    ] = None,
    cpu_bind: Annotated[
        str,
        _option(
            "--cpu-bind",
            panel=_PROCESS,
            metavar="auto|none|LIST",
            help="Bind the threads to cores: auto fills one NUMA node first, or a list such as 0-3,8.",
        ),
    ] = ENGINE.cpu_bind,
    engine_process: Annotated[
        bool,
        _option(
            "--engine-process/--no-engine-process",
            panel=_PROCESS,
            help="Run the engine in a process of its own. Off, one process does all, for debugging.",
        ),
    ] = ENGINE.engine_process,
    data_parallel_size: Annotated[
        int,
        _option(
            "--data-parallel-size",
            "-dp",
            panel=_PROCESS,
            help="Engines that serve the same model behind this endpoint, each with weights and KV cache of its own.",
        ),
    ] = ENGINE.data_parallel,
    data_parallel_routing: Annotated[
        DataParallelRouting,
        _option(
            "--data-parallel-routing",
            panel=_PROCESS,
            help="Which of them gets a request: the one that knows the longest prefix of its prompt unless it is far "
            "busier, the least loaded, the same one for a session (X-Session-Id), or each in turn.",
        ),
    ] = DataParallelRouting.prefix_affinity,
    heartbeat_timeout: Annotated[
        float,
        _option(
            "--heartbeat-timeout",
            panel=_PROCESS,
            help="Seconds without a sign of life after which the engine counts as stuck and is started again.",
        ),
    ] = ENGINE.heartbeat_timeout,
    max_engine_restarts: Annotated[
        int,
        _option(
            "--max-engine-restarts",
            panel=_PROCESS,
            help="Restarts of an engine that died, within ten minutes, before it stays dead; 0 for none.",
        ),
    ] = ENGINE.max_engine_restarts,
    log_level: Annotated[
        LogLevel, _option("--log-level", panel=_PROCESS, help="How much the server says.")
    ] = LogLevel.info,
    version: Annotated[
        bool,
        _option("--version", panel=_PROCESS, help="Show the version and leave.", callback=_show_version, is_eager=True),
    ] = False,
) -> int:
    """Check the options and serve; returns the exit status."""
    engine_config = EngineConfig(
        model=model,
        tokenizer=tokenizer,
        revision=revision,
        download_dir=None if download_dir is None else str(download_dir),
        load_format=load_format.value,
        dtype=dtype.value,
        device=device.value,
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
        kv_cache_policy=kv_cache_policy.value,
        kv_cache_dtype=kv_cache_dtype.value,
        scheduling_policy=scheduling_policy.value,
        priority_aging_seconds=priority_aging_seconds,
        request_timeout=request_timeout,
        kv_offloading_size=parse_count(kv_offloading_size, option="kv_offloading_size"),
        kv_offloading_disk_size=parse_count(kv_offloading_disk_size, option="kv_offloading_disk_size"),
        kv_offloading_path=None if kv_offloading_path is None else str(kv_offloading_path),
        preemption_mode=preemption_mode.value,
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
        distributed_executor=distributed_executor_backend.value,
        ray_address=ray_address,
        rank_timeout=rank_timeout,
        engine_process=engine_process,
        data_parallel=data_parallel_size,
        data_parallel_routing=data_parallel_routing.value,
        heartbeat_timeout=heartbeat_timeout,
        max_engine_restarts=max_engine_restarts,
        log_level=log_level.value,
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
    return _run(engine_config, server_config, log_level.value)


def _run(engine_config: EngineConfig, server_config: ServerConfig, log_level: str) -> int:
    """Everything is right so far: now import the server, which takes half a second.

    Of the processes that torchrun starts, the first serves; the others compute for it.
    """
    place = TorchrunPlace.from_environment(os.environ)
    if place is not None:
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
