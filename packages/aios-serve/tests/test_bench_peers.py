"""From options to files, with an engine that is a script; processes that fail, hang or stop early."""

import io
import json
import shutil
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from rich.console import Console

from aios_serve.bench import commands, machine, peers
from aios_serve.bench.commands import run_command
from aios_serve.bench.engines import AIOS, Engine, Variant
from aios_serve.bench.errors import BenchError
from aios_serve.bench.model_files import SourceModel
from aios_serve.bench.peers import PeersConfig, run_peers
from aios_serve.bench.samples import check_result
from aios_serve.bench.work import parse_works

FAKE_RUNNER = """
    import time

    from .timed_job import serve


    class Fake:
        facts = {}
        version = "9"

        def __init__(self, job):
            self.options = job["options"]
            if "failure" in self.options:
                raise SystemExit(self.options["failure"])

        def generate(self, prompts, new_tokens, timeline):
            tokens = [[] for _ in prompts]
            for _ in range(new_tokens - self.options.get("missing", 0)):
                time.sleep(self.options.get("pause", 0))
                for produced in tokens:
                    produced.append(len(produced))
                timeline.record([len(produced) for produced in tokens])
            timeline.record([new_tokens] * len(prompts))
            return tokens


    def main():
        serve(lambda: Fake)
"""


@pytest.fixture(autouse=True)
def runners(tmp_path, monkeypatch):
    """The real machinery of the runners, with one more engine."""
    folder = tmp_path / "runners"
    shutil.copytree(commands.RUNNERS, folder)
    (folder / "run_fake.py").write_text(textwrap.dedent(FAKE_RUNNER))
    monkeypatch.setattr(commands, "RUNNERS", folder)
    monkeypatch.setenv("AIOS_CACHE_DIR", str(tmp_path / "cache"))
    file = tmp_path / "model.gguf"
    file.write_bytes(b"")
    source = SourceModel(path=file, name="tiny", file_type="Q4_0", vocab_size=500, context_length=600)
    monkeypatch.setattr(peers, "find_source", lambda *_, **__: source)


def engine(name, **settings):
    variants = tuple(Variant(name=key, model="source", options=options) for key, options in settings.items())
    return Engine(name=name, runner="run_fake", variants={"4bit": variants})


def compare(tmp_path, *engines, work="decode-2@4,memory-1", repeats=2):
    console = Console(record=True, width=200, file=io.StringIO())
    config = PeersConfig(
        model=None,
        engines=engines,
        precisions=["4bit"],
        works=parse_works(work),
        threads=1,
        repeats=repeats,
        seconds=0,
        timeout=30,
        output=tmp_path / "out",
    )
    status = run_peers(config, console)
    report = json.loads((tmp_path / "out" / "peers.json").read_text())
    return status, report, console.export_text()


def test_a_comparison_ends_in_tables_json_and_a_chart(tmp_path):
    status, report, shown = compare(tmp_path, engine(AIOS, ours={}), engine("llama.cpp", theirs={"pause": 0.0005}))
    assert status == 0
    decode, memory = report["summary"]
    assert decode["engines"].keys() == memory["engines"].keys() == {AIOS, "llama.cpp"}
    assert decode["ratio"]["median"] > 1
    assert decode["best_peer"] == "llama.cpp"
    assert len(report["samples"]) == 2 * 2 + 2
    assert {sample["result"]["version"] for sample in report["samples"]} == {"9"}
    assert report["machine"]["cores"] >= 1
    assert "| decode-2@4 |" in (tmp_path / "out" / "peers.md").read_text()
    assert (tmp_path / "out" / "peers.svg").read_text().startswith("<svg")
    assert "round 2: llama.cpp theirs, decode-2@4" in shown


def test_one_engine_s_failure_is_told_and_does_not_stop_the_others(tmp_path):
    broken = engine("openvino", broken={"failure": "no such kernel"}, fine={})
    status, report, shown = compare(tmp_path, engine(AIOS, ours={}), broken, work="prefill-9")
    assert status == 0
    assert report["summary"][0]["engines"]["openvino"]["variant"] == "fine"
    assert "no such kernel" in shown


def test_an_engine_that_stops_early_has_no_figure(tmp_path):
    status, report, shown = compare(tmp_path, engine(AIOS, ours={"missing": 1}), work="decode-1@4")
    assert status == 1
    assert report["summary"] == []
    assert "wants 129 tokens" in shown


def test_work_beyond_the_model_s_context_is_left_out_with_a_word(tmp_path):
    _, report, shown = compare(tmp_path, engine(AIOS, ours={}), work="prefill-9,prefill-4096")
    assert "prefill-4096 is left out: tiny takes 600 tokens" in shown
    assert {sample["work"] for sample in report["samples"]} == {"prefill-9"}


def test_nothing_to_measure_is_an_error(tmp_path):
    with pytest.raises(BenchError, match="none of these engines"):
        compare(tmp_path, Engine(name=AIOS, runner="run_fake", variants={}))


def test_an_interrupted_comparison_shows_what_it_has(tmp_path, monkeypatch):
    measure = peers.ProcessMeasure.__call__

    def interrupted(self, task, round_number):
        if round_number == 2:
            raise KeyboardInterrupt
        return measure(self, task, round_number)

    monkeypatch.setattr(peers.ProcessMeasure, "__call__", interrupted)
    status, report, shown = compare(tmp_path, engine(AIOS, ours={}), work="prefill-9")
    assert status == 0
    assert len(report["samples"]) == 1
    assert "interrupted" in shown


@pytest.mark.parametrize("printed", ["", "no json", "{}", "[1]", '{"produced": [129]}', '{"produced": [129, 128]}'])
def test_a_result_that_is_none_is_refused(printed):
    with pytest.raises(BenchError):
        check_result(printed, parse_works("decode-2")[0])


def test_a_failing_program_ends_in_its_last_words():
    script = "import sys; print('x' * 5000, 'the reason', file=sys.stderr); sys.exit(3)"
    with pytest.raises(BenchError, match="trying failed with status 3") as caught:
        run_command([sys.executable, "-c", script], what="trying", timeout=20)
    assert str(caught.value).endswith("the reason")
    assert len(str(caught.value)) < 2000


def test_a_program_that_hangs_is_ended_with_its_children(tmp_path):
    started = tmp_path / "child"
    child = f"import time, pathlib; pathlib.Path({str(started)!r}).touch(); time.sleep(60)"
    script = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    begin = time.monotonic()
    with pytest.raises(BenchError, match="waiting took longer than 2 s"):
        run_command([sys.executable, "-c", script], what="waiting", timeout=2)
    assert time.monotonic() - begin < 20
    assert started.exists()
    while any(str(started).encode() in line for line in _command_lines()):
        assert time.monotonic() - begin < 20
        time.sleep(0.05)


def test_a_program_that_is_not_there_is_named():
    with pytest.raises(BenchError, match="no-such-program"):
        run_command(["no-such-program"], what="starting", timeout=1)


def _command_lines():
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            yield file.read_bytes()
        except OSError:
            continue


def test_the_time_of_other_programs_is_what_is_busy_without_our_own(monkeypatch):
    readings = iter([(100.0, 500.0, 7.0), (110.0, 515.0, 12.0)])
    monkeypatch.setattr(machine, "_seconds", lambda: next(readings))
    assert machine.Elsewhere().cores() == 1.0


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system does not tell who is busy")
def test_another_program_is_noticed():
    elsewhere = machine.Elsewhere()
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(1)
        cores = elsewhere.cores()  # a child that was not waited for yet counts as somebody else
        other.kill()
    assert cores is not None
    assert cores > 0.1
