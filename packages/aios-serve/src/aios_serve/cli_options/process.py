"""Options of `aios-serve`: threads, processes and what they say."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from typing import Annotated

import typer

from aios_sched.routing.base import RoutingName
from aios_serve.config import LogLevel

_option = partial(typer.Option, rich_help_panel="Process")


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"aios-serve {version('aios-serve')}")
        raise typer.Exit


Threads = Annotated[
    int | None,
    _option("--threads", show_default="one per core", help="CPU threads of the engine, of each rank."),
]
CPUBind = Annotated[
    str,
    _option(
        "--cpu-bind",
        metavar="auto|none|LIST",
        help="Bind the threads to cores: auto fills one NUMA node first, or a list such as 0-3,8.",
    ),
]
EngineProcess = Annotated[
    bool,
    _option(
        "--engine-process/--no-engine-process",
        help="Run the engine in a process of its own. Off, one process does all, for debugging.",
    ),
]
DataParallelSize = Annotated[
    int,
    _option(
        "--data-parallel-size",
        "-dp",
        help="Engines that serve the same model behind this endpoint, each with weights and KV cache of its own.",
    ),
]
DataParallelRouting = Annotated[
    RoutingName,
    _option(
        "--data-parallel-routing",
        help="Which of them gets a request: the one that knows the longest prefix of its prompt unless it is far "
        "busier, the least loaded, the same one for a session (X-Session-Id), or each in turn.",
    ),
]
HeartbeatTimeout = Annotated[
    float,
    _option(
        "--heartbeat-timeout",
        help="Seconds without a sign of life after which the engine counts as stuck and is started again.",
    ),
]
MaxEngineRestarts = Annotated[
    int,
    _option(
        "--max-engine-restarts",
        help="Restarts of an engine that died, within ten minutes, before it stays dead; 0 for none.",
    ),
]
LogLevelOption = Annotated[LogLevel, _option("--log-level", help="How much the server says.")]
Version = Annotated[
    bool,
    _option("--version", help="Show the version and leave.", callback=_show_version, is_eager=True),
]
