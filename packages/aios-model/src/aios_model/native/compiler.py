"""Native kernels are compiled when they are first used, by the compiler at hand, and kept for the next time.

No torch here: kernels are plain C functions, so a source takes a second to compile, not the minute that torch's headers
cost. What is compiled, with what, and for which instruction set decides the name under which the result is kept.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from aios_model.errors import NativeBuildError
from aios_model.native.build_cache import BuildCache, default_cache, private_cache
from aios_model.native.cores import usable_cores
from aios_model.native.isa import Isa

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
_HEADERS = (".h", ".hpp", ".inc")
_SILENT_SECONDS = 0.3
_SHOWN_LINES = 20

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A C++ compiler.

    Attributes:
        command: How it is called: its path, and what `$CXX` puts around it (`ccache g++`).
        version: What it says of itself.
    """

    command: tuple[str, ...]
    version: str


def find_compiler() -> Compiler | None:
    """`$CXX`, or else the first of `c++`, `g++` and `clang++` on the path that runs; None if there is none."""
    for command in (shlex.split(os.environ.get("CXX", "")), *([name] for name in _CANDIDATES)):
        path = shutil.which(command[0]) if command else None
        version = None if path is None else _version((path, *command[1:]))
        if path is not None and version is not None:
            return Compiler(command=(path, *command[1:]), version=version)
    return None


def build_library(
    name: str,
    sources: Sequence[Path],
    include_dirs: Sequence[Path],
    isa: Isa,
    extra_flags: Sequence[str] = (),
    *,
    rebuild: bool = False,
    report: Callable[[str], None] = _logger.info,
) -> Path:
    """The shared library of `sources`: out of the cache, or compiled now, each source by a process of its own.

    Safe against other processes and threads that build the same: one compiles, the others wait for it.

    Args:
        name: What it is called, usually the package whose kernels these are.
        sources: C++ files; a change of one, or of any header in `include_dirs`, makes another library.
        include_dirs: Where their headers are.
        isa: The instruction set to compile for.
        extra_flags: More flags for the compiler.
        rebuild: Take nothing from the cache.
        report: Told when something takes longer than a moment, and how long it took.

    Raises:
        NativeBuildError: no compiler, or it refused; with its words and the command.
    """
    flags = [*COMPILE_FLAGS, *isa.compiler_flags, *extra_flags]
    recipe = f"{name}-{isa.name}-{_recipe_digest(sources, include_dirs, flags)}"
    compiler = find_compiler()
    cache = default_cache()
    if compiler is None:
        # What another compiler made of the same sources is as good, if it is still there.
        found = None if rebuild else cache.find(recipe)
        if found is None:
            raise NativeBuildError(NO_COMPILER)
        return found
    key = f"{recipe}-{_hash(*compiler.command, compiler.version)[:8]}"
    found = None if rebuild else cache.find(key)
    if found is not None:
        return found
    job = _Job(f"the native kernels of {name} for {isa.name}", compiler, tuple(sources), tuple(include_dirs), flags)
    if not cache.is_writable():
        report(f"{cache.directory} cannot be written: {job.title} last as long as this process; set AIOS_CACHE_DIR")
        cache = private_cache()
    return _build_in(cache, key, job, rebuild=rebuild, report=report)


@dataclass(frozen=True, slots=True)
class _Job:
    title: str
    compiler: Compiler
    sources: tuple[Path, ...]
    include_dirs: tuple[Path, ...]
    flags: list[str]


def _build_in(cache: BuildCache, key: str, job: _Job, *, rebuild: bool, report: Callable[[str], None]) -> Path:
    with cache.lock(key, lambda: report(f"waiting for another process that compiles {job.title}")):
        if rebuild:
            cache.discard(key)
        found = cache.find(key)  # made by another process meanwhile
        if found is not None:
            return found
        _raise_again(str(cache.directory), key)
        with cache.workspace() as folder:
            try:
                path = cache.store(_compile(job, folder, report), key)
            except NativeBuildError as error:
                _refused[str(cache.directory), key] = error
                raise
        cache.prune()
        return path


# What a compiler refused once it refuses again: the same error at once, not seconds later for every layer of a model.
_refused: dict[tuple[str, str], NativeBuildError] = {}


def _raise_again(directory: str, key: str) -> None:
    if (directory, key) in _refused:
        raise NativeBuildError(str(_refused[directory, key]))


def _compile(job: _Job, folder: Path, report: Callable[[str], None]) -> Path:
    """Compile the sources side by side, link them; the library's path in `folder`."""
    started = time.perf_counter()
    includes = [f"-I{directory}" for directory in job.include_dirs]
    objects = [folder / f"{index}-{source.stem}.o" for index, source in enumerate(job.sources)]
    commands = [
        [*job.compiler.command, *job.flags, *includes, "-c", str(source), "-o", str(target)]
        for source, target in zip(job.sources, objects, strict=True)
    ]
    workers = ThreadPoolExecutor(max_workers=max(1, min(len(commands), usable_cores())))
    try:
        futures = [workers.submit(_run, command, job) for command in commands]
        waiting = wait(futures, timeout=_SILENT_SECONDS).not_done
        if waiting:
            report(f"compiling {job.title} (once; a few seconds)")
        for future in futures:
            future.result()
    finally:
        workers.shutdown(cancel_futures=True)
    library = folder / "library.so"
    _run([*job.compiler.command, *LINK_FLAGS, *map(str, objects), "-o", str(library)], job)
    if waiting:
        report(f"compiled {job.title} in {time.perf_counter() - started:.1f} s")
    return library


def _run(command: list[str], job: _Job) -> None:
    shown = shlex.join(command)
    try:
        result = subprocess.run(
            command, capture_output=True, text=True, errors="replace", check=False, env={**os.environ, "LC_ALL": "C"}
        )
    except OSError as error:
        raise NativeBuildError(f"could not run the compiler for {job.title}: {error}\n  command: {shown}") from error
    if result.returncode != 0:
        words = (result.stderr or result.stdout).strip().splitlines() or ["(it said nothing)"]
        more = [f"... and {len(words) - _SHOWN_LINES} lines more"] if len(words) > _SHOWN_LINES else []
        raise NativeBuildError(
            f"could not compile {job.title}: exit status {result.returncode} of {job.compiler.version}\n"
            + "".join(f"  {line}\n" for line in [*words[:_SHOWN_LINES], *more])
            + f"  command: {shown}"
        )


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


def _recipe_digest(sources: Sequence[Path], include_dirs: Sequence[Path], flags: Sequence[str]) -> str:
    """Of everything that decides the result but the compiler."""
    headers = [
        (str(path.relative_to(folder)), path)
        for folder in include_dirs
        for path in sorted(folder.rglob("*"))
        if path.suffix in _HEADERS
    ]
    named = [*((source.name, source) for source in sources), *headers]
    contents = [text for name, path in named for text in (name, hashlib.sha256(path.read_bytes()).hexdigest())]
    return _hash(platform.system(), platform.machine(), *flags, *contents)[:16]


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
