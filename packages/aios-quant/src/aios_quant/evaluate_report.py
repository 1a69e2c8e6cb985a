"""An evaluation as a table, as JSON, and as a plot. No torch here."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from aios_model.errors import AiosError
from aios_quant.evaluate_plot import Point, scatter_plot

if TYPE_CHECKING:
    from aios_quant.evaluate import Evaluation, EvaluationReport


def report_table(report: EvaluationReport) -> Table:
    """A row per candidate, best figures not highlighted: which one is best depends on what is scarce."""
    original = report.evaluations[0]
    title = f"{report.model} on {report.text}"
    table = Table(title=title, title_justify="left", caption_justify="left", box=SIMPLE_HEAD)
    table.add_column("weights", overflow="fold")
    for name in ("MB", "ppl", "change", "KL", "same", "prefix", "tok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for each in report.evaluations:
        table.add_row(*_cells(each, original))
    table.caption = (
        f"MB: weights in memory. ppl: perplexity over {report.num_positions} positions. KL: nats per token. "
        f"same: positions with the same likeliest token. prefix: tokens that "
        f"{report.num_answers} greedy answers of {report.num_new_tokens} share with the original's. "
        f"tok/s: one sequence, {report.kernels}."
    )
    return table


def write_json(report: EvaluationReport, path: Path) -> None:
    """Everything that was measured, unrounded."""
    _write(path, json.dumps(asdict(report), indent=2) + "\n")


def write_plot(report: EvaluationReport, path: Path) -> None:
    """Size against KL divergence, as SVG: down and to the left is better."""
    points = [
        Point(label=each.name, x=each.num_bytes / 1e6, y=each.kl_divergence)
        for each in report.evaluations[1:]
        if each.kl_divergence > 0
    ]
    svg = scatter_plot(
        points, title=f"{report.model}: size and error", x_title="weights in memory, MB", y_title="KL divergence, nats"
    )
    _write(path, svg)


def _cells(each: Evaluation, original: Evaluation) -> list[str]:
    return [
        escape(each.name),
        f"{each.num_bytes / 1e6:,.1f}",
        f"{each.perplexity:.3f}",
        f"{each.perplexity / original.perplexity - 1:+.2%}",
        f"{each.kl_divergence:.4f}",
        f"{each.agreement:.1%}",
        f"{each.common_prefix:.1f}",
        f"{each.tokens_per_second:.1f}",
    ]


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise AiosError(f"{path} cannot be written: {error}") from error
