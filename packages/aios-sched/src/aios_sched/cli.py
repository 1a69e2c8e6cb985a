"""The `aios-sched` command: what would happen if? Torch is never imported."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from aios_model.command_line import run_command
from aios_model.errors import AiosError, ConfigError
from aios_sched import cli_options as options

if TYPE_CHECKING:
    from aios_kvcache.page_trace import PageTrace
    from aios_sched.simulator.cost import CostModel
    from aios_sched.simulator.results import Objectives, Results
    from aios_sched.simulator.roofline_cost import RooflineCost
    from aios_sched.simulator.system import SystemConfig
    from aios_sched.simulator.trace import Trace

HELP = """
Simulates engines under load: the real scheduler and the real pages, with a cost model in place of a device.

[bold]Examples[/bold]

  [cyan]aios-sched simulate poisson --rate 8 --device h100 --model Qwen/Qwen3-8B[/cyan]
  latencies, throughput and memory of one engine

  [cyan]aios-sched simulate chat --rate 20 --device h100 --sweep replicas 1..16 --slo-ttft 0.5[/cyan]
  the smallest fleet that answers within half a second

  [cyan]aios-sched simulate my.csv --cost cost.json --sweep block-size 8,16,32 --timeline timeline.json[/cyan]
  requests of one's own on an engine that was measured
"""

app = typer.Typer(add_completion=False, no_args_is_help=True, rich_markup_mode="rich", help=HELP)


def main(args: Sequence[str] | None = None) -> None:
    """Entry point of `aios-sched`; ends the process. A mistake in the arguments is one line and status 2."""
    run_command(app, "aios-sched", args, complain=_complain)


@app.callback()
def _commands() -> None:
    """Keeps `simulate` a command of its own; a single one would become the program itself."""


@app.command()
def simulate(
    trace: options.TraceArgument,
    *,
    requests: options.Requests = None,
    rate: options.Rate = "4",
    seed: options.Seed = 0,
    burst_factor: options.BurstFactor = 4.0,
    burst_seconds: options.BurstSeconds = 10.0,
    turns: options.Turns = 5.0,
    think_seconds: options.ThinkSeconds = 20.0,
    system_prompts: options.SystemPrompts = 4,
    prefix_tokens: options.PrefixTokens = None,
    prompt_tokens: options.PromptTokens = None,
    prompt_spread: options.PromptSpread = None,
    output_tokens: options.OutputTokens = None,
    output_spread: options.OutputSpread = None,
    max_num_seqs: options.MaxNumSeqs = 64,
    max_num_batched_tokens: options.MaxNumBatchedTokens = 2048,
    max_model_len: options.MaxModelLen = 4096,
    block_size: options.BlockSize = 16,
    num_blocks: options.NumBlocks = None,
    enable_prefix_caching: options.PrefixCaching = True,
    enable_chunked_prefill: options.ChunkedPrefill = True,
    max_num_queued_reqs: options.Queued = None,
    scheduling_policy: options.Policy = "fcfs",
    replicas: options.Replicas = 1,
    routing: options.Routing = "prefix-affinity",
    cost: options.Cost = None,
    device: options.Device = None,
    model: options.Model = None,
    tensor_parallel_size: options.TensorParallel = 1,
    weight_bytes: options.WeightBytes = 2.0,
    kv_bytes: options.KVBytes = 2,
    efficiency: options.Efficiency = 0.7,
    host_seconds: options.HostSeconds = 0.001,
    step_seconds: options.StepSeconds = None,
    token_seconds: options.TokenSeconds = 0.0,
    context_seconds: options.ContextSeconds = 0.0,
    slo_ttft: options.SLOTtft = None,
    slo_tpot: options.SLOTpot = None,
    slo_e2e: options.SLOE2e = None,
    slo_share: options.SLOShare = 0.99,
    sweep: options.SweepOption = None,
    json_path: options.Json = None,
    plot: options.Plot = None,
    timeline: options.TimelineOption = None,
    timeline_events: options.TimelineEvents = 200_000,
    timeline_plot: options.TimelinePlot = None,
    page_map: options.PageMap = None,
    page_trace: options.PageTraceOption = None,
    page_events: options.PageEvents = 200_000,
) -> None:
    """Simulates TRACE and prints latencies, throughput, memory and the share of the time that devices are busy.

    [dim]aios-sched simulate poisson --rate 8 --requests 10000 --device h100 --model Qwen/Qwen3-8B[/dim]
    [dim]aios-sched simulate chat --step-seconds 0.02 --replicas 4 --sweep routing session,round-robin[/dim]
    """
    given = dict(locals())
    from aios_sched.simulator.results import Objectives
    from aios_sched.simulator.trace_options import TraceOptions, make_trace

    requested = TraceOptions(**{name: given[name] for name in TraceOptions.__dataclass_fields__ if name in given})
    made = make_trace(trace, requested)
    if timeline is None:
        _refuse(given, {"timeline_plot": None, "timeline_events": 200_000}, "--timeline")
    if page_map is None and page_trace is None:
        _refuse(given, {"page_events": 200_000}, "--page-map or --page-trace")
    costs = _cost_model(given)
    system = _system(given, costs)
    objectives = Objectives(ttft_s=slo_ttft, tpot_s=slo_tpot, e2e_s=slo_e2e)
    console = Console(stderr=json_path == Path("-"))
    if sweep is not None:
        _sweep(console, sweep, system, costs, made, objectives, given)
    else:
        _simulate_once(console, system, costs, made, objectives, given)


def _simulate_once(
    console: Console, system: SystemConfig, cost: CostModel, trace: Trace, objectives: Objectives, given: dict[str, Any]
) -> None:
    from aios_sched.simulator.fleet import Fleet
    from aios_sched.simulator.plots import results_plot
    from aios_sched.simulator.report import print_report
    from aios_sched.simulator.timeline import Timeline
    from aios_sched.simulator.timeline_plot import timeline_plot

    path, plot = given["timeline"], given["plot"]
    watches_pages = given["page_map"] is not None or given["page_trace"] is not None
    progress = Console(stderr=True).status("simulating…")
    recording = nullcontext() if path is None else Timeline(path, max_events=given["timeline_events"])
    started = time.perf_counter()
    with progress, recording as timeline:
        fleet = Fleet(
            system,
            cost,
            leap=not watches_pages,  # events are to have the times of their steps
            timeline=timeline,
            on_progress=lambda done: progress.update(f"simulated {done:,} requests…"),
        )
        recorder = fleet.record_pages(max_events=given["page_events"]) if watches_pages else None
        results = fleet.run(trace)
    seconds = time.perf_counter() - started
    _check_any_finished(results)
    summary = results.summary(objectives)
    print_report(console, summary)
    console.print(f"[dim]simulated {results.num_finished / seconds:,.0f} requests/s[/dim]")
    if timeline is not None and timeline.num_left_out:
        console.print(
            f"[yellow]the timeline ends after {timeline.num_events:,} events; {timeline.num_left_out:,} more were left "
            "out[/yellow] (--timeline-events)"
        )
    if plot is not None:
        _write(plot, results_plot(results))
    if path is not None and given["timeline_plot"] is not None:
        _write(given["timeline_plot"], timeline_plot(json.loads(path.read_text(encoding="utf-8"))))
    if recorder is not None:
        _write_pages(console, recorder.trace(), given)
    _write_json(given["json_path"], summary)


def _write_pages(console: Console, trace: PageTrace, given: dict[str, Any]) -> None:
    from aios_kvcache.page_map import draw_page_map

    if trace.number:
        console.print(
            f"[yellow]the first {trace.number:,} events of pages were left out[/yellow]; {len(trace.records):,} are "
            "kept (--page-events)"
        )
    if given["page_trace"] is not None:
        trace.write(given["page_trace"])
    if given["page_map"] is not None:
        _write(given["page_map"], draw_page_map(trace))


def _sweep(
    console: Console,
    values: tuple[str, str],
    system: SystemConfig,
    cost: CostModel,
    trace: Trace,
    objectives: Objectives,
    given: dict[str, Any],
) -> None:
    from aios_sched.simulator.plots import sweep_plot
    from aios_sched.simulator.report import print_sweep
    from aios_sched.simulator.sweep import Sweep, meets, run_sweep

    for name in ("timeline", "page_map", "page_trace"):
        if given[name] is not None:
            raise ConfigError(
                f"--{name.replace('_', '-')} shows one simulation, --sweep runs several: leave one of them out"
            )
    sweep, share = Sweep.parse(*values), given["slo_share"]
    asks_for_fleet = sweep.option == "replicas" and objectives.any
    with Console(stderr=True).status("simulating…") as status:
        rows = run_sweep(
            sweep,
            system,
            cost,
            trace,
            on_result=lambda value, _: status.update(f"simulated {sweep.option} {value}…"),
            until=(lambda results: meets(results, objectives, share=share)) if asks_for_fleet else None,
        )
    for _, results in rows:
        _check_any_finished(results)
    summaries = [(str(value), results.summary(objectives)) for value, results in rows]
    print_sweep(console, sweep.option, summaries)
    answer = None
    if asks_for_fleet:
        value, results = rows[-1]
        if meets(results, objectives, share=share):
            answer = value
            console.print(
                f"replicas: [bold]{value}[/bold] is the first of these to keep the objectives for {share:.1%}"
            )
        else:
            console.print(f"[yellow]none of these keeps the objectives for {share:.1%}[/yellow] of the requests")
    if given["plot"] is not None:
        _write(given["plot"], sweep_plot(sweep.option, summaries))
    _write_json(
        given["json_path"],
        {"option": sweep.option, "rows": [{"value": v, **s} for v, s in summaries], "smallest_fleet": answer},
    )


def _cost_model(given: dict[str, Any]) -> CostModel:
    from aios_sched.simulator.cost import LinearCost
    from aios_sched.simulator.fitting import load_cost

    names = ("cost", "device", "step_seconds")
    chosen = [name for name in names if given[name] is not None]
    if len(chosen) != 1:
        raise ConfigError(
            f"{len(chosen)} of --cost, --device and --step-seconds were given: say how long steps take in one of these "
            "ways, such as --device h100"
        )
    if chosen != ["device"]:
        defaults = {"model": None, "tensor_parallel_size": 1, "weight_bytes": 2.0, "kv_bytes": 2, "efficiency": 0.7}
        _refuse(given, {**defaults, "host_seconds": 0.001}, "--device")
    if chosen != ["step_seconds"]:
        _refuse(given, {"token_seconds": 0.0, "context_seconds": 0.0}, "--step-seconds")
    if given["cost"] is not None:
        return load_cost(given["cost"])
    if given["device"] is not None:
        return _roofline(given)
    return LinearCost(step_s=given["step_seconds"], token_s=given["token_seconds"], context_s=given["context_seconds"])


def _roofline(given: dict[str, Any]) -> RooflineCost:
    from aios_model.config_file import read_model_config
    from aios_model.hardware import DATASHEETS
    from aios_model.weights.hub import resolve_model
    from aios_sched.simulator.roofline_cost import RooflineCost

    device = given["device"].lower()
    if device not in DATASHEETS:
        raise ConfigError(f"device {given['device']!r} is unknown; use one of {', '.join(DATASHEETS)}")
    files = resolve_model(given["model"], tokenizer_only=True)
    return RooflineCost(
        config=read_model_config(files, allow_quantized=True),
        hardware=DATASHEETS[device],
        bytes_per_weight=given["weight_bytes"],
        kv_dtype_bytes=given["kv_bytes"],
        efficiency=given["efficiency"],
        host_s=given["host_seconds"],
        num_devices=given["tensor_parallel_size"],
    )


def _system(given: dict[str, Any], cost: CostModel) -> SystemConfig:
    from aios_sched.simulator.roofline_cost import RooflineCost
    from aios_sched.simulator.system import SystemConfig

    num_blocks = given["num_blocks"]
    if given["block_size"] < 1:
        raise ConfigError(f"--block-size {given['block_size']} cannot be used: give at least 1")
    if num_blocks is None and isinstance(cost, RooflineCost):
        num_blocks = cost.max_blocks(block_size=given["block_size"])
    elif num_blocks is None:
        contexts = max(1, given["max_num_seqs"] // 4)
        num_blocks = contexts * -(-given["max_model_len"] // given["block_size"])
    return SystemConfig(
        num_blocks=num_blocks,
        block_size=given["block_size"],
        max_num_seqs=given["max_num_seqs"],
        max_num_batched_tokens=given["max_num_batched_tokens"],
        max_model_len=given["max_model_len"],
        enable_chunked_prefill=given["enable_chunked_prefill"],
        enable_prefix_caching=given["enable_prefix_caching"],
        max_num_queued=given["max_num_queued_reqs"],
        policy=given["scheduling_policy"],
        replicas=given["replicas"],
        routing=given["routing"],
    )


def _refuse(given: dict[str, Any], defaults: dict[str, Any], needed: str) -> None:
    """An option without effect is an error."""
    for name, default in defaults.items():
        if given[name] != default:
            raise ConfigError(f"--{name.replace('_', '-')} has no effect without {needed}; leave it out")


def _check_any_finished(results: Results) -> None:
    if not results.num_finished:
        raise ConfigError(f"all {results.num_refused} requests were refused, the first: {results.refusal}")


def _write_json(path: Path | None, figures: dict[str, Any]) -> None:
    if path is None:
        return
    text = json.dumps(figures, indent=2, default=lambda value: None if math.isnan(value) else value) + "\n"
    if path == Path("-"):
        sys.stdout.write(text)
    else:
        _write(path, text)


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AiosError(f"{path} cannot be written: {error}") from error


def _complain(message: str) -> None:
    Console(stderr=True).print(f"[red]error:[/red] {escape(message)}", highlight=False, soft_wrap=True, markup=True)
