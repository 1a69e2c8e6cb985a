"""`aios-bench ranks` on the bundled model, and what it refuses."""

import io
import json
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console
from typer.testing import CliRunner

from aios_model.native import native_status
from aios_parallel.mesh import Mesh
from aios_parallel.tracing.accounts import Account, Overhead, Window
from aios_serve import InferenceEngine, SamplingParams
from aios_serve.bench.cli import app
from aios_serve.bench.errors import BenchError
from aios_serve.bench.rank_tables import overhead_line, phase_table, rank_cells
from aios_serve.bench.ranks import Phase, RanksWork, run_ranks, trace_ranks

OPTIONS = {"device": "cpu", "threads": 1, "max_model_len": 256, "num_gpu_blocks_override": 60}
WORK = RanksWork(batch=3, prompt_tokens=70, output_tokens=6)


def test_work_that_has_no_decode_phase_is_refused() -> None:
    with pytest.raises(BenchError, match="output_tokens=1 cannot be traced: it must be at least 2"):
        RanksWork(batch=1, prompt_tokens=1, output_tokens=1)
    with pytest.raises(BenchError, match="batch=0"):
        RanksWork(batch=0, prompt_tokens=1, output_tokens=2)


def test_prompts_are_the_same_every_time_and_others_for_the_warm_up() -> None:
    prompts = WORK.prompts(vocab_size=300, seed=0)
    assert [len(prompt) for prompt in prompts] == [70] * 3
    assert all(100 <= token < 300 for prompt in prompts for token in prompt)
    assert prompts == WORK.prompts(vocab_size=300, seed=0) != WORK.prompts(vocab_size=300, seed=1)


def test_tables_say_what_was_added_up() -> None:
    row = Account(
        rank=1,
        wall=200_000_000,
        compute=150_000_000,
        communication=30_000_000,
        waiting=10_000_000,
        idle=20_000_000,
        num_steps=4,
        num_exchanges=1234,
        num_bytes=5_600_000,
    )
    found = Overhead(planning=100e3, sending=50e3, total=150e3, num_steps=9)
    phase = Phase(name="decode", window=Window(0, 200_000_000), num_tokens=40, ranks=[row], overhead=found)
    assert rank_cells(row) == ["1", "150.0  75%", "30.0  15%", "10.0   5%", "20.0  10%", "1,234", "5.6"]
    output = io.StringIO()
    Console(file=output, width=80).print(phase_table(phase))
    assert "decode: 200 ms, 40 tokens, 200 tok/s" in output.getvalue()
    assert "…" not in output.getvalue()
    assert overhead_line(phase).startswith("decode: 150 µs from a result")
    assert "waking the rank 50; medians of 9 steps" in overhead_line(phase)


def test_help_names_the_options() -> None:
    result = CliRunner().invoke(app, ["ranks", "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert all(name in result.output for name in ("--tensor-parallel-size", "--trace", "--plot", "--kv-cache-dtype"))


native = pytest.mark.skipif(not native_status().available, reason=native_status().reason)


@native
@pytest.mark.slow
@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2)])
def test_the_bundled_model_is_traced(tensor, pipeline, tmp_path) -> None:
    console = Console(file=io.StringIO(), width=120)
    options = {**OPTIONS, "tensor_parallel": tensor, "pipeline_parallel": pipeline}
    files = {"trace": tmp_path / "new" / "trace.json", "plot": tmp_path / "plot.svg"}
    assert run_ranks(options, WORK, **files, console=console) == 0
    printed = console.file.getvalue()
    assert "prefill: " in printed
    assert "decode: " in printed
    events = json.loads(files["trace"].read_text())["traceEvents"]
    assert {event["pid"] for event in events} == {0, 1, 2}
    assert {event["name"] for event in events if event.get("cat") == "exchange"} == (
        {"all_reduce", "gather"} if tensor == 2 else {"send", "receive"}
    )
    ET.parse(files["plot"])


@native
@pytest.mark.slow
def test_tracing_changes_no_token_and_its_phases_add_up() -> None:
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    prompts = ["1 2 3", "The capital of France is"]
    with InferenceEngine(tensor_parallel=2, max_num_seqs=4, **OPTIONS) as engine:
        result = trace_ranks(engine, WORK)
        plain = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
        engine.tracer.start()
        traced = [output.outputs[0].token_ids for output in engine.generate(prompts, params)]
        assert len(engine.tracer.stop().steps) == 12
        assert traced == plain
    assert result.trace.mesh == Mesh(tensor=2)
    assert result.trace.num_dropped == 0
    assert [phase.num_tokens for phase in result.phases] == [3 * 70, 3 * 5]
    assert result.phases[0].window.end <= result.phases[1].window.begin
    for phase in result.phases:
        for rank in phase.ranks:
            assert rank.compute + rank.communication + rank.idle == rank.wall
            assert min(rank.compute, rank.communication, rank.idle) > 0
            assert rank.waiting <= rank.communication
    decode = result.phases[1]
    assert [rank.num_exchanges for rank in decode.ranks] == [5 * (2 * 30 + 1)] * 2
    for rank in result.trace.ranks:
        within = iter(rank.steps)
        span = next(within)
        for each in rank.exchanges:
            while each.begin > span.end:
                span = next(within)
            assert span.begin <= each.begin <= each.end <= span.end


@native
@pytest.mark.slow
def test_work_that_does_not_fit_is_refused() -> None:
    with pytest.raises(BenchError, match=r"3 sequences of 230 tokens need 45 pages, the pool has 20"):
        run_ranks(
            {**OPTIONS, "tensor_parallel": 2, "num_gpu_blocks_override": 20},
            RanksWork(batch=3, prompt_tokens=224, output_tokens=6),
            trace=None,
            plot=None,
            console=Console(file=io.StringIO()),
        )
