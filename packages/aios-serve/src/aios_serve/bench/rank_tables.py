"""Where the time of ranks goes, as tables for the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from aios_parallel.tracing.accounts import Account
    from aios_serve.bench.ranks import Phase

_COLUMNS = ("rank", "compute", "communication", "waiting", "idle", "exchanges", "MB")


def phase_table(phase: Phase) -> Table:
    """A row per rank: milliseconds, and their share of the phase. Waiting is part of communication."""
    from rich import box
    from rich.table import Table

    length = (phase.window.end - phase.window.begin) / 1e6
    speed = f"{phase.num_tokens:,} tokens, {phase.tokens_per_second:,.0f} tok/s"
    table = Table(
        title=f"{phase.name}: {length:,.0f} ms, {speed}", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False
    )
    for name in _COLUMNS:
        table.add_column(name, justify="right", no_wrap=True)
    for rank in phase.ranks:
        table.add_row(*rank_cells(rank))
    return table


def rank_cells(rank: Account) -> list[str]:
    """The row of one rank."""
    parts = (rank.compute, rank.communication, rank.waiting, rank.idle)
    times = [f"{part / 1e6:.1f} {part / max(1, rank.wall):>4.0%}" for part in parts]
    return [str(rank.rank), *times, f"{rank.num_exchanges:,}", f"{rank.num_bytes / 1e6:.1f}"]


def overhead_line(phase: Phase) -> str:
    """What the driver takes between two steps, in words."""
    found = phase.overhead
    if found is None:
        return f"{phase.name}: no step found the first rank waiting for the driver"
    return (
        f"{phase.name}: {found.total / 1e3:.0f} µs from a result to the next step's arrival on the first rank "
        f"(planning {found.planning / 1e3:.0f}, encoding, sending and waking the rank {found.sending / 1e3:.0f}; "
        f"medians of {found.num_steps} steps)"
    )
