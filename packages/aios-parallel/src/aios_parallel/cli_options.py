"""Options that the commands of `aios-parallel` share, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

HARDWARE = "Hardware"
WORK = "Work"
CHOICE = "What to look for"
OUTPUT = "Output"


KVCacheDType = Literal["auto", "float32", "bfloat16", "int8", "fp8"]
Objective = Literal["throughput", "latency", "devices"]

ModelArgument = Annotated[
    str | None,
    typer.Argument(
        metavar="MODEL", help="Folder (config.json is enough), GGUF file or hub name.", show_default="bundled"
    ),
]
DeviceType = Annotated[
    str,
    typer.Option(
        rich_help_panel=HARDWARE,
        metavar="NAME",
        help="cpu measures this machine; b200, h200, h100, mi300x, a100-80, a100-40, l40s, l4, t4, rtx-4090 and "
        "rtx-3090 come from datasheets.",
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=HARDWARE, metavar="BYTES", help="Of one device: 80GB, 80GiB.", show_default="datasheet"
    ),
]
Bandwidth = Annotated[
    str | None,
    typer.Option(rich_help_panel=HARDWARE, metavar="BYTES/s", help="Of its memory.", show_default="datasheet"),
]
Flops = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=HARDWARE,
        metavar="FLOPS",
        help="Dense 16-bit operations per second, such as 989T; other rates change alike.",
        show_default="datasheet",
    ),
]
Interconnect = Annotated[
    str,
    typer.Option(
        rich_help_panel=HARDWARE,
        metavar="NAME",
        help="Between devices of one host: nvlink, infinity-fabric, pcie, shared-memory, or a network. auto: the "
        "device's best.",
    ),
]
Network = Annotated[
    str,
    typer.Option(
        rich_help_panel=HARDWARE,
        metavar="NAME",
        help="Between hosts: ethernet (100 Gbit/s), ethernet-10, -25, -400, infiniband (400 Gbit/s), infiniband-200.",
    ),
]
LinkBandwidth = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=HARDWARE, metavar="BYTES/s", help="Of the interconnect, one way.", show_default="datasheet"
    ),
]
LinkLatency = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=HARDWARE, metavar="SECONDS", help="Of a small message there, such as 5us.", show_default="ours"
    ),
]
NetworkBandwidth = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=HARDWARE,
        metavar="BYTES/s",
        help="Of the network, such as 25Gbit/s.",
        show_default="its name's",
    ),
]
NetworkLatency = Annotated[
    str | None,
    typer.Option(rich_help_panel=HARDWARE, metavar="SECONDS", help="Of a small message there.", show_default="ours"),
]
Collectives = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=HARDWARE, metavar="FILE", help="Measured times of collectives (JSON), instead of the formula."
    ),
]
Context = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=WORK,
        min=1,
        help="Tokens of each sequence in the KV cache.",
        show_default="8192 or the model's",
    ),
]
Prompt = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=WORK,
        min=1,
        help="Tokens of the prompt whose reading is timed.",
        show_default="2048 or the context",
    ),
]
StepTokens = Annotated[
    int | None,
    typer.Option(
        "--max-num-batched-tokens",
        rich_help_panel=WORK,
        min=1,
        help="Tokens per step: longer prompts are read in chunks.",
        show_default="CPU 256, GPU 2048",
    ),
]
KVDType = Annotated[
    KVCacheDType, typer.Option("--kv-cache-dtype", rich_help_panel=WORK, help="Numbers in the KV pages.")
]
Utilization = Annotated[
    float,
    typer.Option(
        "--device-memory-utilization", rich_help_panel=WORK, help="Share of the memory to use; the rest is a reserve."
    ),
]
Json = Annotated[bool, typer.Option("--json", rich_help_panel=OUTPUT, help="Print JSON instead of tables.")]
Plot = Annotated[Path | None, typer.Option(rich_help_panel=OUTPUT, metavar="FILE", help="Draw a plot here, as SVG.")]
