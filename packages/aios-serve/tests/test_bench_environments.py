"""Environments of peers, with a uv that only pretends; models in the forms that peers read."""

import json
import os
import stat
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from aios_serve.bench import model_files
from aios_serve.bench.engines import ENGINES, Engine
from aios_serve.bench.environments import Environments, bench_cache
from aios_serve.bench.errors import BenchError
from aios_serve.bench.model_files import ModelFiles, SourceModel, find_source

FAKE_UV = """#!{python}
import json, os, pathlib, sys
with open({log!r}, "a") as log:
    log.write(json.dumps([sys.argv[1:], os.environ.get("CMAKE_ARGS")]) + "\\n")
if "broken" in sys.argv:
    sys.exit("no matching distribution")
if sys.argv[1] == "venv":
    python = pathlib.Path(sys.argv[-1]) / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.touch()
if "list" in sys.argv:
    print(json.dumps([{{"name": "peer", "version": "1.0"}}]))
"""

PEER = Engine(name="peer", runner="run_peer", variants={}, packages=("peer==1.0",), removed=("spy",))


@pytest.fixture
def uv(tmp_path, monkeypatch):
    """A `uv` on PATH that writes down how it was called; returns a function that reads that."""
    log, folder = tmp_path / "uv.log", tmp_path / "bin"
    folder.mkdir()
    script = folder / "uv"
    script.write_text(FAKE_UV.format(python=sys.executable, log=str(log)))
    script.chmod(script.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def environments(tmp_path):
    return Environments(tmp_path / "env", report=lambda message: None)


def test_a_peer_is_installed_once_and_named_with_its_versions(tmp_path, uv):
    python = environments(tmp_path).python(PEER)
    assert python == tmp_path / "env" / "peer" / "bin" / "python"
    commands = [" ".join(arguments) for arguments, _ in uv()]
    assert [command.split(" --python")[0] for command in commands] == [
        "venv --clear",
        "pip install",
        "pip uninstall",
        "pip list",
    ]
    assert commands[1].endswith("peer==1.0")
    assert commands[2].endswith("spy")
    assert environments(tmp_path).python(PEER) == python
    assert len(uv()) == 4
    installed = environments(tmp_path).installed(PEER)
    assert installed is not None
    assert installed.packages == {"peer": "1.0"}


def test_another_version_is_installed_anew(tmp_path, uv):
    environments(tmp_path).python(PEER)
    environments(tmp_path).python(replace(PEER, packages=("peer==2.0",)))
    assert len(uv()) == 8


def test_an_installation_that_failed_is_not_taken_for_one(tmp_path, uv):
    with pytest.raises(BenchError, match="no matching distribution"):
        environments(tmp_path).python(replace(PEER, packages=("broken",)))
    assert environments(tmp_path).installed(replace(PEER, packages=("broken",))) is None


def test_what_is_compiled_here_is_not_taken_as_a_wheel(tmp_path, uv):
    engine = replace(PEER, from_source=("peer",), build_settings={"CMAKE_ARGS": "-DFAST=ON"}, removed=())
    environments(tmp_path).python(engine)
    arguments, settings = uv()[1]
    assert arguments[-3:] == ["--no-binary", "peer", "peer==1.0"]
    assert settings == "-DFAST=ON"


def test_without_uv_or_a_compiler_it_is_said_what_to_install(tmp_path, uv, monkeypatch):
    monkeypatch.setattr(
        "aios_serve.bench.environments.shutil.which", lambda name: "/usr/bin/uv" if name == "uv" else None
    )
    with pytest.raises(BenchError, match=r"compiled for this CPU.*--engines"):
        environments(tmp_path).python(replace(PEER, from_source=("peer",)))
    monkeypatch.setattr("aios_serve.bench.environments.shutil.which", lambda name: None)
    with pytest.raises(BenchError, match="pip install uv"):
        environments(tmp_path).python(PEER)


def test_aios_runs_in_this_environment(tmp_path):
    assert str(environments(tmp_path).python(ENGINES["aios"])) == sys.executable


def test_the_cache_is_where_the_variable_says(tmp_path, monkeypatch):
    monkeypatch.setenv("AIOS_CACHE_DIR", str(tmp_path))
    assert bench_cache() == tmp_path / "bench"


class FakeEnvironments:
    """Every peer is installed."""

    def python(self, engine):
        return f"python of {engine.name}"


@pytest.fixture
def made(monkeypatch):
    """Converters that write their arguments to the target; returns what ran."""
    ran = []

    def run(python, module, source, target, kind, *_, **__):
        ran.append((python, module, source.rpartition("/")[2], kind))
        Path(target).touch()

    monkeypatch.setattr(model_files, "run_module", run)
    return ran


def files_of(tmp_path, file_type):
    path = tmp_path / "model.gguf"
    path.touch()
    source = SourceModel(path=path, name="model", file_type=file_type, vocab_size=10, context_length=10)
    options = {"environments": FakeEnvironments(), "threads": 1, "report": lambda message: None}
    return ModelFiles(source, tmp_path / "models", **options)


def test_forms_are_made_of_each_other_and_once(tmp_path, made):
    files = files_of(tmp_path, "Q4_1")
    assert files.path("openvino/int8") == files.path("openvino/int8")
    assert made == [
        ("python of llama.cpp", "make_gguf", "model.gguf", "F16"),
        ("python of openvino", "make_openvino", "F16.gguf", "fp16"),
        ("python of openvino", "make_openvino", "fp16", "int8"),
    ]


def test_a_form_that_the_source_already_has_is_the_source(tmp_path, made):
    files = files_of(tmp_path, "Q4_1")
    assert files.path("gguf/Q4_1") == files.path("source") == tmp_path / "model.gguf"
    assert made == []


def test_the_bundled_model_is_known_in_full():
    from aios_model.weights.bundled import find_bundled_model

    source = SourceModel.read(find_bundled_model())
    assert (source.file_type, source.vocab_size, source.context_length) == ("Q4_1", 49152, 8192)


def test_models_that_no_peer_can_read_are_refused(tmp_path):
    with pytest.raises(BenchError, match="is no GGUF file"):
        SourceModel.read(tmp_path)
    with pytest.raises(BenchError, match="random:1b, random:3b"):
        find_source("random:70b", tmp_path, environments=FakeEnvironments(), threads=1, report=print)
