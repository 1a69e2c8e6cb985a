"""`aios-quant` does what its help says, and fails in one line with status 2."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from aios_quant.cli import main


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(arguments)
    captured = capsys.readouterr()
    return left.value.code, captured.out, captured.err


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["evaluate", "--help"]])
def test_help_teaches_without_importing_torch(arguments):
    code = (
        "import sys\nfrom aios_quant.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit as stop: assert not stop.code\n"
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_a_model_is_quantised_evaluated_and_drawn(tiny_checkpoint, tmp_path, capsys):
    model, out = str(tiny_checkpoint("llama3")), tmp_path / "out"
    options = ("--scheme", "int4", "--method", "gptq", "--window", "32", "--num-windows", "2", "--device", "cpu")
    status, printed, _ = run(capsys, "quantize", model, *options, "-o", str(out))
    assert status == 0
    assert "3 layers" in printed
    assert f"aios-serve {out}" in printed
    status, printed, _ = run(capsys, "quantize", model, *options, "-o", str(out))
    assert status == 0
    assert "3 of them earlier" in printed

    figures, plot = tmp_path / "figures.json", tmp_path / "plot.svg"
    measure = ("--window", "48", "--num-windows", "2", "--num-answers", "1", "--max-tokens", "4", "--kernels", "torch")
    status, printed, _ = run(
        capsys,
        *("evaluate", model, "--schemes", "int8, none", "--checkpoint", str(out), "--weight-only", *measure),
        *("--json", str(figures), "--plot", str(plot)),
    )
    assert status == 0
    names = [each["name"] for each in json.loads(figures.read_text())["evaluations"]]
    assert names == ["original", "int8-a16", "none", "out"]
    assert plot.read_text().startswith("<svg")
    assert "original" in printed


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["quantize"], "Missing option '--output'"),
        (["quantize", "-o", "out", "--scheme", "int3"], "'int3' is not one of"),
        (["quantize", "-o", "out", "--scheme", "int8", "--group-size", "64"], "--group-size is for int4"),
        (["quantize", "-o", "out", "--group-size", "48"], "--group-size = 48"),
        (["quantize", "-o", "out", "--scheme", "fp8", "--method", "awq"], "use method rtn"),
        (["quantize", "-o", "out", "--scheme", "int8", "--asymmetric"], "asymmetric grids are for int4"),
        (["evaluate", "--schemes", "int8,int3"], "knows no 'int3'"),
        (["evaluate", "--checkpoint", "./nowhere"], "no checkpoint nowhere"),
        (["evaluate", "--window", "1"], "--window"),
        (["train"], "No such command"),
    ],
    ids=str,
)
def test_mistakes_are_one_line_and_status_2(arguments, complaint, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    status, printed, complained = run(capsys, *arguments)
    assert status == 2
    assert printed == ""
    assert complaint in complained
    assert len(complained.strip().splitlines()) == 1
    assert complained.startswith("aios-quant: ")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_not_there_is_status_1(capsys, tmp_path):
    status, _, complained = run(capsys, "quantize", "./no/such/folder", "-o", str(tmp_path / "out"))
    assert status == 1
    assert "./no/such/folder" in complained


def test_calibration_text_that_is_too_short_is_refused(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("too short")
    status, _, complained = run(
        capsys,
        *("quantize", str(tiny_checkpoint("llama3")), "--method", "awq", "-o", str(tmp_path / "out")),
        *("--calibration", str(tmp_path / "text.txt"), "--window", "64"),
    )
    assert status == 2
    assert "text.txt has 9 tokens, a window needs 64" in complained


def test_without_a_command_the_help_is_shown(capsys):
    status, printed, complained = run(capsys)
    assert status == 2
    assert "Usage" in printed + complained
    assert "aios-quant:" not in complained
