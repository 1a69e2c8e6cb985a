"""`aios-sched simulate`: what it prints and writes, and one line for every mistake."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from aios_kvcache.page_events import Evicted, Found
from aios_kvcache.page_trace import PageTrace
from aios_sched.cli import main

STEP = ("--step-seconds", "0.02")


def run(capsys, *args):
    """Exit status, stdout and stderr of the command."""
    with pytest.raises(SystemExit) as stop:
        main(["simulate", *args])
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_everything_is_written(capsys, tmp_path):
    paths = {name: tmp_path / name for name in ("json", "plot", "timeline", "timeline-plot")}
    files = [each for name, path in paths.items() for each in (f"--{name}", str(path))]
    status, out, _ = run(capsys, "poisson", "-n", "50", *STEP, "--slo-ttft", "1", *files)
    assert status == 0
    for word in ("TTFT", "TPOT", "ITL", "end to end", "queueing", "goodput", "preemptions", "contiguous", "busy"):
        assert word in out
    figures = json.loads(paths["json"].read_text())
    assert figures["requests"]["finished"] == 50
    assert figures["goodput"]["share"] <= 1
    ET.parse(paths["plot"])
    assert json.loads(paths["timeline"].read_text())["traceEvents"]
    assert ET.parse(paths["timeline-plot"]).getroot().tag.endswith("svg")


def test_pages_are_watched_and_the_figures_stay_the_same(capsys, tmp_path):
    command = ("chat", "-n", "40", *STEP, "--num-blocks", "300", "--max-num-seqs", "8", "--json", "-")
    figures = json.loads(run(capsys, *command)[1])
    status, out, err = run(
        capsys, *command, "--page-trace", str(tmp_path / "p.jsonl"), "--page-map", str(tmp_path / "p.svg")
    )
    assert status == 0
    assert json.loads(out) == figures
    assert "left out" not in err
    trace = PageTrace.read(tmp_path / "p.jsonl")
    found = [record.event for record in trace.records if isinstance(record.event, Found)]
    assert sum(event.num_found for event in found) == figures["prefix_cache"]["hits"]
    assert sum(isinstance(record.event, Evicted) for record in trace.records) == figures["prefix_cache"]["evictions"]
    assert trace.end == pytest.approx(figures["seconds"])
    assert not any(trace.at(len(trace.records)).owners)
    assert ET.parse(tmp_path / "p.svg").getroot().tag.endswith("svg")


def test_a_page_trace_keeps_the_last_events_and_says_so(capsys, tmp_path):
    path = tmp_path / "p.jsonl"
    _, out, _ = run(capsys, "poisson", "-n", "20", *STEP, "--page-trace", str(path), "--page-events", "30")
    trace = PageTrace.read(path)
    assert len(trace.records) == 30
    assert f"the first {trace.number:,} events of pages were left out" in " ".join(out.split())


@pytest.mark.parametrize("option", ["--page-trace", "--page-map"])
def test_pages_that_cannot_be_written_are_one_line(option, capsys, tmp_path):
    status, _, err = run(capsys, "poisson", "-n", "2", *STEP, option, str(tmp_path / "none" / "pages"))
    assert status == 1
    assert "pages cannot be written" in err


def test_the_page_map_in_the_documents_is_what_its_command_draws(capsys, tmp_path, monkeypatch):
    root = Path(__file__).parents[3]
    text = (root / "docs/en/memory.md").read_text().replace("\\\n", " ")
    (command,) = (line for line in text.splitlines() if line.startswith("aios-sched simulate docs/en/assets/page-map"))
    committed = "docs/en/assets/page-map-example.svg"
    words = [str(tmp_path / "again.svg") if word == committed else word for word in command.split()[2:]]
    monkeypatch.chdir(root)
    assert run(capsys, *words)[0] == 0
    assert (tmp_path / "again.svg").read_text() == (root / committed).read_text()


def test_json_on_stdout_is_nothing_but_json(capsys):
    status, out, _ = run(capsys, "chat", "-n", "20", *STEP, "--json", "-")
    assert status == 0
    assert json.loads(out)["prefix_cache"]["hits"] > 0


def test_the_same_command_gives_the_same_figures(capsys):
    command = ("bursts", "-n", "80", *STEP, "--replicas", "3", "--json", "-", "--seed", "5")
    assert run(capsys, *command)[1] == run(capsys, *command)[1]


def test_a_csv_on_a_measured_engine(capsys, tmp_path):
    trace, cost = tmp_path / "trace.csv", tmp_path / "cost.json"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0,10,3\n1,10,3\n")
    cost.write_text('{"step_s": 0.1}')
    status, out, _ = run(capsys, str(trace), "--cost", str(cost), "--json", "-")
    assert status == 0
    assert json.loads(out)["seconds"] == pytest.approx(1.3)


def test_the_smallest_fleet_is_named(capsys, tmp_path):
    status, out, _ = run(
        capsys,
        *("poisson", "-n", "300", "--rate", "30", "--output-tokens", "40", *STEP, "--max-num-seqs", "8"),
        *("--sweep", "replicas", "1..30", "--slo-ttft", "0.5", "--json", "-", "--plot", str(tmp_path / "p.svg")),
    )
    assert status == 0
    figures = json.loads(out)
    assert figures["smallest_fleet"] == int(figures["rows"][-1]["value"])
    assert 1 < figures["smallest_fleet"] < 30
    ET.parse(tmp_path / "p.svg")


@pytest.mark.parametrize("sweep", [("block-size", "8,16"), ("routing", "session,round-robin"), ("policy", "fcfs")])
def test_sweeps_print_one_line_per_value(capsys, sweep):
    status, out, _ = run(capsys, "chat", "-n", "40", *STEP, "--replicas", "2", "--sweep", *sweep)
    assert status == 0
    for value in sweep[1].split(","):
        assert value in out


def test_a_datasheet_is_enough(capsys):
    status, out, _ = run(capsys, "poisson", "-n", "30", "--device", "t4", "--json", "-")
    assert status == 0
    assert json.loads(out)["steps"]["host_busy_share"] > 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("poisson",), "0 of --cost, --device and --step-seconds"),
        (("poisson", *STEP, "--device", "h100"), "2 of --cost, --device and --step-seconds"),
        (("poisson", "--device", "abacus"), "device 'abacus' is unknown; use one of h200"),
        (("poisson", *STEP, "--efficiency", "0.5"), "--efficiency has no effect without --device"),
        (("poisson", "--device", "t4", "--token-seconds", "1"), "--token-seconds has no effect without --step-seconds"),
        (("poisson", *STEP, "--turns", "3"), "--turns has no effect on the trace 'poisson'"),
        (("sonnet", *STEP), "trace 'sonnet' is neither a file nor one of"),
        (("poisson", *STEP, "--rate", "often"), "a rate of nan"),
        (("poisson", *STEP, "--scheduling-policy", "x"), "policy 'x' is unknown"),
        (("poisson", *STEP, "--sweep", "color", "red"), "option 'color' cannot be swept"),
        (("poisson", *STEP, "--sweep", "policy", "x"), "policy 'x' is unknown"),
        (("poisson", *STEP, "--sweep", "replicas", "1", "--timeline", "t.json"), "--timeline shows one simulation"),
        (("poisson", *STEP, "--sweep", "replicas", "1", "--page-map", "p.svg"), "--page-map shows one simulation"),
        (("poisson", *STEP, "--page-events", "9"), "--page-events has no effect without --page-map or --page-trace"),
        (("poisson", *STEP, "--timeline-plot", "t.svg"), "--timeline-plot has no effect without --timeline"),
        (("poisson", *STEP, "--num-blocks", "1"), "requests were refused, the first: a prompt of"),
        (("poisson", *STEP, "--block-size", "0"), "--block-size 0"),
        (("poisson", *STEP, "--slo-ttft", "-1"), "an objective of -1.0 s"),
        (("poisson", *STEP, "--replicas", "0"), "--replicas"),
        (("poisson", "--step-seconds", "-1"), "step_s=-1.0"),
        (("poisson", *STEP, "--wrong"), "No such option"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(capsys, args, message):
    status, out, err = run(capsys, *args)
    assert status == 2
    assert message in err
    assert err.count("\n") == 1
    assert not out


def test_a_file_that_cannot_be_used_is_one_line_and_status_1(capsys, tmp_path):
    missing = str(tmp_path / "none" / "file")
    for args in (("poisson", "--cost", missing), (missing + ".csv", *STEP)):
        status, _, err = run(capsys, *args)
        assert (status, err.count("\n")) == (1, 1)
        assert missing in err
    status, _, err = run(capsys, "poisson", "-n", "5", *STEP, "--plot", missing)
    assert status == 1
    assert "cannot be written" in err


def test_a_simulation_never_loads_torch():
    script = (
        "import sys\nfrom aios_sched.cli import main\n"
        "try:\n    main(['simulate', 'poisson', '-n', '5', '--device', 't4'])\n"
        "except SystemExit as stop:\n    assert not stop.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True)
