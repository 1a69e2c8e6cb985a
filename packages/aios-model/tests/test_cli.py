"""The commands do what their help says, and fail in one line."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from aios_model.cli import app
from aios_model.errors import ModelNotFoundError


def run(*arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "aios_model.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout)


@pytest.mark.slow
def test_generate_streams_an_answer_and_ends_with_figures():
    done = run("generate", "The capital of France is", "--temperature", "0", "-n", "8", "--stats")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(" Paris.")
    for word in ("tok/s", "first token", "MB", "GB/s read bandwidth"):
        assert word in done.stderr


@pytest.mark.slow
def test_chat_applies_the_template_and_seeds_repeat():
    arguments = ("generate", "--chat", "Say hi.", "-n", "8", "--seed", "3", "--temperature", "0.8")
    first, second = run(*arguments), run(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.strip()


def test_inspect_prints_parts_costs_and_rooflines():
    result = CliRunner().invoke(app, ["inspect", "--hardware", "h100", "--memory", "1"])
    assert result.exit_code == 0, result.output
    for text in ("134,515,008", "tied", "0.41 GFLOP", "h100", "tok/s at most", "22.5 KiB per token"):
        assert text in result.output


def test_an_unknown_model_is_one_line_with_a_remedy():
    done = run("generate", "hi", "--model", "./no/such/folder")
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert "./no/such/folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_unknown_hardware_is_refused():
    done = run("inspect", "--hardware", "abacus")
    assert done.returncode == 1
    assert "'abacus' is unknown" in done.stderr


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["inspect", "--help"]])
def test_help_teaches_without_importing_torch(arguments):
    code = (
        "import sys\nfrom aios_model.cli import app\n"
        f"try: app({arguments!r})\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "Usage" in done.stdout


def test_model_errors_are_aios_errors():
    result = CliRunner().invoke(app, ["inspect", "./no/such/folder"])
    assert isinstance(result.exception, ModelNotFoundError)
