"""Options of `aios-serve`: who runs when, and how much of it."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from aios_sched.policy.registry import PolicyName

_option = partial(typer.Option, rich_help_panel="Batching")

MaxNumSeqs = Annotated[int, _option("--max-num-seqs", help="Requests that run at once.")]
MaxNumBatchedTokens = Annotated[
    int | None,
    _option(
        "--max-num-batched-tokens",
        show_default="CPU 256, GPU 2048",
        help="Tokens per step: more reads prompts faster, fewer keeps answers flowing meanwhile.",
    ),
]
EnableChunkedPrefill = Annotated[
    bool,
    _option(
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        help="Read long prompts in pieces between the steps of other requests.",
    ),
]
SchedulingPolicy = Annotated[
    PolicyName,
    _option(
        "--scheduling-policy",
        help="Who goes first: by arrival (fcfs), by the requests' priorities and their age (priority), whoever was "
        "served least (fair), or cached prompts (prefix).",
    ),
]
PriorityAgingSeconds = Annotated[
    float | None,
    _option(
        "--priority-aging-seconds",
        show_default="10",
        help="With --scheduling-policy priority: seconds of waiting that count like one level of priority.",
    ),
]
RequestTimeout = Annotated[
    float | None,
    _option(
        "--request-timeout",
        metavar="SECONDS",
        show_default="none",
        help='Longest that a request may wait and run; it then ends with finish_reason "timeout".',
    ),
]
MaxNumQueuedReqs = Annotated[int, _option("--max-num-queued-reqs", help="Requests that may wait; more get a 503.")]
SpeculativeConfig = Annotated[
    str | None,
    _option(
        "--speculative-config",
        metavar="JSON",
        show_default="none",
        help="Guess tokens ahead and check them together, for the same output in fewer steps, such as "
        '\'{"method": "suffix"}\'.',
    ),
]
