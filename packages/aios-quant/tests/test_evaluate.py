"""Perplexity, divergence and agreement are what their definitions say."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console

from aios_model.errors import ConfigError
from aios_model.model import load_decoder
from aios_model.native.status import native_status
from aios_model.weights.hub import resolve_model
from aios_quant.convert import quantize_checkpoint
from aios_quant.evaluate import Candidate, Evaluation, EvaluationReport, EvaluationSettings, evaluate
from aios_quant.evaluate_plot import Point, scatter_plot
from aios_quant.evaluate_report import report_table, write_json, write_plot
from aios_quant.runner import kernel_factory, make_runner
from aios_quant.schemes.registry import find_scheme
from aios_quant.settings import QuantizeSettings
from aios_quant.transform import quantize_model

TORCH = EvaluationSettings(num_answers=2, num_prompt_tokens=8, num_new_tokens=12, kernels="torch")


@torch.inference_mode()
def all_logits(path, scheme: str, tokens_WS: torch.Tensor) -> torch.Tensor:
    kernels = kernel_factory("torch", None)
    transform = quantize_model(find_scheme(scheme), kernel_factory=kernels.pack)
    decoder = load_decoder(resolve_model(str(path)), dtype="float32", device="cpu", transforms=[transform])
    runner = make_runner(decoder, kernels, max_length=tokens_WS.shape[1])
    return torch.stack([decoder.logits(runner.start(tokens)) for tokens in tokens_WS]).double()


def test_figures_are_those_of_the_definitions(tiny_checkpoint):
    model, tokens_WS = tiny_checkpoint("llama3"), torch.randint(0, 95, (3, 70))
    report = evaluate(
        str(model), [Candidate(name="four", model=None, scheme="int4-g32-a16")], tokens_WS, text="noise", settings=TORCH
    )
    p, q = (all_logits(model, scheme, tokens_WS)[:, :-1].log_softmax(-1) for scheme in ("none", "int4-g32-a16"))
    targets = tokens_WS[:, 1:, None]
    original, four = report.evaluations
    assert original.perplexity == pytest.approx(math.exp(-p.gather(-1, targets).mean()), rel=1e-5)
    assert four.perplexity == pytest.approx(math.exp(-q.gather(-1, targets).mean()), rel=1e-5)
    assert four.kl_divergence == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-4)
    assert four.agreement == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).double().mean()))
    assert report.num_positions == 3 * 69
    assert four.num_bytes < original.num_bytes / 3


def test_the_original_agrees_with_itself(tiny_checkpoint):
    candidates = [Candidate(name="again", model=None, scheme="none")]
    report = evaluate(
        str(tiny_checkpoint("qwen2")), candidates, torch.randint(0, 95, (2, 40)), text="noise", settings=TORCH
    )
    for each in report.evaluations:
        assert each.kl_divergence < 1e-9
        assert each.agreement == 1.0
        assert each.common_prefix == 12
        assert each.tokens_per_second > 0


def test_more_bits_are_nearer(tiny_checkpoint, tmp_path):
    model = str(tiny_checkpoint("llama3"))
    quantize_checkpoint(model, tmp_path / "int8", QuantizeSettings(scheme="int8-a16"))
    candidates = [
        Candidate(name="int8 made here", model=None, scheme="int8-a16"),
        Candidate(name="int8 written", model=str(tmp_path / "int8"), scheme="as-stored-a16"),
        Candidate(name="int4", model=None, scheme="int4-g32-a16"),
    ]
    report = evaluate(model, candidates, torch.randint(0, 95, (2, 60)), text="noise", settings=TORCH)
    original, made, written, four = report.evaluations
    assert original.kl_divergence < written.kl_divergence < four.kl_divergence / 5
    assert made.kl_divergence < four.kl_divergence / 5
    assert [each.name for each in report.evaluations] == ["original", "int8 made here", "int8 written", "int4"]


@pytest.mark.skipif(not native_status().available, reason=native_status().reason)
def test_native_kernels_measure_the_same_as_torch(tiny_checkpoint):
    model, tokens_WS = str(tiny_checkpoint("llama3")), torch.randint(0, 95, (2, 60))
    candidates = [Candidate(name="int8", model=None, scheme="int8")]
    figures = []
    for kernels in ("torch", "native"):
        settings = EvaluationSettings(num_answers=1, num_new_tokens=4, kernels=kernels, threads=1)
        figures.append(evaluate(model, candidates, tokens_WS, text="noise", settings=settings).evaluations[1])
    assert figures[0].perplexity == pytest.approx(figures[1].perplexity, rel=2e-3)
    assert figures[0].kl_divergence == pytest.approx(figures[1].kl_divergence, rel=0.2)


def test_models_with_other_vocabularies_are_not_compared(tiny_checkpoint):
    with pytest.raises(ConfigError, match="knows 160 tokens, the text holds token 200"):
        evaluate(str(tiny_checkpoint("llama3")), [], torch.full((1, 8), 200), text="noise", settings=TORCH)


def test_unknown_kernels_are_refused():
    with pytest.raises(ConfigError, match="choose auto, native or torch"):
        kernel_factory("cuda", None)


@pytest.fixture
def report() -> EvaluationReport:
    rows = [("original", 0.0, 500e6), ("int8 <wide>", 0.004, 130e6), ("int4", 0.3, 70e6)]
    evaluations = tuple(
        Evaluation(
            name=name,
            perplexity=10 + 10 * divergence,
            kl_divergence=divergence,
            agreement=1 - divergence,
            common_prefix=64 - 60 * divergence,
            num_bytes=int(size),
            tokens_per_second=1e10 / size,
        )
        for name, divergence, size in rows
    )
    return EvaluationReport(
        model="tiny",
        text="noise",
        num_positions=100,
        num_answers=4,
        num_new_tokens=64,
        kernels="torch reference kernels",
        evaluations=evaluations,
    )


def test_the_table_has_a_row_per_candidate(report):
    console = Console(width=80, file=io.StringIO())
    console.print(report_table(report))
    text = console.file.getvalue()
    for word in (
        "original",
        "int8 <wide>",
        "130.0",
        "10.040",
        "+0.40%",
        "0.0040",
        "99.6%",
        "63.8",
        "76.9",
    ):
        assert word in text


def test_json_holds_every_figure(report, tmp_path):
    write_json(report, tmp_path / "figures.json")
    read = json.loads((tmp_path / "figures.json").read_text())
    assert read["evaluations"][2]["kl_divergence"] == 0.3
    assert read["num_positions"] == 100


def test_the_plot_is_valid_svg_with_a_point_per_candidate(report, tmp_path):
    from xml.etree import ElementTree as ET

    write_plot(report, tmp_path / "plot.svg")
    root = ET.parse(tmp_path / "plot.svg").getroot()
    circles = root.findall(".//{http://www.w3.org/2000/svg}circle")
    places = [(float(circle.get("cx")), float(circle.get("cy"))) for circle in circles]
    # The original has no error to draw. Four bits are further left and, being worse, higher up.
    (four, eight) = sorted(places)
    assert four[1] < eight[1]
    texts = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"int4", "int8 <wide>"} <= set(texts)


@pytest.mark.parametrize("count", [0, 1, 40])
def test_any_number_of_points_can_be_plotted(count):
    points = [Point(label=f"p{i}", x=torch.rand(()).item() * 10 ** (i % 5), y=10.0 ** (-(i % 7))) for i in range(count)]
    svg = scatter_plot(points, title="t", x_title="x", y_title="y")
    assert svg.count("<circle") == count
    assert "nan" not in svg
