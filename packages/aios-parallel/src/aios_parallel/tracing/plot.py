"""A trace as a picture in SVG, written by hand: a bar per rank and phase, and a piece of the timeline beside it."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from aios_parallel.tracing.accounts import Account, Window, accounts, waiting_times

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from aios_parallel.tracing.group_trace import GroupTrace

_WIDTH, _TOP, _MARGIN = 1040, 84, 16
_BAR_LEFT, _BAR_WIDTH = 84, 300
_LINE_LEFT, _LINE_WIDTH = 472, 548
_ROW, _ROW_GAP, _PHASE_GAP = 22, 8, 62
_EXCERPT_STEPS = 2
_MOST_EXCERPT_SECONDS = 2
_FINEST = 0.25  # a mark narrower than this, in pixels, is drawn together with its neighbours
_KINDS = ("compute", "transfer", "waiting", "idle")

_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-weight:600;font-size:15px}.phase{font-weight:600}"
    ".note{fill:#57606a;font-size:11px}.inside{fill:#fff;font-size:11px}.paper{fill:#fff}"
    ".compute{fill:#1f6feb}.transfer{fill:#bc4c00}.waiting{fill:#eac54f}.idle{fill:#d8dee4}.driver{fill:#8250df}"
    ".grid{stroke:#afb8c1;stroke-width:.5}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}.note{fill:#9198a1}.inside{fill:#fff}.paper{fill:#0d1117}"
    ".compute{fill:#388bfd}.transfer{fill:#db6d28}.waiting{fill:#d29922}.idle{fill:#30363d}.driver{fill:#a371f7}"
    ".grid{stroke:#484f58}}"
)


def trace_plot(trace: GroupTrace, phases: Mapping[str, Window], *, title: str) -> str:
    """An SVG document, readable on light and on dark pages.

    Left, how the time of each phase is shared out on each rank; right, two steps from its middle, the driver on top.

    Args:
        trace: What happened.
        phases: Stretches of time, by name.
        title: Above it all.
    """
    waits = waiting_times(trace)
    marks = [f'<text x="{_MARGIN}" y="26" class="title">{escape(title)}</text>', *_legend()]
    y = float(_TOP)
    for name, window in phases.items():
        excerpt = _excerpt(trace, window)
        marks += _headings(name, window, excerpt, y)
        marks += _bars(accounts(trace, window), y + _ROW + _ROW_GAP)
        marks += _timeline(trace, waits, excerpt, y)
        y += (trace.mesh.size + 1) * (_ROW + _ROW_GAP) + _PHASE_GAP
    height = y - _PHASE_GAP + 40
    body = "\n  ".join(marks)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" role="img" '
        f'aria-label="{escape(title, quote=True)}">\n  <style>{_STYLE}</style>\n'
        f'  <rect width="{_WIDTH}" height="{height:.0f}" class="paper"/>\n  {body}\n</svg>\n'
    )


def _legend() -> Iterator[str]:
    words = ("compute", "communication", "communication: waiting for others", "idle", "driver")
    x = float(_MARGIN)
    for kind, word in zip((*_KINDS, "driver"), words, strict=True):
        yield _rectangle(x, 40, 12, 12, kind)
        yield _text(x + 18, 50, word)
        x += 40 + 6.6 * len(word)


def _headings(name: str, window: Window, excerpt: Window, y: float) -> Iterator[str]:
    yield _text(_MARGIN, y - 8, f"{name}, {_milliseconds(window.end - window.begin)}", style="phase")
    yield _text(_LINE_LEFT, y - 8, f"{_milliseconds(excerpt.end - excerpt.begin)} of it", style="phase")


def _bars(rows: Sequence[Account], y: float) -> Iterator[str]:
    for row in rows:
        yield _text(_BAR_LEFT - 10, y + 15, f"rank {row.rank}", anchor="end")
        x = float(_BAR_LEFT)
        parts = (row.compute, row.communication - row.waiting, row.waiting, row.idle)
        for kind, part in zip(_KINDS, parts, strict=True):
            width = part / row.wall * _BAR_WIDTH if row.wall else 0.0
            yield _rectangle(x, y, width, _ROW, kind)
            if width > 30:
                style = "inside" if kind in ("compute", "transfer") else "share"
                yield _text(x + width / 2, y + 15, f"{part / row.wall:.0%}", anchor="middle", style=style)
            x += width
        y += _ROW + _ROW_GAP


def _excerpt(trace: GroupTrace, window: Window) -> Window:
    """Some steps from the middle of the window, with what lies before and between them."""
    inside = [step for step in trace.steps if window.begin <= step.submitted and step.returned <= window.end]
    if not inside:
        return window
    count = _EXCERPT_STEPS * trace.mesh.pipeline
    first = max(0, (len(inside) - count) // 2)
    chosen = inside[first : first + count]
    begin = inside[first - 1].returned if first and trace.mesh.pipeline == 1 else chosen[0].submitted
    return Window(begin, min(chosen[-1].returned, begin + _MOST_EXCERPT_SECONDS * 10**9))


def _timeline(trace: GroupTrace, waits: Sequence[Sequence[int]], excerpt: Window, y: float) -> Iterator[str]:
    scale = _LINE_WIDTH / max(1, excerpt.end - excerpt.begin)
    rows = [_driver_marks(trace), *(_rank_marks(trace, rank, waits[rank]) for rank in range(trace.mesh.size))]
    for index, row in enumerate(rows):
        yield _text(_LINE_LEFT - 10, y + 15, "driver" if index == 0 else f"rank {index - 1}", anchor="end")
        yield _rectangle(_LINE_LEFT, y, _LINE_WIDTH, _ROW, "idle")
        for kind, marks in row:
            for begin, end in _merged(marks, excerpt, gap=_FINEST / scale):
                left, width = _LINE_LEFT + (begin - excerpt.begin) * scale, max(_FINEST, (end - begin) * scale)
                yield _rectangle(left, y, width, _ROW, kind)
        y += _ROW + _ROW_GAP
    yield from _ticks(excerpt, scale, y - _ROW_GAP, top=y - len(rows) * (_ROW + _ROW_GAP))


def _driver_marks(trace: GroupTrace) -> list[tuple[str, list[tuple[int, int]]]]:
    """From a result until the next message has been sent."""
    results = [step.returned for step in trace.steps]
    marks = []
    for step in trace.steps:
        before = [time for time in results if time <= step.submitted]
        marks.append((max(before[-1:], default=step.submitted), step.sent))
    return [("driver", marks)]


def _rank_marks(trace: GroupTrace, rank: int, waits: Sequence[int]) -> list[tuple[str, list[tuple[int, int]]]]:
    own = trace.ranks[rank]
    waited = list(zip(own.exchanges, waits, strict=True))
    return [
        ("compute", [(step.begin, step.end) for step in own.steps]),
        ("waiting", [(each.begin, each.begin + wait) for each, wait in waited if wait]),
        ("transfer", [(each.begin + wait, each.end) for each, wait in waited]),
    ]


def _merged(marks: Sequence[tuple[int, int]], excerpt: Window, *, gap: float) -> Iterator[tuple[int, int]]:
    """What of the marks lies in the excerpt; those that nobody could tell apart are one."""
    last: tuple[int, int] | None = None
    for begin, end in marks:
        begin, end = max(begin, excerpt.begin), min(end, excerpt.end)
        if begin >= end:
            continue
        if last is not None and begin - last[1] < gap and end - begin < gap:
            last = last[0], end
            continue
        if last is not None:
            yield last
        last = begin, end
    if last is not None:
        yield last


def _ticks(excerpt: Window, scale: float, y: float, *, top: float) -> Iterator[str]:
    length = (excerpt.end - excerpt.begin) / 1e6
    step = next(step for step in _tick_steps() if length / step <= 6)
    for number in range(int(length / step) + 1):
        x = _LINE_LEFT + number * step * 1e6 * scale
        yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{y + 4:.1f}" class="grid"/>'
        yield _text(x, y + 17, f"{number * step:g} ms", anchor="middle", style="note")


def _tick_steps() -> Iterator[float]:
    power = 0.001
    while True:
        yield from (power, 2 * power, 5 * power)
        power *= 10


def _milliseconds(nanoseconds: int) -> str:
    return f"{nanoseconds / 1e6:.{1 if nanoseconds < 1e8 else 0}f} ms"


def _rectangle(x: float, y: float, width: float, height: float, style: str) -> str:
    return f'<rect x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height:g}" class="{style}"/>'


def _text(x: float, y: float, text: str, *, anchor: str = "start", style: str = "") -> str:
    kind = f' class="{style}"' if style else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{kind}>{escape(text)}</text>'
