"""A page map over time, as SVG: pages from top to bottom, time from left to right, one colour per sequence.

Paging, sharing, eviction and preemption can be seen in it: colours in no order from top to bottom, black where several
sequences hold a page, a cross where a cached page was given up, a triangle where a sequence lost all that it had.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from html import escape
from typing import NamedTuple

from aios_kvcache.page_events import Copied, Evicted, Forked, Found, Held, PageEvent, Published, Released, Reset, Taken
from aios_kvcache.page_trace import PageTrace
from aios_model.errors import ConfigError

_WIDTH, _LEFT, _RIGHT, _TOP, _BOTTOM = 760, 84, 24, 96, 48
_SPAN = _WIDTH - _LEFT - _RIGHT
# Okabe and Ito's colours, told apart by the colour-blind too, with the colour of letters on them; black is for sharing.
_COLORS = (
    ("#e69f00", "#000"),
    ("#0072b2", "#fff"),
    ("#009e73", "#fff"),
    ("#cc79a7", "#000"),
    ("#56b4e9", "#000"),
    ("#d55e00", "#fff"),
    ("#f0e442", "#000"),
)
_SHARED, _CACHED, _FREE = "#24292f", "#d0d7de", "#fff"
_STYLE = (
    "text{font:13px sans-serif;fill:#333}.title{font-weight:bold;font-size:15px}.paper{fill:#fff}"
    ".name{font-size:9px}.frame{fill:none;stroke:#8c959f}.mark{fill:none;stroke:#24292f;stroke-width:1.2}"
    ".halo{fill:none;stroke:#fff;stroke-width:3}.copy{fill:none;stroke:#24292f;stroke-width:1.2}"
)
_FINEST = 0.4  # units of the picture: shorter stays are left out, longer ones drawn where they begin and end


def draw_page_map(trace: PageTrace, *, title: str = "Pages over time", max_pages: int = 64) -> str:
    """An SVG document of 760 units' width.

    Args:
        trace: What to draw, from its start to its end.
        title: Above it.
        max_pages: Rows: the pages with the lowest numbers, which a pool hands out first.

    Raises:
        ConfigError: `max_pages` is below 1.
        PageHistoryError: The events do not fit each other.
    """
    if max_pages < 1:
        raise ConfigError(f"a map of {max_pages} pages shows nothing; give at least 1")
    num_rows = min(max_pages, trace.num_blocks)
    history = _History(trace, num_rows)
    frame = _Frame(trace, num_rows)
    marks = [f'<text x="{_LEFT}" y="24" class="title">{escape(title)}</text>', *_legend(), *frame.background()]
    marks += frame.stays(history.stays)
    marks += frame.names(history.stays)
    marks += frame.copies(history.copies)
    marks += frame.evictions(history.evictions)
    marks += frame.preemptions(history.preemptions)
    body, height = "\n  ".join(marks), frame.bottom + _BOTTOM
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:g}" role="img">\n'
        f'  <style>{_STYLE}</style>\n  <rect width="{_WIDTH}" height="{height:g}" class="paper"/>\n  {body}\n</svg>\n'
    )


class _Stay(NamedTuple):
    """A while in which a page did not change: one sequence's (`owner`), or "", and then `shared` or `cached`."""

    page: int
    look: str
    owner: str
    begin: float
    end: float


class _History:
    """What a trace says of the first `num_rows` pages.

    Attributes:
        stays: How long each page was what, in no order.
        copies: (time, source, target).
        evictions: (time, page).
        preemptions: (time, sequence): it gave back all its pages, and took some again later.
    """

    def __init__(self, trace: PageTrace, num_rows: int) -> None:
        self.stays: list[_Stay] = []
        self.copies: list[tuple[float, int, int]] = []
        self.evictions: list[tuple[float, int]] = []
        self.preemptions: list[tuple[float, str]] = []
        self._num_rows = num_rows
        self._states = trace.start.copy()
        self._latest: dict[int, _Stay] = {}
        self._since = {page: (self._look(page), trace.time) for page in range(1, num_rows + 1)}
        self._num_held = Counter(owner for owners in self._states.owners for owner in owners)
        self._admitted = set(self._num_held)
        self._left: dict[str, float] = {}  # when those that had been admitted gave their last page back
        for _, time, event in trace.records:
            self._states.apply(event)
            self._note(event, time)
        for page in self._since:
            self._close(page, trace.end)
        self.stays += self._latest.values()

    def _note(self, event: PageEvent, time: float) -> None:
        self._count_pages(event, time)
        for page in _pages_of(event, self._num_rows):
            if page <= self._num_rows and self._look(page) != self._since[page][0]:
                self._close(page, time)
        if isinstance(event, Evicted) and event.page <= self._num_rows:
            self.evictions.append((time, event.page))
        elif isinstance(event, Copied) and max(event.source, event.target) <= self._num_rows:
            self.copies.append((time, event.source, event.target))

    def _count_pages(self, event: PageEvent, time: float) -> None:
        if isinstance(event, Taken | Held | Forked):
            self._num_held[event.sequence] += len(event.pages)
        elif isinstance(event, Found):  # not sooner: a request that has to wait is looked up, and let go again
            self._admitted.add(event.sequence)
            if event.sequence in self._left:
                self.preemptions.append((self._left.pop(event.sequence), event.sequence))
        elif isinstance(event, Released):
            self._num_held[event.sequence] -= len(event.pages)
            if not self._num_held[event.sequence] and event.sequence in self._admitted:
                self._admitted.remove(event.sequence)
                self._left[event.sequence] = time

    def _look(self, page: int) -> tuple[str, str]:
        status, owners = self._states.status(page), self._states.owners[page]
        return ("owned", owners[0]) if len(owners) == 1 else (status, "")

    def _close(self, page: int, time: float) -> None:
        (look, owner), begin = self._since[page]
        if look != "free" and time > begin:
            stay, before = _Stay(page, look, owner, begin, time), self._latest.get(page)
            if before is not None and before[1:3] == stay[1:3] and before.end == begin:
                stay = before._replace(end=time)  # it changed for no time at all: a request that had to wait
            elif before is not None:
                self.stays.append(before)
            self._latest[page] = stay
        self._since[page] = self._look(page), time


def _pages_of(event: PageEvent, num_rows: int) -> Iterable[int]:
    if isinstance(event, Taken | Held | Forked | Released):
        return event.pages
    if isinstance(event, Published | Evicted):
        return (event.page,)
    if isinstance(event, Copied):
        return event.source, event.target
    return range(1, num_rows + 1) if isinstance(event, Reset) else ()


class _Frame:
    """Where times and pages are in the picture."""

    def __init__(self, trace: PageTrace, num_rows: int) -> None:
        self._start, self._end = trace.time, max(trace.end, trace.time + 1e-9)
        self._num_rows, self._num_blocks = num_rows, trace.num_blocks
        self._row = max(4.0, min(15.0, 480 / num_rows))
        self.bottom = _TOP + self._row * num_rows

    def background(self) -> Iterator[str]:
        """Axes."""
        yield f'<rect x="{_LEFT}" y="{_TOP}" width="{_SPAN}" height="{self.bottom - _TOP:g}" class="frame"/>'
        step = next(step for step in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if step * self._row >= 14)
        for page in (1, *range(step if step > 1 else 2, self._num_rows + 1, step)):
            if page == 1 or page > step / 2 + 1 or step == 1:
                yield _text(_LEFT - 8, self._top_of(page) + self._row / 2 + 4, str(page), "end")
        for share in (0.0, 0.25, 0.5, 0.75, 1.0):
            seconds = share * (self._end - self._start)
            yield _text(_LEFT + share * _SPAN, self.bottom + 18, f"{seconds:.3g} s", "middle")
        rest = "" if self._num_rows == self._num_blocks else f" (the first {self._num_rows} of {self._num_blocks:,})"
        middle = (_TOP + self.bottom) / 2
        yield f'<g transform="translate(30 {middle:g}) rotate(-90)">{_text(0, 0, f"page{rest}", "middle")}</g>'

    def stays(self, stays: list[_Stay]) -> Iterator[str]:
        """One path per colour: small, and quick to draw."""
        colors, paths = _colors_of(stays), defaultdict(list)
        height = self._row - (1 if self._row > 6 else 0.3)
        for page, look, owner, begin, end in stays:
            x, width = self._place(begin), self._place(end) - self._place(begin)
            if width >= _FINEST:
                color = colors[owner][0] if owner else _SHARED if look == "shared" else _CACHED
                gap = 0.6 if width > 3 else 0.0
                paths[color].append(
                    f"M{x:.1f} {self._top_of(page):.1f}h{width - gap:.1f}v{height:.1f}h{gap - width:.1f}z"
                )
        for color, path in sorted(paths.items()):
            yield f'<path fill="{color}" d="{"".join(path)}"/>'

    def names(self, stays: list[_Stay]) -> Iterator[str]:
        """Each sequence's name, in the middle of the longest of its stays if there is room."""
        if self._row < 10:
            return
        longest: dict[str, _Stay] = {}
        for stay in stays:
            known = longest.get(stay.owner)
            if stay.owner and (known is None or stay.end - stay.begin > known.end - known.begin):
                longest[stay.owner] = stay
        colors = _colors_of(stays)
        for owner, stay in longest.items():
            begin, end = self._place(stay.begin), self._place(stay.end)
            if end - begin >= 6 * len(owner) + 6:
                place = f'x="{(begin + end) / 2:.1f}" y="{self._middle_of(stay.page) + 3:.1f}" text-anchor="middle"'
                yield f'<text {place} class="name" style="fill:{colors[owner][1]}">{escape(owner)}</text>'

    def copies(self, copies: list[tuple[float, int, int]]) -> Iterator[str]:
        """An arrow from the page that was copied to its copy."""
        num_drawn = Counter[float]()
        for time, source, target in copies:
            x, begin, end = self._place(time) + 5 * num_drawn[time], self._middle_of(source), self._middle_of(target)
            num_drawn[time] += 1  # side by side, those of one step
            tip = 4 if end > begin else -4
            path = f"M{x:.1f} {begin:.1f}V{end:.1f}m-3 {-tip}l3 {tip}l3 {-tip}"
            yield f'<path d="{path}" class="halo"/><path d="{path}" class="copy"/>'

    def evictions(self, evictions: list[tuple[float, int]]) -> Iterator[str]:
        """A cross where a cached page ends."""
        size = min(3.0, self._row / 3)
        shape = f"l{2 * size:.1f} {2 * size:.1f}m0 {-2 * size:.1f}l{-2 * size:.1f} {2 * size:.1f}"
        crosses = [
            f"M{self._place(time) - size:.1f} {self._middle_of(page) - size:.1f}{shape}" for time, page in evictions
        ]
        if crosses:
            path = "".join(crosses)
            yield f'<path d="{path}" class="halo"/><path d="{path}" class="mark"/>'

    def preemptions(self, preemptions: list[tuple[float, str]]) -> Iterator[str]:
        """A triangle above the moment, with the name if there are few."""
        for time, sequence in preemptions:
            x = self._place(time)
            yield f'<path d="M{x - 4:.1f} {_TOP - 8}h8l-4 7z" fill="{_SHARED}"/>'
            if len(preemptions) <= 8:
                yield f'<text x="{x:.1f}" y="{_TOP - 11}" text-anchor="middle" class="name">{escape(sequence)}</text>'

    def _place(self, time: float) -> float:
        return _LEFT + (time - self._start) / (self._end - self._start) * _SPAN

    def _top_of(self, page: int) -> float:
        return _TOP + (page - 1) * self._row + (0.5 if self._row > 6 else 0.0)

    def _middle_of(self, page: int) -> float:
        return _TOP + (page - 0.5) * self._row


def _colors_of(stays: list[_Stay]) -> dict[str, tuple[str, str]]:
    """A colour for each owner, by when it first held a page alone."""
    begins: dict[str, float] = {}
    for _, _, owner, begin, _ in stays:
        if owner:
            begins[owner] = min(begin, begins.get(owner, begin))
    return {
        owner: _COLORS[number % len(_COLORS)] for number, owner in enumerate(sorted(begins, key=begins.__getitem__))
    }


def _legend() -> Iterator[str]:
    for number, (color, _) in enumerate(_COLORS):
        yield f'<rect x="{_LEFT + 11 * number}" y="36" width="10" height="10" fill="{color}"/>'
    yield _text(_LEFT + 11 * len(_COLORS) + 4, 45, "one sequence's page", "start")
    for x, color, name in ((314, _SHARED, "shared"), (392, _CACHED, "cached, nobody's"), (532, _FREE, "free")):
        edge = ' stroke="#8c959f"' if color == _FREE else ""
        yield f'<rect x="{x}" y="36" width="10" height="10" fill="{color}"{edge}/>'
        yield _text(x + 15, 45, name, "start")
    yield f'<path d="M{_LEFT + 2} 56l6 6m0 -6l-6 6" class="mark"/>' + _text(_LEFT + 15, 63, "evicted", "start")
    yield '<path d="M170 53v11m-3 -4l3 4l3 -4" class="copy"/>' + _text(180, 63, "copied on write", "start")
    yield f'<path d="M315 55h8l-4 7z" fill="{_SHARED}"/>' + _text(329, 63, "preempted: lost all its pages", "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
