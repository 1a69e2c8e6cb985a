"""The `aios-model` command: answer a prompt, or do the arithmetic of a model. Torch is imported when it is needed."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from aios_model.command_line import Revision
from aios_model.errors import AiosError
from aios_model.weights.hub import LoadFormat

if TYPE_CHECKING:
    from aios_model.model import LoadedModel, Progress
    from aios_model.sampling.params import SamplingParams

app = typer.Typer(
    name="aios-model",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    help="Runs a language model in this terminal, or shows what it weighs and what a token costs.",
)
_errors = Console(stderr=True)

ModelOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help="Folder, .gguf file or hub id; the bundled SmolLM2-135M-Instruct by default."),
]


def main() -> None:
    """Entry point: prints an AiosError as one line and exits with 1."""
    try:
        app()
    except AiosError as error:
        _fail(error)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to continue or answer; - reads it from standard input.")],
    model: ModelOption = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Treat PROMPT as a message and apply the chat template.")
    ] = False,
    system: Annotated[str | None, typer.Option(help="System message; implies --chat.")] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", "-n", min=1, help="Longest answer, in tokens.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(help="0 always takes the likeliest token. [default: model's]")
    ] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that hold this mass.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from this many of the likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this share of the likeliest one's.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1 discourages repeated tokens.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes a drawn answer repeatable.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the answer; may be given several times.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option(help="Go on after the end token, for measuring.")] = False,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16 or float64.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    load_format: Annotated[LoadFormat, typer.Option(help="Which weights to read; dummy draws random ones.")] = "auto",
    revision: Revision = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of the processor; all cores by default.")] = None,
    stats: Annotated[bool, typer.Option("--stats", help="End with speed, memory and the share of the limit.")] = False,
) -> None:
    """Streams the model's answer to PROMPT.

    [dim]aios-model generate "The capital of France is" --temperature 0 --stats[/dim]
    [dim]aios-model generate --chat "Write a haiku about memory." --seed 7[/dim]
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    with _errors.status("importing torch…"):
        import torch
    if threads is not None:
        torch.set_num_threads(threads)
    from aios_model.model import load_model

    with _errors.status("loading…") as status:
        loaded = load_model(
            model,
            revision=revision,
            dtype=dtype,
            device=device,
            load_format=load_format,
            progress=_show_progress(status.update),
        )
    params = _sampling_params(
        loaded,
        {
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
            "stop": tuple(stop or ()),
            "ignore_eos": ignore_eos,
        },
    )
    _stream(loaded, _prompt_token_ids(loaded, text, chat=chat, system=system), params, stats=stats)


@app.command()
def inspect(
    model: Annotated[
        str | None, typer.Argument(help="Folder, .gguf file or hub id; the bundled model by default.")
    ] = None,
    hardware: Annotated[
        list[str] | None,
        typer.Option(help="'this' measures this machine; or a datasheet: h200, h100, a100, l40s, l4, t4, rtx4090, …"),
    ] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="Memory in GB; tells what fits in it.")] = None,
    context: Annotated[int, typer.Option(min=1, help="Tokens in the cache for the figures per token.")] = 2048,
    revision: Revision = None,
) -> None:
    """Prints parameters by part, bytes, FLOPs and KV cache per token, what fits, and the roofline's tok/s.

    [dim]aios-model inspect Qwen/Qwen3-8B --hardware h100 --memory 80[/dim]
    """
    from aios_model.config_file import read_model_config
    from aios_model.hardware import find_hardware
    from aios_model.inspect_report import print_report
    from aios_model.weights.hub import resolve_model

    files = resolve_model(model, revision=revision, tokenizer_only=True)
    config = read_model_config(files, allow_quantized=True)
    machines = [find_hardware(name) for name in hardware or []]
    print_report(Console(), files, config, machines, memory_gb=memory, context=min(context, config.max_context_length))


def _sampling_params(model: LoadedModel, options: dict[str, object]) -> SamplingParams:
    """What was asked for, over what the model's authors recommend."""
    from aios_model.sampling.params import SamplingParams

    defaults = model.generation_defaults
    for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
        if options[name] is None:
            options[name] = getattr(defaults, name)
    return SamplingParams(**{name: value for name, value in options.items() if value is not None})  # type: ignore[arg-type]


def _prompt_token_ids(model: LoadedModel, text: str, *, chat: bool, system: str | None) -> list[int]:
    if not chat and system is None:
        return model.tokenizer.encode(text)
    messages = [{"role": "system", "content": system}] if system is not None else []
    return model.tokenizer.encode_chat([*messages, {"role": "user", "content": text}])


def _stream(model: LoadedModel, prompt_token_ids: list[int], params: SamplingParams, *, stats: bool) -> None:
    from aios_model.generate import generate_text
    from aios_model.generation_stats import GenerationTimer

    timer = GenerationTimer()
    out = sys.stdout
    try:
        for piece in generate_text(model, prompt_token_ids, params):
            timer.tick()
            out.write(piece.text)
            out.flush()
    except KeyboardInterrupt:
        _errors.print("\n[yellow]stopped[/yellow]")
    out.write("\n")
    if stats:
        _errors.print(timer.report(model, num_prompt_tokens=len(prompt_token_ids)))


def _show_progress(update: Callable[[str], None]) -> Progress:
    return lambda stage, share: update(f"{stage} {share:.0%}" if share else f"{stage}…")


def _fail(error: AiosError) -> NoReturn:
    _errors.print(f"[red]error:[/red] {error}", highlight=False, soft_wrap=True)
    raise SystemExit(1)


if __name__ == "__main__":
    main()
