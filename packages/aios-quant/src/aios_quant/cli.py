"""The `aios-quant` command: make a quantised checkpoint, or measure what fewer bits cost.

Torch is imported once the options are known to be right: `--help` and a typing error answer at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from aios_model.command_line import Revision, run_command
from aios_model.errors import ConfigError
from aios_quant.progress_bar import progress_bar
from aios_quant.settings import GROUP_SIZES, QuantizeSettings

HELP = """
Makes language models smaller, and tells what that costs.

[bold]Examples[/bold]

  [cyan]aios-quant quantize Qwen/Qwen3-0.6B --scheme int4 --method awq -o qwen3-int4[/cyan]
  four bits a weight, chosen with the help of a small text of our own

  [cyan]aios-quant quantize --scheme int8 -o smollm2-int8[/cyan]
  the bundled model in eight bits, which need no text

  [cyan]aios-quant evaluate --schemes int8,int4 --checkpoint smollm2-int4 --plot sizes.svg[/cyan]
  perplexity, distance to the original, size and speed, as a table and a plot

  [cyan]aios-serve qwen3-int4[/cyan]
  what was made is served like any other model; vLLM and transformers read it too
"""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", help=HELP)
_errors = Console(stderr=True)
SETTINGS = QuantizeSettings()


class Scheme(StrEnum):
    """Values of --scheme."""

    int4 = "int4"
    int8 = "int8"
    int8_a16 = "int8-a16"
    fp8 = "fp8"


class Method(StrEnum):
    """Values of --method."""

    rtn = "rtn"
    awq = "awq"
    gptq = "gptq"
    awq_gptq = "awq-gptq"


class HeadScheme(StrEnum):
    """Values of --head-scheme."""

    none = "none"
    int8 = "int8"


class DType(StrEnum):
    """Values of --dtype."""

    auto = "auto"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Device(StrEnum):
    """Values of --device."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Kernels(StrEnum):
    """Values of --kernels."""

    auto = "auto"
    native = "native"
    torch = "torch"


ModelArgument = Annotated[
    str | None,
    typer.Argument(metavar="MODEL", help="Folder, GGUF file or hub name.", show_default="bundled"),
]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="CPU threads.", show_default="one per core")]
WindowOption = Annotated[int, typer.Option(min=2, help="Tokens of text that are run together.")]


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `aios-quant`; ends the process. Every mistake in the arguments is one line and status 2."""
    run_command(app, "aios-quant", args, in_flags=_in_flags)


@app.command()
def quantize(
    model: ModelArgument = None,
    *,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="FOLDER", help="New folder to write; or one to go on with.")
    ],
    scheme: Annotated[
        Scheme,
        typer.Option(
            help="int4: groups of columns share a scale. int8: a scale per row, inputs become INT8 too while the model "
            "runs; int8-a16 leaves them as they are. fp8: 8-bit floats."
        ),
    ] = Scheme.int4,
    method: Annotated[
        Method,
        typer.Option(
            help="rtn rounds to nearest: fast, and good enough for 8 bits. awq scales up what matters before rounding, "
            "gptq lets each column make up for those before it: much better at 4 bits. awq-gptq does both."
        ),
    ] = Method.rtn,
    calibration: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text that all methods but rtn look at: plain, or .jsonl with text or messages per line.",
            show_default="a small text of our own",
        ),
    ] = None,
    group_size: Annotated[
        int | None,
        typer.Option(
            metavar="|".join(map(str, GROUP_SIZES)),
            help="Columns that share a scale (int4). Smaller is more exact and larger in memory.",
            show_default="64, or 32 where 64 does not divide the rows",
        ),
    ] = None,
    symmetric: Annotated[
        bool, typer.Option("--symmetric/--asymmetric", help="int4: without or with a zero point per group.")
    ] = SETTINGS.symmetric,
    head_scheme: Annotated[
        HeadScheme, typer.Option(help="int8 rounds the output head too; none leaves it.")
    ] = HeadScheme.none,
    dtype: Annotated[
        DType, typer.Option(help="Of embedding, norms and head. auto: the checkpoint's, else bfloat16.")
    ] = DType.auto,
    window: WindowOption = SETTINGS.window,
    num_windows: Annotated[int, typer.Option(min=1, help="Most windows of text to look at.")] = SETTINGS.num_windows,
    device: Annotated[Device, typer.Option(help="Where layers are computed. auto takes a GPU if there is one.")] = (
        Device.auto
    ),
    threads: ThreadsOption = None,
    revision: Revision = None,
    download_dir: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="For downloads, instead of the hub's cache.")
    ] = None,
) -> int:
    """Writes MODEL with fewer bits into a folder, layer by layer.

    Memory holds one layer at a time. Interrupted, the same command goes on where it stopped. The folder is a
    safetensors checkpoint in the compressed-tensors convention: aios-serve, vLLM and transformers load it.

    [dim]aios-quant quantize --scheme int4 --method gptq --group-size 32 -o smollm2-int4[/dim]
    """
    settings = QuantizeSettings(
        scheme=scheme.value,
        method=method.value,
        group_size=group_size,
        symmetric=symmetric,
        head_scheme=head_scheme.value,
        dtype=dtype.value,
        window=window,
        num_windows=num_windows,
    )
    _import_torch(threads)
    from aios_quant.convert import quantize_checkpoint

    with progress_bar("quantising") as progress:
        report = quantize_checkpoint(
            model,
            output,
            settings,
            calibration=calibration,
            revision=revision,
            download_dir=None if download_dir is None else str(download_dir),
            device=device.value,
            progress=progress,
        )
    resumed = f", {report.num_resumed} of them earlier" if report.num_resumed else ""
    text = f" with {report.num_tokens:,} tokens of text" if report.num_tokens else ""
    typer.echo(
        f"{report.output}: {report.num_layers} layers{resumed}, {report.num_bytes / 1e6:,.1f} MB, "
        f"{report.seconds:.1f} s{text}"
    )
    typer.echo(f"run it: aios-serve {report.output}")
    return 0


@app.command()
def evaluate(
    model: ModelArgument = None,
    *,
    schemes: Annotated[
        str, typer.Option(metavar="NAME,…", help="Schemes to load MODEL in: int8, int4, int4-g32-asym, fp8, as-stored.")
    ] = "int8,int4",
    checkpoint: Annotated[
        list[Path] | None,
        typer.Option(metavar="FOLDER", help="A quantised checkpoint of MODEL to compare; may be given several times."),
    ] = None,
    weight_only: Annotated[
        bool, typer.Option("--weight-only", help="Leave inputs as they are: what rounding the weights alone costs.")
    ] = False,
    text: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Text to predict: plain, or .jsonl with text or messages per line.",
            show_default="a small text of our own",
        ),
    ] = None,
    window: WindowOption = 512,
    num_windows: Annotated[int, typer.Option(min=1, help="Most windows of text to predict.")] = 16,
    num_answers: Annotated[int, typer.Option(min=1, help="Greedy answers to compare and to time.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens of each answer.")] = 64,
    kernels: Annotated[
        Kernels, typer.Option(help="auto takes native kernels where there are any; torch is the reference.")
    ] = Kernels.auto,
    threads: ThreadsOption = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write all figures here, unrounded.")] = None,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw size against KL divergence here, as SVG.")] = (
        None
    ),
) -> int:
    """Compares MODEL in several schemes with the original: quality, size and speed.

    Perplexity is the usual figure; KL divergence is the finest, and 0 for the original itself. "Same token" is how
    often the likeliest token stays the same, "common prefix" how long a greedy answer does.

    [dim]aios-quant evaluate --schemes int8,int4,int4-g32-asym --json figures.json --plot sizes.svg[/dim]
    """
    from aios_quant.schemes.registry import SCHEME_NAMES

    names = [name.strip() for name in schemes.split(",") if name.strip()]
    unknown = [name for name in names if name not in SCHEME_NAMES]
    if unknown:
        raise ConfigError(f"--schemes knows no {unknown[0]!r}; choose among {', '.join(SCHEME_NAMES)}")
    missing = [str(path) for path in checkpoint or [] if not path.exists()]
    if missing:
        raise ConfigError(f"there is no checkpoint {missing[0]}; name the folder that aios-quant quantize wrote")
    _import_torch(threads)
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_model.weights.hub import resolve_model
    from aios_quant.calibrate.data import read_windows
    from aios_quant.evaluate import Candidate, EvaluationSettings
    from aios_quant.evaluate import evaluate as measure
    from aios_quant.evaluate_report import report_table, write_json, write_plot

    tokenizer = Tokenizer.from_files(resolve_model(model))
    windows = read_windows(tokenizer, text, bundled="evaluation", length=window, limit=num_windows)
    suffix = "-a16" if weight_only else ""
    candidates = [
        *(Candidate(name=_with(suffix, name), model=None, scheme=_with(suffix, name)) for name in names),
        *(Candidate(name=path.name, model=str(path), scheme=f"as-stored{suffix}") for path in checkpoint or []),
    ]
    with progress_bar("evaluating") as progress:
        report = measure(
            model,
            candidates,
            windows.tokens_WS,
            text=windows.name,
            settings=EvaluationSettings(
                num_answers=num_answers, num_new_tokens=max_tokens, kernels=kernels.value, threads=threads
            ),
            progress=progress,
        )
    Console().print(report_table(report))
    if json is not None:
        write_json(report, json)
    if plot is not None:
        write_plot(report, plot)
    return 0


def _with(suffix: str, scheme: str) -> str:
    return scheme if scheme.endswith("-a16") or scheme in ("none", "fp8") else scheme + suffix


def _import_torch(threads: int | None) -> None:
    with _errors.status("importing torch…"):
        import torch
    if threads is not None:
        torch.set_num_threads(threads)


def _in_flags(message: str) -> str:
    """A ConfigError in the words of the command line: `group_size = 48; …` becomes `--group-size = 48; …`."""
    flags = {name: "--" + name.replace("_", "-") for name in QuantizeSettings.__dataclass_fields__}
    return re.sub(r"\b[a-z]+\b(?= = )|\b[a-z]+(?:_[a-z]+)+\b", lambda match: flags.get(match[0], match[0]), message)


if __name__ == "__main__":
    main()
