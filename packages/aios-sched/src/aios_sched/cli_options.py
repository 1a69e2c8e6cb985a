"""Options of `aios-sched simulate`, with their help."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aios_sched.routing.base import RoutingName

LOAD = "Load"
LENGTHS = "Lengths"
ENGINE = "Engine"
FLEET = "Fleet"
TIMES = "Times of steps"
QUESTION = "Questions"
OUTPUT = "Output"


TraceArgument = Annotated[
    str,
    typer.Argument(
        metavar="TRACE",
        help="poisson: independent requests; bursts: the same, on and off; chat: conversations whose turns share what "
        "was said; or a CSV file (arrival_s, prompt_tokens, output_tokens and, if wanted, session, tenant, priority, "
        "prefix_id, prefix_tokens).",
    ),
]
Requests = Annotated[
    int | None,
    typer.Option("--requests", "-n", rich_help_panel=LOAD, min=1, help="How many.", show_default="1000, all of a CSV"),
]
Rate = Annotated[
    str,
    typer.Option(
        "--rate",
        "-r",
        rich_help_panel=LOAD,
        metavar="X|inf",
        help="Requests, of a chat conversations, a second; inf: all at once.",
    ),
]
Seed = Annotated[int, typer.Option(rich_help_panel=LOAD, help="The same seed gives the same trace.")]
BurstFactor = Annotated[float, typer.Option(rich_help_panel=LOAD, help="bursts: times the mean rate while on.")]
BurstSeconds = Annotated[float, typer.Option(rich_help_panel=LOAD, help="bursts: how long they last on average.")]
Turns = Annotated[float, typer.Option(rich_help_panel=LOAD, help="chat: turns of a conversation on average.")]
ThinkSeconds = Annotated[
    float, typer.Option(rich_help_panel=LOAD, help="chat: seconds from an answer to the next question on average.")
]
SystemPrompts = Annotated[int, typer.Option(rich_help_panel=LOAD, min=1, help="chat: different system prompts.")]
PrefixTokens = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=LENGTHS, min=0, help="Tokens that prompts begin with and share.", show_default="0, chat 400"
    ),
]
PromptTokens = Annotated[
    float | None,
    typer.Option(
        rich_help_panel=LENGTHS,
        help="Mean of prompts (log-normal), of a chat what a user says in a turn.",
        show_default="161, chat 60",
    ),
]
PromptSpread = Annotated[
    float | None,
    typer.Option(rich_help_panel=LENGTHS, help="Sigma of their logarithm; 0: all alike.", show_default="1.2, chat 1"),
]
OutputTokens = Annotated[
    float | None,
    typer.Option(rich_help_panel=LENGTHS, help="Mean of answers (log-normal).", show_default="338, chat 240"),
]
OutputSpread = Annotated[
    float | None,
    typer.Option(rich_help_panel=LENGTHS, help="Sigma of their logarithm; 0: all alike.", show_default="0.9, chat 0.8"),
]
MaxNumSeqs = Annotated[int, typer.Option(rich_help_panel=ENGINE, help="Requests that run at once.")]
MaxNumBatchedTokens = Annotated[int, typer.Option(rich_help_panel=ENGINE, help="Tokens per step.")]
MaxModelLen = Annotated[int, typer.Option(rich_help_panel=ENGINE, help="Longest prompt plus answer, in tokens.")]
BlockSize = Annotated[int, typer.Option(rich_help_panel=ENGINE, help="Tokens per KV page.")]
NumBlocks = Annotated[
    int | None,
    typer.Option(
        rich_help_panel=ENGINE,
        help="KV pages of each engine.",
        show_default="with --device what fits beside the weights, else a quarter of --max-num-seqs whole contexts",
    ),
]
PrefixCaching = Annotated[
    bool,
    typer.Option(
        "--enable-prefix-caching/--no-enable-prefix-caching",
        rich_help_panel=ENGINE,
        help="Keep the pages of finished prompts, so that prompts that begin alike are not computed again.",
    ),
]
ChunkedPrefill = Annotated[
    bool,
    typer.Option(
        "--enable-chunked-prefill/--no-enable-chunked-prefill",
        rich_help_panel=ENGINE,
        help="Read long prompts in pieces between the steps of other requests.",
    ),
]
Queued = Annotated[
    int | None,
    typer.Option("--max-num-queued-reqs", rich_help_panel=ENGINE, help="Requests that may wait.", show_default="any"),
]
Policy = Annotated[
    str,
    typer.Option(
        "--scheduling-policy",
        rich_help_panel=ENGINE,
        metavar="NAME",
        help="Who is admitted next: fcfs, priority, fair, prefix.",
    ),
]
Replicas = Annotated[int, typer.Option(rich_help_panel=FLEET, min=1, help="Engines behind one router.")]
Routing = Annotated[RoutingName, typer.Option(rich_help_panel=FLEET, help="Which of them gets a request.")]
Cost = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=TIMES, metavar="FILE", help="Fitted to measured steps: a JSON from benchmarks/simulation.py."
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        rich_help_panel=TIMES,
        metavar="NAME",
        help="From a datasheet: h200, h100, a100, l40s, l4, t4, rtx4090, rtx3090.",
    ),
]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        rich_help_panel=TIMES,
        help="With --device: folder (config.json is enough), GGUF file or hub id.",
        show_default="bundled",
    ),
]
TensorParallel = Annotated[
    int,
    typer.Option(
        "--tensor-parallel-size", "-tp", rich_help_panel=TIMES, min=1, help="With --device: devices per engine."
    ),
]
WeightBytes = Annotated[
    float, typer.Option(rich_help_panel=TIMES, help="With --device: bytes per weight; 1 for INT8, 0.56 for INT4.")
]
KVBytes = Annotated[int, typer.Option(rich_help_panel=TIMES, help="With --device: bytes per cached number.")]
Efficiency = Annotated[
    float, typer.Option(rich_help_panel=TIMES, help="With --device: share of the datasheet that kernels reach.")
]
HostSeconds = Annotated[
    float, typer.Option(rich_help_panel=TIMES, help="With --device: what the host adds to each step.")
]
StepSeconds = Annotated[
    float | None, typer.Option(rich_help_panel=TIMES, help="Constants of one's own: seconds of any step.")
]
TokenSeconds = Annotated[
    float, typer.Option(rich_help_panel=TIMES, help="With --step-seconds: and of each token computed.")
]
ContextSeconds = Annotated[
    float, typer.Option(rich_help_panel=TIMES, help="With --step-seconds: and of each token of context read.")
]
SLOTtft = Annotated[
    float | None, typer.Option("--slo-ttft", rich_help_panel=QUESTION, help="Seconds to the first token, at most.")
]
SLOTpot = Annotated[
    float | None, typer.Option("--slo-tpot", rich_help_panel=QUESTION, help="Seconds per token after it, at most.")
]
SLOE2e = Annotated[
    float | None, typer.Option("--slo-e2e", rich_help_panel=QUESTION, help="Seconds to the last token, at most.")
]
SLOShare = Annotated[
    float,
    typer.Option(rich_help_panel=QUESTION, min=0, max=1, help="Share of the requests that must keep the objectives."),
]
SweepOption = Annotated[
    tuple[str, str] | None,
    typer.Option(
        "--sweep",
        rich_help_panel=QUESTION,
        metavar="OPTION VALUES",
        help="Simulate once per value: block-size 8,16,32; replicas 1..8 finds the smallest fleet that keeps the "
        "objectives; also max-num-batched-tokens, max-num-seqs, num-blocks, policy, routing.",
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", rich_help_panel=OUTPUT, metavar="FILE", help="All figures; - for stdout.")
]
Plot = Annotated[Path | None, typer.Option("--plot", rich_help_panel=OUTPUT, metavar="FILE", help="Latencies as SVG.")]
TimelineOption = Annotated[
    Path | None,
    typer.Option(
        "--timeline", rich_help_panel=OUTPUT, metavar="FILE", help="Steps and requests for ui.perfetto.dev (JSON)."
    ),
]
TimelineEvents = Annotated[
    int, typer.Option(rich_help_panel=OUTPUT, min=1, help="Events after which the timeline ends.")
]
TimelinePlot = Annotated[
    Path | None,
    typer.Option(rich_help_panel=OUTPUT, metavar="FILE", help="With --timeline: its beginning as SVG."),
]
PageMap = Annotated[
    Path | None,
    typer.Option(
        rich_help_panel=OUTPUT,
        metavar="FILE",
        help="Whose each page was over time as SVG; of a fleet the first engine's.",
    ),
]
PageTraceOption = Annotated[
    Path | None,
    typer.Option(
        "--page-trace",
        rich_help_panel=OUTPUT,
        metavar="FILE",
        help="What happened to pages, event by event (JSON lines); of a fleet in the first engine.",
    ),
]
PageEvents = Annotated[
    int,
    typer.Option(
        rich_help_panel=OUTPUT, min=1, help="With --page-map or --page-trace: show the last so many events of pages."
    ),
]
