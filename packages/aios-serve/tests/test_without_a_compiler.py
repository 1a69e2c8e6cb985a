"""No compiler on PATH and nothing compiled before: everything works on torch, and says why."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
from aios_serve import InferenceEngine, SamplingParams
with InferenceEngine(device="cpu", threads=1, max_model_len=128, {options}) as engine:
    output = engine.generate("The capital of France is", SamplingParams(temperature=0, max_tokens=3))[0]
    print(engine.info.quantization, engine.info.kv_dtype, engine.info.kernels)
    print(output.outputs[0].text)
"""


def run(tmp_path, options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": str(tmp_path), "CXX": "", "AIOS_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", SCRIPT.format(options=options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=240)


@pytest.mark.slow
def test_the_default_is_float32_on_torch_with_one_warning(tmp_path) -> None:
    done = run(tmp_path, "")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("none float32 no C++ compiler found")
    assert "Paris" in done.stdout
    assert done.stderr.count("native kernels cannot be used") == 1
    assert "install g++" in done.stderr


@pytest.mark.slow
def test_a_scheme_that_was_asked_for_runs_on_the_reference_kernels(tmp_path) -> None:
    done = run(tmp_path, "quantization='int8'")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("int8 float32 no C++ compiler found")
    assert "Paris" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_pages_of_fewer_bits_are_attended_by_torch(tmp_path, name) -> None:
    done = run(tmp_path, f"kv_cache_dtype={name!r}")
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith(f"none {name} no C++ compiler found")
    assert "Paris" in done.stdout
