"""Medians, spreads, ratios; tables, chart."""

import io
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from aios_serve.bench.chart import bar_chart
from aios_serve.bench.samples import Sample
from aios_serve.bench.summary import Spread, compare
from aios_serve.bench.tables import markdown_tables, rich_tables, spread_text
from aios_serve.bench.work import parse_works


def make_samples(work, figures):
    """From engine to setting to the figure of each round; None is a failure."""
    return [
        Sample(
            round_number=number, engine=engine, precision="4bit", variant=variant, work=work, figure=figure, result={}
        )
        for engine, variants in figures.items()
        for variant, rounds in variants.items()
        for number, figure in enumerate(rounds, start=1)
    ]


def compared(work, figures):
    [comparison] = compare(make_samples(work, figures), parse_works(work), ["4bit", "8bit"])
    return comparison


def test_each_engine_is_shown_with_its_best_setting():
    comparison = compared("decode-1", {"llama.cpp": {"Q4_0": [90, 100, 95], "Q4_1": [80, 85, 120]}})
    figure = comparison.figures["llama.cpp"]
    assert figure.variant == "Q4_0"
    assert figure.spread == Spread(median=95, low=90, high=100)


def test_one_lucky_round_does_not_make_a_setting_the_best():
    comparison = compared("decode-1", {"openvino": {"stopped": [500], "steady": [60, 61, 62]}})
    assert comparison.figures["openvino"].variant == "steady"


def test_less_memory_is_better():
    comparison = compared(
        "memory-1", {"aios": {"a": [150], "b": [140]}, "openvino": {"c": [500]}, "llama.cpp": {"d": [280]}}
    )
    assert comparison.figures["aios"].variant == "b"
    assert comparison.best_peer == "llama.cpp"
    assert comparison.ratio is not None
    assert comparison.ratio.median == 0.5


def test_the_ratio_is_taken_round_by_round_to_the_best_peer():
    figures = {"aios": {"a": [200, 100, 300]}, "llama.cpp": {"b": [100, 50, 100]}, "openvino": {"c": [99, 49, 99]}}
    comparison = compared("decode-1", figures)
    assert comparison.best_peer == "llama.cpp"
    assert comparison.ratio == Spread(median=2.0, low=2.0, high=3.0)


@pytest.mark.parametrize("figures", [{"aios": {"a": [1.0]}}, {"openvino": {"b": [1.0]}}])
def test_without_a_peer_or_without_aios_there_is_no_ratio(figures):
    assert compared("decode-1", figures).ratio is None


def test_an_engine_that_always_failed_is_missing_and_nothing_at_all_is_no_comparison():
    comparison = compared("decode-1", {"aios": {"a": [None, None]}, "llama.cpp": {"b": [3, 4]}})
    assert [*comparison.figures] == ["llama.cpp"]
    assert compare(make_samples("decode-1", {"aios": {"a": [None]}}), parse_works("decode-1"), ["4bit"]) == []


def test_figures_have_as_many_digits_as_mean_something():
    assert spread_text(Spread(median=230.4, low=221.2, high=243.0)) == "230 (221–243)"
    assert spread_text(Spread(median=15.21, low=12.7, high=16.7)) == "15.2 (12.7–16.7)"
    assert spread_text(Spread(median=1.314, low=1.2, high=1.42)) == "1.31 (1.20–1.42)"


def comparisons():
    figures = {"aios": {"Q4_1 <a>": [200, 210]}, "llama.cpp": {"Q4_0": [100, 102]}}
    samples = make_samples("decode-1", figures) + make_samples(
        "memory-1", {"aios": {"Q4_1": [150]}, "vllm": {"BF16": [5000]}}
    )
    return compare(samples, parse_works("decode-1,memory-1"), ["4bit"])


def test_markdown_has_a_row_per_work_and_a_column_per_engine():
    lines = markdown_tables(comparisons()).splitlines()
    assert lines[0] == "**4-bit weights**"
    assert lines[2] == "| work | unit | aios | llama.cpp | vllm | AIOS / best peer |"
    assert lines[4].startswith("| decode-1 | tok/s | 205 (200–210)<br>Q4_1 <a> | 101 (100–102)<br>Q4_0 | – | 2.03")
    assert lines[5].endswith("| – | 5000 (5000–5000)<br>BF16 | 0.03 (0.03–0.03)<br>vllm |")


def test_the_terminal_shows_the_same():
    console = Console(width=160, record=True, file=io.StringIO())
    for table in rich_tables(comparisons()):
        console.print(table)
    text = console.export_text()
    assert "4-bit weights" in text
    assert "205 (200–210)" in text


def test_the_chart_is_well_formed_and_shows_every_engine():
    root = ET.fromstring(bar_chart(comparisons(), subtitle='with <odd> & "words"'))
    texts = ["".join(element.itertext()) for element in root.iter() if element.tag.endswith("text")]
    assert {"aios", "llama.cpp", "vllm", "decode-1", "memory-1", 'with <odd> & "words"'} <= set(texts)
    assert any("205 tok/s · 2.03× · Q4_1 <a>" in text for text in texts)
    bars = [element for element in root.iter() if element.tag.endswith("rect")]
    assert all(0 < float(bar.attrib["width"]) < 860 for bar in bars[1:])
