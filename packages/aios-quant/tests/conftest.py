"""Fixtures of the layer's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def run_with_isa() -> Callable[..., None]:
    """Runs tests of a file again in a process whose kernels are compiled for the instruction set `isa`."""

    def run(isa: str, path: str, *arguments: str) -> None:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", path, *arguments]
        environment = {**os.environ, "AIOS_ISA": isa}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
        assert " passed" in done.stdout, done.stdout[-500:]

    return run


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Makes the checkpoint of a case of `checkpoints.CASES` once, with a tokenizer of single characters."""
    import checkpoints  # transformers takes seconds to import
    from tokenizers import Tokenizer, models, pre_tokenizers

    made: dict[str, Path] = {}

    def make(case: str) -> Path:
        if case not in made:
            made[case] = folder = tmp_path_factory.mktemp(case.replace(".", "-"))
            checkpoints.save_safetensors(checkpoints.random_model(case, seed=len(made)), folder, sharded=False)
            tokenizer = Tokenizer(models.WordLevel({chr(32 + i): i for i in range(95)}, unk_token="!"))
            tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
            tokenizer.save(str(folder / "tokenizer.json"))
        return made[case]

    return make
