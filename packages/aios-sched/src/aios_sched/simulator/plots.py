"""What came of a simulation as SVG: how many requests were how fast, and how it went over time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from aios_sched.simulator.results import METRICS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_sched.simulator.results import Results

_WIDTH, _HEIGHT = 760, 320
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 24, 48, 52
_COLORS = ("#1f6feb", "#d1242f", "#1a7f37", "#9a6700", "#8250df", "#57606a")
_STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-weight:bold;font-size:15px}.paper{fill:#fff}"
    ".grid{stroke:#ddd}.line{fill:none;stroke-width:2}"
)
_NUM_POINTS = 120
_TITLES = {"ttft": "first token", "tpot": "per output token", "e2e": "end to end", "queue": "queueing"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """A line of a plot.

    Attributes:
        name: In the legend.
        points: (x, y), in the order in which they are joined.
        dots: Whether to mark the points.
    """

    name: str
    points: Sequence[tuple[float, float]]
    dots: bool = False


def results_plot(results: Results) -> str:
    """Two panels: the share of requests below each latency, and latencies by time of arrival."""
    shares = [Line(name=_TITLES[name], points=_cumulative(list(results.times[name]))) for name in METRICS]
    by_time = [
        Line(name=f"{_TITLES[name]}, median", points=_medians(results, name)) for name in METRICS if name != "tpot"
    ]
    return stack(
        [
            panel(
                [line for line in shares if line.points],
                title="Latencies",
                x_title="seconds",
                y_title="share of the requests",
                logarithmic=True,
            ),
            panel(
                [line for line in by_time if line.points],
                title="Over time",
                x_title="time of arrival, seconds",
                y_title="seconds",
            ),
        ]
    )


def sweep_plot(option: str, summaries: Sequence[tuple[str, dict[str, Any]]]) -> str:
    """Two panels over the values of an option, evenly spaced: latencies, and throughput."""
    values = [value for value, _ in summaries]
    latencies = []
    for name in ("ttft", "tpot"):
        for rank in ("p50", "p99"):
            points = [(float(i), each["latency"][name][rank] or 0.0) for i, (_, each) in enumerate(summaries)]
            latencies.append(Line(name=f"{_TITLES[name]}, {rank}", points=points, dots=True))
    speeds = [(float(i), each["throughput"]["output_tokens_per_s"]) for i, (_, each) in enumerate(summaries)]
    speed = Line(name="output tokens/s", points=speeds, dots=True)
    x_title = f"{option}: {', '.join(values)}" if len(values) <= 12 else f"{option}: {values[0]} to {values[-1]}"
    return stack(
        [
            panel(latencies, title="Latencies", x_title=x_title, y_title="seconds", x_names=values),
            panel([speed], title="Throughput", x_title=x_title, y_title="output tokens/s", x_names=values),
        ]
    )


def panel(
    lines: Sequence[Line],
    *,
    title: str,
    x_title: str,
    y_title: str,
    logarithmic: bool = False,
    y_from_zero: bool = True,
    x_names: Sequence[str] | None = None,
) -> str:
    """The inside of an SVG of 760 by 320: axes, lines and a legend.

    Args:
        lines: At least one, each with points.
        title: Above it.
        x_title: Below it.
        y_title: Beside it.
        logarithmic: Of the x axis; its values must be positive.
        y_from_zero: Whether the y axis begins at 0.
        x_names: What to call 0, 1, 2, … on the x axis.
    """
    xs = [x for line in lines for x, _ in line.points] or [1.0]
    ys = [y for line in lines for _, y in line.points] or [1.0]
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT, logarithmic=logarithmic)
    y_axis = _Axis(0.0 if y_from_zero else min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    marks = [f'<text x="{_LEFT}" y="24" class="title">{escape(title)}</text>']
    for tick in x_axis.ticks():
        x = x_axis.place(tick)
        marks.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}" class="grid"/>')
        marks.append(_text(x, _HEIGHT - _BOTTOM + 18, _name_of(tick, x_names), "middle"))
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        marks.append(f'<line x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
        marks.append(_text(_LEFT - 8, y + 4, f"{tick:,.6g}", "end"))
    marks.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 12, x_title, "middle"))
    middle = (_TOP + _HEIGHT - _BOTTOM) / 2
    marks.append(f'<g transform="translate(18 {middle}) rotate(-90)">{_text(0, 0, y_title, "middle")}</g>')
    for number, line in enumerate(lines):
        marks += _line(line, number, x_axis, y_axis)
    return "\n  ".join(marks)


def stack(panels: Sequence[str]) -> str:
    """An SVG document of panels, one below the other."""
    body = "\n  ".join(
        f'<g transform="translate(0 {_HEIGHT * number})">\n  {each}\n  </g>' for number, each in enumerate(panels)
    )
    height = _HEIGHT * len(panels)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">\n'
        f'  <style>{_STYLE}</style>\n  <rect width="{_WIDTH}" height="{height}" class="paper"/>\n  {body}\n</svg>\n'
    )


def _cumulative(values: Sequence[float]) -> list[tuple[float, float]]:
    """(value, share of the values up to it), at evenly spread shares; on a logarithmic axis zero is a microsecond."""
    ordered = sorted(max(value, 1e-6) for value in values if not math.isnan(value))
    if not ordered:
        return []
    ranks = sorted({round(i * (len(ordered) - 1) / _NUM_POINTS) for i in range(_NUM_POINTS + 1)})
    return [(ordered[rank], (rank + 1) / len(ordered)) for rank in ranks]


def _medians(results: Results, name: str) -> list[tuple[float, float]]:
    """Of the requests that arrived in each of some sixty stretches of time."""
    if not results.num_finished:
        return []
    start, end = min(results.arrivals), max(results.arrivals)
    width = (end - start) / (_NUM_POINTS / 2) or 1.0
    bins: dict[int, list[float]] = {}
    for arrival, value in zip(results.arrivals, results.times[name], strict=True):
        bins.setdefault(int((arrival - start) / width), []).append(value)
    return [(start + (number + 0.5) * width, sorted(each)[len(each) // 2]) for number, each in sorted(bins.items())]


class _Axis:
    """From `start` to `stop`, with room for all values."""

    def __init__(self, low: float, high: float, start: float, stop: float, *, logarithmic: bool = False) -> None:
        self._logarithmic = logarithmic
        self._start, self._stop = start, stop
        if logarithmic:
            low, high = math.log10(low), math.log10(high)
        self._low, self._high = low, high if high > low else low + 1.0

    def place(self, value: float) -> float:
        if self._logarithmic:
            value = math.log10(value)
        return self._start + (value - self._low) / (self._high - self._low) * (self._stop - self._start)

    def ticks(self) -> list[float]:
        """At most some ten round values."""
        if self._logarithmic:
            powers = range(math.floor(self._low), math.floor(self._high) + 1)
            steps = (1, 2, 5) if self._high - self._low < 3 else (1,)
            values = [step * 10.0**power for power in powers for step in steps]
            return [value for value in values if self._low - 1e-9 <= math.log10(value) <= self._high + 1e-9]
        rough = (self._high - self._low) / 7
        unit = 10.0 ** math.floor(math.log10(rough))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough * (1 - 1e-9))
        first = math.ceil(self._low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self._high / step + 1e-9) + 1)]


def _name_of(tick: float, names: Sequence[str] | None) -> str:
    if names is None:
        return f"{tick:,.6g}"
    return names[round(tick)] if tick.is_integer() and 0 <= tick < len(names) else ""


def _line(line: Line, number: int, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    color = _COLORS[number % len(_COLORS)]
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in line.points]
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    legend_x, legend_y = _WIDTH - _RIGHT - 190, _TOP + 14 + 18 * number
    marks = [
        f'<polyline points="{path}" class="line" stroke="{color}"/>',
        f'<circle cx="{legend_x}" cy="{legend_y - 4}" r="4" fill="{color}"/>',
        _text(legend_x + 12, legend_y, line.name, "start"),
    ]
    if line.dots:
        marks += [f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"/>' for x, y in places]
    return marks


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
