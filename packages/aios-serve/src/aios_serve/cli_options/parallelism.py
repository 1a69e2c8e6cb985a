"""Options of `aios-serve`: ranks that share one model."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from aios_serve.config import ExecutorBackend

_option = partial(typer.Option, rich_help_panel="Parallelism")

TensorParallelSize = Annotated[
    int,
    _option(
        "--tensor-parallel-size",
        "-tp",
        help="Ranks that share each layer: GPUs, or processes on the CPU.",
    ),
]
PipelineParallelSize = Annotated[
    int,
    _option(
        "--pipeline-parallel-size",
        "-pp",
        help="Stages that hold some of the layers each, every one of them a tensor-parallel group.",
    ),
]
EnableExpertParallel = Annotated[
    bool,
    _option(
        "--enable-expert-parallel/--no-enable-expert-parallel",
        help="Deal the experts of a mixture out to the ranks, rather than cutting each of them.",
    ),
]
DistributedExecutorBackend = Annotated[
    ExecutorBackend,
    _option(
        "--distributed-executor-backend",
        help="Who starts the ranks: this process (mp), torchrun on several hosts, or a Ray cluster. "
        "auto: torchrun under torchrun, else mp.",
    ),
]
RayAddress = Annotated[
    str | None,
    _option(
        "--ray-address",
        metavar="HOST:PORT",
        help="Of the Ray cluster; default: the one this host belongs to.",
    ),
]
RankTimeout = Annotated[
    float,
    _option(
        "--rank-timeout",
        help="Seconds without a sign of life, or of progress, after which a rank counts as lost.",
    ),
]
