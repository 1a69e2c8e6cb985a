"""The figures of a simulation as tables for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from aios_sched.simulator.results import PERCENTS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console

_NAMES = {
    "ttft": "first token (TTFT)",
    "tpot": "per output token (TPOT)",
    "itl": "between tokens (ITL)",
    "e2e": "end to end",
    "queue": "queueing",
}


def print_report(console: Console, summary: dict[str, Any]) -> None:
    """Latencies, then everything else.

    Args:
        console: Where to.
        summary: Of `Results.summary`.
    """
    console.print(_latencies(summary["latency"]))
    console.print(_figures(summary))
    if "tenants" in summary:
        console.print(_tenants(summary["tenants"]))
    refusal = summary["requests"]["refusal"]
    if refusal is not None:
        console.print(
            f"[yellow]{summary['requests']['refused']:,} requests were refused[/yellow], the first: {escape(refusal)}",
            highlight=False,
        )


def print_sweep(console: Console, option: str, rows: Sequence[tuple[str, dict[str, Any]]]) -> None:
    """One line per value of an option.

    Args:
        console: Where to.
        option: Its name.
        rows: Values and the summaries they led to.
    """
    table = Table(header_style="bold", box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in (option, "req/s", "tok/s", "TTFT p50", "p99", "TPOT p50", "p99", "waste", "hits", "preempt", "busy"):
        table.add_column(name, justify="right", no_wrap=True)
    has_goal = any("goodput" in summary for _, summary in rows)
    if has_goal:
        table.add_column("good", justify="right", no_wrap=True)
    for value, summary in rows:
        table.add_row(value, *_sweep_cells(summary), *([f"{summary['goodput']['share']:.1%}"] if has_goal else []))
    console.width = max(console.width, 96)  # rather wrapped by the terminal than cut
    console.print(table)


def _sweep_cells(summary: dict[str, Any]) -> list[str]:
    latency, memory, speed = summary["latency"], summary["memory"], summary["throughput"]
    return [
        f"{speed['requests_per_s']:.2f}",
        f"{speed['output_tokens_per_s']:,.0f}",
        *(_time(latency[name][rank]).replace(" ", "") for name in ("ttft", "tpot") for rank in ("p50", "p99")),
        f"{memory['wasted_share_of_pool']:.1%}",
        f"{summary['prefix_cache']['hit_rate']:.1%}",
        f"{summary['preemptions']:,}",
        f"{summary['steps']['busy_share']:.0%}",
    ]


def _latencies(latency: dict[str, dict[str, float | None]]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    table.add_column("")
    columns = ["mean", *(f"p{percent}" for percent in PERCENTS), "max"]
    for name in columns:
        table.add_column(name, justify="right")
    for key, name in _NAMES.items():
        table.add_row(name, *(_time(latency[key].get(column)) for column in columns))
    return table


def _tenants(tenants: dict[str, Any]) -> Table:
    table = Table(header_style="bold", box=None, pad_edge=False)
    for name in ("tenant", "requests", "TTFT p50", "p99", "TPOT p50", "p99", "end to end p50", "p99"):
        table.add_column(name, justify="left" if name == "tenant" else "right")
    for tenant, figures in tenants.items():
        latency = figures["latency"]
        times = [_time(latency[name][rank]) for name in ("ttft", "tpot", "e2e") for rank in ("p50", "p99")]
        table.add_row(escape(tenant) or "(none)", f"{figures['finished']:,}", *times)
    return table


def _figures(summary: dict[str, Any]) -> Table:
    speed, memory, steps, cache = (summary[name] for name in ("throughput", "memory", "steps", "prefix_cache"))
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column()
    table.add_column()
    table.add_row("requests", f"{summary['requests']['finished']:,} finished in {summary['seconds']:,.1f} s")
    table.add_row(
        "throughput",
        f"{speed['requests_per_s']:.2f} requests/s, {speed['output_tokens_per_s']:,.0f} output tokens/s, "
        f"{speed['total_tokens_per_s']:,.0f} with prompts",
    )
    if "goodput" in summary:
        good = summary["goodput"]
        table.add_row("goodput", f"{good['requests_per_s']:.2f} requests/s: {good['share']:.1%} keep the objectives")
    table.add_row(
        "steps",
        f"{steps['count']:,} of {_time(steps['mean_seconds'])}, {steps['mean_sequences']:.1f} requests in each; "
        f"devices busy {steps['device_busy_share']:.1%} of the time, hosts {steps['host_busy_share']:.1%}",
    )
    table.add_row(
        "pages",
        f"{memory['used_share']:.1%} of {memory['pages']:,} in use; slots wasted: "
        f"{memory['wasted_share_of_reserved']:.2%} of what is taken (contiguous reservations would waste "
        f"{memory['contiguous_wasted_share_of_reserved']:.1%}), {memory['wasted_share_of_pool']:.2%} of the pool",
    )
    table.add_row(
        "prefix cache",
        f"{cache['hit_rate']:.1%} of {cache['queries']:,} tokens found; {cache['evictions']:,} evictions",
    )
    table.add_row("preemptions", f"{summary['preemptions']:,}")
    return table


def _time(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    if seconds < 1:
        return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 or not seconds else f"{seconds * 1e6:.0f} µs"
    return f"{seconds:,.2f} s"
