"""Runs other programs: quietly, with a time limit, and with their last words in the error."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from aios_serve.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

RUNNERS = Path(__file__).parent / "runners"
LAST_WORDS = 1500

# Settings of thread pools that a shell may have left behind: every runner is told its number of threads instead.
_THREADING = re.compile(r"(OMP|GOMP|KMP|MKL|OPENBLAS|TBB|VECLIB|NUMEXPR)_")
_QUIET = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "PYTHONWARNINGS": "ignore",
}


def run_command(
    command: Sequence[str | Path],
    *,
    what: str,
    timeout: float,
    stdin: str = "",
    environment: Mapping[str, str] | None = None,
) -> str:
    """Run to the end and return what it printed to stdout.

    Args:
        command: Program and arguments.
        what: What is being done, for the error.
        timeout: Seconds, after which it is killed with all of its children.
        stdin: Its input.
        environment: All of its environment variables; None for this process's.

    Raises:
        BenchError: it failed, took too long, or cannot be started; with the end of what it printed.
    """
    try:
        process = subprocess.Popen(
            [str(part) for part in command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            start_new_session=True,
        )
    except OSError as error:
        raise BenchError(f"{what}: {command[0]} cannot be started: {error}") from error
    with process:
        try:
            stdout, stderr = process.communicate(stdin, timeout=timeout)
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"{what} took longer than {timeout:.0f} s and was ended") from error
        finally:
            _end(process)
    if process.returncode:
        words = (stderr.strip() or stdout.strip())[-LAST_WORDS:]
        raise BenchError(f"{what} failed with status {process.returncode}:\n{words}")
    return stdout


def run_module(
    python: Path, module: str, *arguments: str, what: str, timeout: float, threads: int, stdin: str = ""
) -> str:
    """Run `main` of a module in `runners` with a peer's Python; arguments and errors as of `run_command`.

    Args:
        python: The interpreter.
        module: Which one.
        arguments: For its `main`.
        what: What is being done, for the error.
        timeout: Seconds.
        threads: Threads for OpenMP, where the engine does not set them itself.
        stdin: Its input.
    """
    inherited = {name: value for name, value in os.environ.items() if not _THREADING.match(name)}
    return run_command(
        [python, "-I", RUNNERS / "__main__.py", module, *arguments],
        what=what,
        timeout=timeout,
        stdin=stdin,
        environment={**inherited, **_QUIET, "OMP_NUM_THREADS": str(threads)},
    )


def _end(process: subprocess.Popen[str]) -> None:
    """Kill what is left of the process's own group: Ctrl-C in a terminal does not reach it, nor its children."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
