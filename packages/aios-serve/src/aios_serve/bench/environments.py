"""Environments of the peers: one each, outside of the repository, installed by uv when first needed."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aios_serve.bench.commands import run_command
from aios_serve.bench.errors import BenchError

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_serve.bench.engines import Engine

INSTALL_TIMEOUT = 3600.0
_MARKER = "aios-bench.json"
_COMPILERS = ("c++", "g++", "clang++")


def bench_cache() -> Path:
    """Where environments and converted models are kept: `$AIOS_CACHE_DIR/bench`, or `~/.cache/aios/bench`."""
    named = os.environ.get("AIOS_CACHE_DIR")
    if named:
        return Path(named).expanduser().absolute() / "bench"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "aios" / "bench"


@dataclass(frozen=True, slots=True, kw_only=True)
class Installed:
    """An environment that is ready.

    Attributes:
        recipe: What it was installed from; another recipe means installing again.
        packages: Name to version of what is in it.
        seconds: How long installing took.
    """

    recipe: str
    packages: dict[str, str]
    seconds: float


class Environments:
    """The environments below a folder.

    Args:
        folder: Where they are kept.
        report: Told what is being done.
    """

    def __init__(self, folder: Path, *, report: Callable[[str], None]) -> None:
        self._folder = folder
        self._report = report

    def python(self, engine: Engine) -> Path:
        """The interpreter that runs an engine, installed first if need be; this one for AIOS.

        Raises:
            BenchError: uv or a compiler is missing, or the installation failed.
        """
        if not engine.packages:
            return Path(sys.executable)
        if self.installed(engine) is None:
            self._install(engine)
        return self._python(engine)

    def installed(self, engine: Engine) -> Installed | None:
        """What is installed for an engine, if it is what its recipe says now."""
        try:
            found = Installed(**json.loads((self._folder / engine.name / _MARKER).read_text()))
        except (OSError, ValueError, TypeError):
            return None
        return found if found.recipe == _recipe(engine) else None

    def _python(self, engine: Engine) -> Path:
        return self._folder / engine.name / ("Scripts" if os.name == "nt" else "bin") / "python"

    def _install(self, engine: Engine) -> None:
        uv = _find_uv()
        if engine.from_source and not any(map(shutil.which, _COMPILERS)):
            raise BenchError(
                f"{engine.name} is compiled for this CPU, and there is no C++ compiler ({', '.join(_COMPILERS)}) on "
                "PATH; install one, or leave the engine out of --engines"
            )
        slow = ", which takes several minutes" if engine.from_source else ""
        self._report(f"installing {engine.name}{slow}")
        start = time.perf_counter()
        target = self._folder / engine.name
        target.parent.mkdir(parents=True, exist_ok=True)
        self._uv(uv, "venv", "--clear", "--python", sys.executable, str(target), engine=engine)
        python = str(self._python(engine))
        source = [part for name in engine.from_source for part in ("--no-binary", name)]
        self._uv(uv, "pip", "install", "--python", python, *source, *engine.packages, engine=engine)
        if engine.removed:
            self._uv(uv, "pip", "uninstall", "--python", python, *engine.removed, engine=engine)
        listing = self._uv(uv, "pip", "list", "--python", python, "--format", "json", engine=engine)
        packages = {each["name"]: each["version"] for each in json.loads(listing)}
        seconds = round(time.perf_counter() - start, 1)
        installed = Installed(recipe=_recipe(engine), packages=packages, seconds=seconds)
        (target / _MARKER).write_text(json.dumps(asdict(installed), indent=2) + "\n")
        self._report(f"installed {engine.name} in {seconds:.0f} s")

    def _uv(self, uv: str, *arguments: str, engine: Engine) -> str:
        return run_command(
            [uv, *arguments],
            what=f"installing {engine.name} (uv {arguments[0]})",
            timeout=INSTALL_TIMEOUT,
            environment={**os.environ, **engine.build_settings},
        )


def _find_uv() -> str:
    uv = shutil.which("uv")
    if uv is None:
        raise BenchError("peers are installed by uv, which is not on PATH; install it with: pip install uv")
    return uv


def _recipe(engine: Engine) -> str:
    settings = (f"{name}={value}" for name, value in engine.build_settings.items())
    return " ".join((*engine.packages, *(f"-{name}" for name in engine.removed), *engine.from_source, *settings))
