"""The page map shows what happened, where and when it did: read back from the shapes it is drawn with."""

from __future__ import annotations

import re
from xml.etree import ElementTree as ET

import pytest

from aios_kvcache.block_manager import BlockManager
from aios_kvcache.page_map import draw_page_map
from aios_kvcache.page_recorder import PageRecorder
from aios_model.errors import ConfigError

SHARED, CACHED = "#24292f", "#d0d7de"
LEFT, SPAN, TOP, ROW = 84, 652, 96, 15


class Scene:
    """A small pool with a clock that is set by hand; ten seconds long."""

    def __init__(self, num_blocks: int) -> None:
        self.now = 0.0
        self.manager = BlockManager(num_blocks=num_blocks, block_size=2)
        self.recorder = PageRecorder(self.manager, clock=lambda: self.now)

    def start(self, name, tokens, *, at):
        self.now = at
        found = self.manager.open(name, tokens)
        assert self.manager.reserve(name, start=found, end=len(tokens)) is not None
        self.manager.publish(name, tokens, len(tokens))

    def end(self, name, *, at):
        self.now = at
        self.manager.free(name)

    def svg(self, **options):
        self.now = 10.0
        return ET.fromstring(draw_page_map(self.recorder.trace(), **options))


def boxes(svg):
    """(color, page, from, to) of everything that is filled in the map, in order."""
    found = []
    for path in svg.iterfind(".//{*}path"):
        for x, y, width in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v[\d.]+h-", path.get("d")):
            begin, end = ((float(value) - LEFT) / SPAN * 10 for value in (x, float(x) + float(width)))
            found.append((path.get("fill"), int((float(y) - TOP) / ROW) + 1, round(begin, 1), round(end, 1)))
    return sorted(found, key=lambda box: (box[1], box[2]))


def marks(svg, kind):
    return [path for path in svg.iterfind(".//{*}path") if path.get("class") == kind][
        1:
    ]  # the first one is the legend's


def test_who_holds_a_page_when_is_read_from_colors():
    scene = Scene(4)
    scene.start("a", [1, 2, 3], at=0)
    scene.start("b", [1, 2, 4], at=2)
    scene.end("a", at=5)
    scene.end("b", at=8)
    first, second = "#e69f00", "#0072b2"
    assert boxes(scene.svg()) == [
        (first, 1, 0, 2),
        (SHARED, 1, 2, 5),
        (second, 1, 5, 8),
        (CACHED, 1, 8, 10),
        (first, 2, 0, 5),
        (second, 3, 2, 8),
    ]


def test_evictions_and_copies_are_marked_where_they_happen():
    scene = Scene(3)
    scene.start("a", [1, 2, 3], at=0)
    scene.now = 1.0
    scene.manager.fork("a", "b", num_tokens=3)
    assert scene.manager.reserve("b", start=3, end=4)
    scene.end("a", at=2)
    scene.end("b", at=3)
    assert not marks(scene.svg(), "mark")
    scene.start("c", [7, 7, 7, 7, 7], at=5)
    svg = scene.svg()
    (crosses,), (arrow,) = marks(svg, "mark"), marks(svg, "copy")
    assert re.findall(r"M([\d.]+) ([\d.]+)l", crosses.get("d")) == [(f"{LEFT + SPAN / 2 - 3:.1f}", "100.5")]  # page 1
    assert arrow.get("d").startswith(f"M{LEFT + SPAN / 10:.1f} {TOP + 1.5 * ROW}V{TOP + 2.5 * ROW}")  # 2 to 3


def test_a_sequence_that_comes_back_was_preempted_but_one_that_had_to_wait_was_not():
    scene = Scene(6)
    scene.start("a", [1, 2, 3], at=0)
    for time in (1, 2):  # looked up, and refused
        scene.now = time
        scene.manager.open("waits", [1, 2, 3, 4, 5])
        scene.end("waits", at=time)
    scene.start("waits", [1, 2, 3, 4, 5], at=3)
    scene.end("a", at=4)
    for time in (5, 6):
        scene.now = time
        scene.manager.open("a", [1, 2, 3])
        scene.end("a", at=time)
    scene.start("a", [1, 2, 3], at=7)
    svg = scene.svg()
    triangles = [path.get("d") for path in svg.iterfind(".//{*}path") if path.get("d").endswith("l-4 7z")][1:]
    assert triangles == [f"M{LEFT + 0.4 * SPAN - 4:.1f} {TOP - 8}h8l-4 7z"]
    assert [box for box in boxes(svg) if box[1] == 1][:2] == [("#e69f00", 1, 0, 3), (SHARED, 1, 3, 4)]


def test_names_are_escaped_and_large_pools_cut():
    scene = Scene(1000)
    scene.start("<a&b>", list(range(4001, 4100)), at=0)
    svg = scene.svg(max_pages=20, title="Tom & Jerry")
    texts = [text.text for text in svg.iterfind(".//{*}text")]
    assert {"Tom & Jerry", "<a&b>", "page (the first 20 of 1,000)"} <= set(texts)
    assert max(page for _, page, _, _ in boxes(svg)) == 20
    with pytest.raises(ConfigError, match="a map of 0 pages"):
        scene.svg(max_pages=0)


def test_nothing_happening_can_be_drawn():
    assert boxes(Scene(2).svg()) == []
