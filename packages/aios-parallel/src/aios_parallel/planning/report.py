"""Plans as tables, as JSON, and as a plot. No torch here."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from aios_model.config import ModelConfig
from aios_model.errors import AiosError
from aios_model.inspect import active_parameters, num_parameters
from aios_parallel.planning.advice import Recommendation
from aios_parallel.planning.hardware import Cluster, Workload
from aios_parallel.planning.plans import Objective, Plan, rank_plans
from aios_parallel.planning.plot import Series, log_plot
from aios_parallel.planning.quantities import show_number
from aios_parallel.planning.shards import span_of

_MOST_RANKS = 16
_MOST_LINES = 5
_NARROW: dict[str, Any] = {"show_edge": False, "padding": 0}  # thirteen columns in eighty characters


@dataclass(frozen=True, kw_only=True)
class PlanReport:
    """Everything that `aios-parallel plan` found out.

    Attributes:
        model: The model's name.
        config: Its configuration.
        cluster: The hardware.
        workload: The work.
        assumptions: What the figures take for granted.
        recommendation: The plan to take.
        plans: All that were looked at.
        objective: What makes a plan good.
    """

    model: str
    config: ModelConfig
    cluster: Cluster
    workload: Workload
    assumptions: Sequence[str]
    recommendation: Recommendation
    plans: Sequence[Plan]
    objective: Objective


def print_plan(console: Console, report: PlanReport, *, num_rows: int) -> None:
    """The recommendation first, then what it takes of each device, the other plans, and what all of it assumes."""
    best = report.recommendation.plan
    title = f"{report.model} on {report.cluster.num_devices} × {report.cluster.device.name}"
    hosts = report.cluster.num_hosts
    console.print(f"[bold]{escape(title)}[/bold]{f' in {hosts} hosts' if hosts > 1 else ''}, {_size(report.config)}")
    console.print(f"\n[bold]take {best.layout}, {best.scheme.name}[/bold] (for {report.objective})")
    for reason in report.recommendation.reasons:
        console.print(f"  • {escape(reason)}", highlight=False)
    console.print(f"\n  [cyan]{escape(report.recommendation.command)}[/cyan]\n", highlight=False, soft_wrap=True)
    console.print(_shard_table(best))
    console.print(_plan_table(report, num_rows))
    print_assumptions(console, report.assumptions)


def print_assumptions(console: Console, assumptions: Sequence[str]) -> None:
    """One line each."""
    console.print("[bold]assumptions[/bold]")
    for text in assumptions:
        console.print(f"  • {escape(text)}", highlight=False)


def plan_json(report: PlanReport) -> str:
    """All of it as a JSON object, unrounded; `docs/en/planning.md` lists its members."""
    device, links = report.cluster.device, report.cluster.times.links
    content = {
        "model": {
            "name": report.model,
            "architecture": report.config.architecture,
            "num_parameters": num_parameters(report.config),
            "num_active_parameters": active_parameters(report.config),
        },
        "hardware": {
            "device": device.name,
            "source": device.source,
            "num_devices": report.cluster.num_devices,
            "num_hosts": report.cluster.num_hosts,
            "memory_bytes": device.memory_bytes,
            "bandwidth": device.bandwidth,
            "flops": dict(device.flops),
            "link": asdict(links["host"]),
            "network": asdict(links["network"]),
            "measured_collectives": report.cluster.times.name or None,
        },
        "workload": asdict(report.workload),
        "objective": report.objective,
        "assumptions": list(report.assumptions),
        "recommended": {
            **plan_figures(report.recommendation.plan),
            "reasons": list(report.recommendation.reasons),
            "command": report.recommendation.command,
            "ranks": _rank_figures(report.recommendation.plan),
        },
        "plans": [plan_figures(plan) for plan in report.plans],
    }
    return json.dumps(content, indent=2) + "\n"


def plan_figures(plan: Plan) -> dict[str, Any]:
    """A plan's figures under the names that JSON output has for them."""
    memory, decode = plan.memory, plan.decode
    return {
        "tensor_parallel_size": plan.layout.tensor,
        "pipeline_parallel_size": plan.layout.pipeline,
        "data_parallel_size": plan.layout.data,
        "enable_expert_parallel": plan.layout.expert_parallel,
        "quantization": plan.scheme.name,
        "fits": plan.fits,
        "bytes_per_rank": {
            **asdict(memory),
            "used": memory.used,
            "missing": memory.missing,
        },
        "decode_seconds": decode.seconds,
        "decode_reading_seconds": decode.reading,
        "decode_computing_seconds": decode.computing,
        "decode_communicating_seconds": decode.communicating,
        "num_micro_batches": decode.num_micro_batches,
        "bubble": decode.bubble,
        "alone_seconds": plan.alone.seconds,
        "prefill_seconds": plan.prefill_seconds,
        "tokens_per_second": plan.tokens_per_second,
        "decode_speedup": plan.decode_speedup,
        "prefill_speedup": plan.prefill_speedup,
        "one_device_max_batch": plan.baseline.max_batch,
        "sent_bytes_per_token": plan.costs.bytes_sent_per_token(),
        "collectives_per_token": plan.costs.collectives_per_pass(),
        "max_batch": plan.costs.largest_batch,
    }


def plan_plot(report: PlanReport) -> str:
    """What a sequence gets against what all get, from one sequence to the most that fit, as SVG: for the best plans."""
    ranked = rank_plans(report.plans, report.objective)
    chosen = list(dict.fromkeys([report.recommendation.plan, *ranked]))[:_MOST_LINES]
    series = [
        Series(name=f"{plan.layout}, {plan.scheme.name}: up to {plan.costs.largest_batch:,}", points=_throughputs(plan))
        for plan in chosen
    ]
    return log_plot(
        series,
        title=f"{report.model} on {report.cluster.num_devices} × {report.cluster.device.name}, from one sequence on",
        x_title="tokens per second of each sequence",
        y_title="tokens per second of all",
        legend="bottom",
    )


def write_text(path: Path, text: str) -> None:
    """Writes a file; AiosError if it cannot be written."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AiosError(f"{path} cannot be written: {error}") from error


def _throughputs(plan: Plan) -> list[tuple[float, float]]:
    """Of each sequence and of all, for batches that double up to the largest."""
    most = plan.costs.largest_batch // plan.layout.data
    batches = sorted({*(1 << power for power in range(most.bit_length())), most})
    rates = [(1 / plan.costs.decode(sequences=batch).seconds, batch * plan.layout.data) for batch in batches]
    return [(rate, rate * batch) for rate, batch in rates]


def _size(config: ModelConfig) -> str:
    total, active = num_parameters(config), active_parameters(config)
    sparse = f", {active / 1e9:.2f}B of them per token" if config.num_experts else ""
    return f"{total / 1e9:.2f}B parameters{sparse}, {config.num_hidden_layers} layers"


def _rank_figures(plan: Plan) -> list[dict[str, Any]]:
    """What every rank of one replica holds; ranges are [first, end)."""
    costs, loads = plan.costs, plan.costs.loads
    memory = costs.memory()
    figures = []
    for stage, layers in enumerate(loads.stages):
        spec = costs.config.layers[layers.start]
        for rank, shard in enumerate(loads.shards[spec]):
            held = memory[stage][rank]
            figures.append(
                {
                    "rank": stage * plan.layout.tensor + rank,
                    "stage": stage,
                    "layers": [layers.start, layers.stop],
                    "query_heads": _ends(shard.query_heads),
                    "num_padded_query_heads": shard.heads.queries.size,
                    "kv_heads": _ends(shard.kv_heads),
                    "columns": _ends(span_of(shard.features)),
                    "experts": _ends(shard.experts),
                    "expert_columns": _ends(span_of(shard.expert_features)),
                    "vocabulary_rows": loads.ranks[stage][rank].vocabulary,
                    "bytes": {**asdict(held), "used": held.used},
                }
            )
    return figures


def _ends(indices: range) -> list[int]:
    return [indices.start, indices.stop]


def _shard_table(plan: Plan) -> Table:
    mlp = "experts" if plan.costs.config.num_experts else "columns"
    table = Table(title="ranks of one replica, bytes in GB", title_justify="left", box=SIMPLE_HEAD, **_NARROW)
    for heading in ("rank", "layers", "heads", "kv heads", mlp, "weights", "KV", "activ.", "reserve", "free"):
        table.add_column(heading, justify="right", no_wrap=True)
    ranks = _rank_figures(plan)
    for rank in ranks[:_MOST_RANKS]:
        padded = rank["num_padded_query_heads"] - _length(rank["query_heads"])
        heads = _span(rank["query_heads"]) + (f" + {padded}" if padded else "")
        held = rank["bytes"]
        sizes = [held[name] for name in ("weights", "kv_cache", "activations", "reserve")]
        table.add_row(
            str(rank["rank"]),
            _span(rank["layers"]),
            heads,
            _span(rank["kv_heads"]),
            _mlp(rank),
            *(show_number(size / 1e9) for size in [*sizes, held["capacity"] - held["used"]]),
        )
    if len(ranks) > _MOST_RANKS:
        table.caption = f"{len(ranks) - _MOST_RANKS} more ranks are in --json"
    return table


def _mlp(rank: dict[str, Any]) -> str:
    """Columns of a dense MLP; experts, and how many columns of each."""
    if _length(rank["experts"]):
        return f"{_span(rank['experts'])} x {_length(rank['expert_columns'])}"
    return f"{_length(rank['columns']):,}"


def _span(ends: Sequence[int]) -> str:
    first, end = ends
    return str(first) if end - first == 1 else f"{first}-{end - 1}"


def _length(ends: Sequence[int]) -> int:
    return ends[1] - ends[0]


def _plan_table(report: PlanReport, num_rows: int) -> Table:
    ranked = rank_plans(report.plans, report.objective)
    title = f"the best of {len(ranked)} plans that fit, of {len(report.plans)} (for {report.objective})"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, caption_justify="left", **_NARROW)
    for heading in ("TP", "PP", "DP", "weights", "GB", "step", "tok/s", "alone", "prefill", "x dec", "x pre"):
        table.add_column(heading, justify="left" if heading == "weights" else "right", no_wrap=True)
    for heading in ("comm", "sent", "batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for plan in ranked[:num_rows]:
        table.add_row(*_cells(plan), style="bold" if plan is report.recommendation.plan else None)
    table.caption = (
        "GB: used on the fullest rank. step: ms for one token of every sequence. alone: of one sequence on an idle "
        "system. prefill: ms to the first token of a prompt. x dec, x pre: decode and prefill against one device with "
        "the same weights and as many of the sequences as fit there; - if none does. comm: share of a step in "
        "collectives. sent: kB per token by the rank that sends most. batch: most sequences that fit."
    )
    return table


def _cells(plan: Plan) -> list[str]:
    speedups = ["-" if each is None else f"{each:.2f}" for each in (plan.decode_speedup, plan.prefill_speedup)]
    return [
        f"{plan.layout.tensor}{' EP' if plan.layout.expert_parallel else ''}",
        str(plan.layout.pipeline),
        str(plan.layout.data),
        plan.scheme.name,
        show_number((plan.memory.used - plan.memory.reserve) / 1e9),
        show_number(plan.decode.seconds * 1e3),
        show_number(plan.tokens_per_second),
        show_number(plan.alone.seconds * 1e3),
        show_number(plan.prefill_seconds * 1e3),
        *speedups,
        f"{plan.decode.communicating / plan.decode.seconds:.0%}",
        show_number(plan.costs.bytes_sent_per_token() / 1e3),
        f"{plan.costs.largest_batch:,}",
    ]
