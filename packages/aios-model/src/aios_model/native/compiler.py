"""The C++ compiler at hand, and the flags that kernels are compiled and linked with. No torch here."""

from __future__ import annotations

import functools
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

from aios_model.errors import NativeBuildError

COMPILE_FLAGS = (
    "-O3",
    "-std=c++20",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    # A reduction has one order and one rounding: nothing may be reassociated or fused behind the source's back.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",
)
LINK_FLAGS = ("-shared", "-pthread")  # no OpenMP: a second runtime beside torch's would spin against it
NO_COMPILER = (
    "no C++ compiler found (looked for $CXX, c++, g++, clang++ on PATH); "
    "install g++ 12 or newer, for example with: apt install g++"
)

_CANDIDATES = ("c++", "g++", "clang++")
_SHOWN_LINES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: How it is called: its path, and what `$CXX` puts around it (`ccache g++`).
        version: What it says of itself.
    """

    command: tuple[str, ...]
    version: str

    def run(self, arguments: Sequence[str], *, title: str) -> None:
        """Compile or link, as `arguments` say; `title` is what an error calls it.

        Raises:
            NativeBuildError: it cannot be run, or it refused; with its words and the command.
        """
        command = [*self.command, *arguments]
        shown = shlex.join(command)
        environment = {**os.environ, "LC_ALL": "C"}
        try:
            result = subprocess.run(
                command, capture_output=True, text=True, errors="replace", check=False, env=environment
            )
        except OSError as error:
            raise NativeBuildError(f"could not run the compiler for {title}: {error}\n  command: {shown}") from error
        if result.returncode != 0:
            words = (result.stderr or result.stdout).strip().splitlines() or ["(it said nothing)"]
            more = [f"... and {len(words) - _SHOWN_LINES} lines more"] if len(words) > _SHOWN_LINES else []
            raise NativeBuildError(
                f"could not compile {title}: exit status {result.returncode} of {self.version}\n"
                + "".join(f"  {line}\n" for line in [*words[:_SHOWN_LINES], *more])
                + f"  command: {shown}"
            )


def find_compiler() -> Compiler | None:
    """`$CXX`, or else the first of `c++`, `g++` and `clang++` on the path that runs; None if there is none."""
    for command in (shlex.split(os.environ.get("CXX", "")), *([name] for name in _CANDIDATES)):
        path = shutil.which(command[0]) if command else None
        version = None if path is None else _version((path, *command[1:]))
        if path is not None and version is not None:
            return Compiler(command=(path, *command[1:]), version=version)
    return None


@functools.cache
def _version(command: tuple[str, ...]) -> str | None:
    """First line of what the compiler says to `--version`; None if it does not run."""
    try:
        result = subprocess.run(
            [*command, "--version"], capture_output=True, text=True, errors="replace", timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = result.stdout.splitlines()
    return lines[0] if result.returncode == 0 and lines else None
