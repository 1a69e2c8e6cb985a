"""Fixtures of the layer's tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable

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
