"""The `aios-bench` command. Nothing heavy is imported before the arguments are known to be right."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from aios_model.errors import AiosError
from aios_model.native.cores import usable_cores
from aios_serve.bench.engines import choose_engines, choose_precisions
from aios_serve.bench.work import DEFAULT_WORK, parse_works
from aios_serve.config import Device, DType, ExecutorBackend, KVCacheDType, LoadFormat, parse_count

app = typer.Typer(
    name="aios-bench",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="How fast is it? Beside other engines (peers), and beside what the machine allows (roofline).",
)
_console = Console(stderr=True)
_ENGINE = "Engine"

ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A GGUF file, or random:1b or random:3b for a Llama of that size with random weights.",
        show_default="bundled",
    ),
]
ThreadsOption = Annotated[
    int | None, typer.Option("--threads", min=1, help="Threads of every engine.", show_default="one per core")
]


def main() -> None:
    """Entry point: prints an AiosError as one line and exits with 1."""
    try:
        app()
    except AiosError as error:
        _console.print(f"aios-bench: {error}", style="red", highlight=False, markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


@app.command()
def peers(
    engines: Annotated[
        str, typer.Option(help="Who takes part: aios, llama.cpp, openvino, transformers, vllm.")
    ] = "aios,llama.cpp,openvino,transformers",
    work: Annotated[
        str, typer.Option(help="decode-SEQUENCES, decode-SEQUENCES@PROMPT, prefill-TOKENS, memory.")
    ] = DEFAULT_WORK,
    precision: Annotated[str, typer.Option(help="Of the weights.")] = "4bit,8bit,bf16",
    model: ModelOption = None,
    threads: ThreadsOption = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds through all engines; medians are shown.")] = 3,
    seconds: Annotated[
        float, typer.Option(min=0, help="Repeat short work within a process until it has taken this long.")
    ] = 3.0,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which one process is given up.")] = 900.0,
    output: Annotated[Path, typer.Option(metavar="FOLDER", help="Where peers.json, peers.md and peers.svg go.")] = Path(
        "benchmark-results"
    ),
) -> None:
    """Compares AIOS with other engines: same model, same threads, same tokens, in alternation.

    Each peer is installed by uv into an environment of its own below ~/.cache/aios/bench (or $AIOS_CACHE_DIR/bench);
    llama.cpp is compiled there, which takes minutes. Every measurement is a fresh process, warmed up.

    [dim]aios-bench peers --engines aios,llama.cpp --work decode-1,prefill-512 --precision 4bit[/dim]
    """
    from aios_serve.bench.peers import PeersConfig, run_peers

    config = PeersConfig(
        model=model,
        engines=choose_engines(engines),
        precisions=choose_precisions(precision),
        works=parse_works(work),
        threads=threads or usable_cores(),
        repeats=repeats,
        seconds=seconds,
        timeout=timeout,
        output=output,
    )
    raise typer.Exit(run_peers(config, _console))


@app.command()
def roofline(
    model: ModelOption = None,
    quantization: Annotated[
        str, typer.Option(help="Schemes of the weights, as of aios-serve --quantization, with commas between.")
    ] = "as-stored,int8",
    work: Annotated[
        str, typer.Option(help="decode-SEQUENCES or decode-SEQUENCES@PROMPT, with commas between.")
    ] = "decode-1,decode-16",
    kv_cache_dtype: Annotated[str, typer.Option(help="As of aios-serve.")] = "auto",
    threads: ThreadsOption = None,
    seconds: Annotated[float, typer.Option(min=0, help="Measure each work for at least this long.")] = 3.0,
    output: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write JSON here.")] = None,
) -> None:
    """Measures what this machine can read and compute, and how much of it decoding reaches.

    [dim]aios-bench roofline --quantization as-stored,int8 --work decode-1,decode-1@4096,decode-32[/dim]
    """
    from aios_serve.bench.roofline import parse_roofline_works, run_roofline

    works = parse_roofline_works(work)
    status = run_roofline(
        model=model,
        quantizations=[name.strip() for name in quantization.split(",") if name.strip()],
        works=works,
        engine_options={"kv_cache_dtype": kv_cache_dtype},
        threads=threads or usable_cores(),
        seconds=seconds,
        output=output,
        console=_console,
    )
    raise typer.Exit(status)


@app.command()
def ranks(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="Folder, GGUF file or hub name; random:1b or random:3b for a Llama with random weights.",
            show_default="bundled",
        ),
    ] = None,
    *,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 8,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Length of each prompt.")] = 512,
    output_tokens: Annotated[int, typer.Option(min=2, help="Tokens that each sequence gets.")] = 32,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE.json", help="Write the timeline here, for https://ui.perfetto.dev.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE.svg", help="Draw it here.")] = None,
    tensor_parallel_size: Annotated[
        int,
        typer.Option(
            "--tensor-parallel-size", "-tp", min=1, help="Ranks that share each layer.", rich_help_panel=_ENGINE
        ),
    ] = 2,
    pipeline_parallel_size: Annotated[
        int,
        typer.Option("--pipeline-parallel-size", "-pp", min=1, help="Stages of the pipeline.", rich_help_panel=_ENGINE),
    ] = 1,
    enable_expert_parallel: Annotated[
        bool,
        typer.Option("--enable-expert-parallel", help="Deal the experts of a mixture out.", rich_help_panel=_ENGINE),
    ] = False,
    distributed_executor_backend: Annotated[
        ExecutorBackend, typer.Option(help="Who starts the ranks, as of aios-serve.", rich_help_panel=_ENGINE)
    ] = "auto",
    ray_address: Annotated[
        str | None, typer.Option(metavar="HOST:PORT", help="Of the Ray cluster.", rich_help_panel=_ENGINE)
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Threads of each rank.", show_default="its share of the cores", rich_help_panel=_ENGINE
        ),
    ] = None,
    cpu_bind: Annotated[
        str, typer.Option(help="Cores for the threads: none, auto, or a list.", rich_help_panel=_ENGINE)
    ] = "none",
    device: Annotated[Device, typer.Option(help="auto takes GPUs if there are any.", rich_help_panel=_ENGINE)] = "auto",
    dtype: Annotated[DType, typer.Option(help="As of aios-serve.", rich_help_panel=_ENGINE)] = "auto",
    load_format: Annotated[
        LoadFormat, typer.Option(help="Which weights to read; dummy draws random ones.", rich_help_panel=_ENGINE)
    ] = "auto",
    quantization: Annotated[
        str, typer.Option("--quantization", "-q", help="Scheme of the weights.", rich_help_panel=_ENGINE)
    ] = "auto",
    kv_cache_dtype: Annotated[
        KVCacheDType, typer.Option(help="Numbers in the pages.", rich_help_panel=_ENGINE)
    ] = "auto",
    kv_cache_memory_bytes: Annotated[
        str | None, typer.Option(metavar="BYTES", help="Size of the KV cache, such as 4GiB.", rich_help_panel=_ENGINE)
    ] = None,
    max_model_len: Annotated[
        str, typer.Option(metavar="TOKENS", help="Longest prompt plus answer, or auto.", rich_help_panel=_ENGINE)
    ] = "auto",
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens per step.", show_default="CPU 256, GPU 2048", rich_help_panel=_ENGINE),
    ] = None,
) -> None:
    """Shows where the time of a group of ranks goes: compute, communication, idle, in prefill and in decode.

    [dim]aios-bench ranks --tensor-parallel-size 2 --trace ranks.json --plot ranks.svg[/dim]
    """
    from aios_serve.bench.ranks import RanksWork, run_ranks

    work = RanksWork(batch=batch, prompt_tokens=prompt_tokens, output_tokens=output_tokens)
    memory, length = kv_cache_memory_bytes, max_model_len
    options = {
        "model": model,
        "tensor_parallel": tensor_parallel_size,
        "pipeline_parallel": pipeline_parallel_size,
        "expert_parallel": enable_expert_parallel,
        "distributed_executor": distributed_executor_backend,
        "ray_address": ray_address,
        "threads": threads,
        "cpu_bind": cpu_bind,
        "device": device,
        "dtype": dtype,
        "load_format": load_format,
        "quantization": quantization,
        "kv_cache_dtype": kv_cache_dtype,
        "kv_cache_memory_bytes": None if memory is None else parse_count(memory, option="kv_cache_memory_bytes"),
        "max_model_len": None if length == "auto" else parse_count(length, option="max_model_len"),
        "max_num_batched_tokens": max_num_batched_tokens,
    }
    raise typer.Exit(run_ranks(options, work, trace=trace, plot=plot, console=Console()))


if __name__ == "__main__":
    main()
