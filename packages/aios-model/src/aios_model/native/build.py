"""Native kernels are compiled when they are first used, by the compiler at hand, and kept for the next time.

No torch here: kernels are plain C functions, so a source takes a second to compile, not the minute that torch's headers
cost. What is compiled, with what, and for which instruction set decides the name under which the result is kept.
"""

from __future__ import annotations

import functools
import hashlib
import logging
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from aios_model.errors import NativeBuildError
from aios_model.native.build_cache import BuildCache, default_cache, private_cache
from aios_model.native.compiler import COMPILE_FLAGS, LINK_FLAGS, NO_COMPILER, Compiler, find_compiler
from aios_model.native.cores import usable_cores
from aios_model.native.isa import Isa

Report = Callable[[str], None]

_HEADERS = (".h", ".hpp", ".inc")
_SILENT_SECONDS = 0.3

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class LibrarySource:
    """What a shared library is made from.

    Attributes:
        name: What it is called, usually the package whose kernels these are.
        sources: C++ files; a change of one, or of any header in `include_dirs`, makes another library.
        include_dirs: Where their headers are.
        extra_flags: More flags for the compiler.
    """

    name: str
    sources: Sequence[Path]
    include_dirs: Sequence[Path]
    extra_flags: Sequence[str] = ()

    def digest(self, flags: Sequence[str]) -> str:
        """Of everything that decides the result but the compiler."""
        headers = [
            (str(path.relative_to(folder)), path)
            for folder in self.include_dirs
            for path in sorted(folder.rglob("*"))
            if path.suffix in _HEADERS
        ]
        named = [*((source.name, source) for source in self.sources), *headers]
        contents = [text for name, path in named for text in (name, hashlib.sha256(path.read_bytes()).hexdigest())]
        return _hash(platform.system(), platform.machine(), *flags, *contents)[:16]


def build_library(source: LibrarySource, isa: Isa, *, rebuild: bool = False, report: Report = _logger.info) -> Path:
    """The shared library of `source`: out of the cache, or compiled now.

    Args:
        source: What it is made from.
        isa: The instruction set to compile for.
        rebuild: Take nothing from the cache.
        report: Told when something takes longer than a moment, and how long it took.

    Raises:
        NativeBuildError: no compiler, or it refused; with its words and the command.
    """
    return build_libraries([source], isa, rebuild=rebuild, report=report)[0]


def build_libraries(
    libraries: Sequence[LibrarySource], isa: Isa, *, rebuild: bool = False, report: Report = _logger.info
) -> list[Path]:
    """Like `build_library` for several at once: their sources are compiled side by side, one to a core.

    Safe against other processes and threads that build the same: one compiles, the others wait for it.

    Raises:
        NativeBuildError: no compiler, or it refused one of them; those that it took are kept.
    """
    compiler, cache = find_compiler(), default_cache()
    builds = [_Build(library, isa, compiler) for library in libraries]
    found = {} if rebuild else _find(cache, builds)
    missing = [build for build in builds if build.key not in found]
    if missing and compiler is None:
        raise NativeBuildError(NO_COMPILER)
    if missing and not cache.is_writable():
        title = _title(missing)
        report(f"{cache.directory} cannot be written: {title} last as long as this process; set AIOS_CACHE_DIR")
        cache = private_cache()
    if missing:
        found |= _build_in(cache, missing, rebuild=rebuild, report=report)
    return [found[build.key] for build in builds]


class _Build:
    """One library, for one instruction set, by one compiler."""

    def __init__(self, library: LibrarySource, isa: Isa, compiler: Compiler | None) -> None:
        self.library = library
        self.isa = isa
        self.flags = [*COMPILE_FLAGS, *isa.compiler_flags, *library.extra_flags]
        recipe = f"{library.name}-{isa.name}-{library.digest(self.flags)}"
        # Without a compiler, what any has made of the same sources is as good.
        self.key = recipe if compiler is None else f"{recipe}-{_hash(*compiler.command, compiler.version)[:8]}"
        self._compiler = compiler

    def compile(self, source: Path, target: Path) -> None:
        """Make an object file of one source."""
        includes = [f"-I{directory}" for directory in self.library.include_dirs]
        self._run([*self.flags, *includes, "-c", str(source), "-o", str(target)])

    def link(self, objects: Sequence[Path], target: Path) -> None:
        """Make the library of its objects."""
        self._run([*LINK_FLAGS, *map(str, objects), "-o", str(target)])

    def _run(self, arguments: list[str]) -> None:
        assert self._compiler is not None, self.key
        self._compiler.run(arguments, title=_title([self]))


def _title(builds: Sequence[_Build]) -> str:
    names = ", ".join(build.library.name for build in builds)
    return f"the native kernels of {names} for {builds[0].isa.name}"


def _find(cache: BuildCache, builds: Sequence[_Build]) -> dict[str, Path]:
    """What the cache has of them, by key."""
    paths = {build.key: cache.find(build.key) for build in builds}
    return {key: path for key, path in paths.items() if path is not None}


def _build_in(cache: BuildCache, builds: Sequence[_Build], *, rebuild: bool, report: Report) -> dict[str, Path]:
    with ExitStack() as locks:
        for build in sorted(builds, key=lambda build: build.key):  # in one order, or two processes wait for each other
            words = f"waiting for another process that compiles {_title([build])}"
            locks.enter_context(cache.lock(build.key, functools.partial(report, words)))
            if rebuild:
                cache.discard(build.key)
        found = _find(cache, builds)  # made by another process meanwhile
        missing = [build for build in builds if build.key not in found]
        for build in missing:
            _raise_again(str(cache.directory), build.key)
        if missing:
            with cache.workspace() as folder:
                found |= _compile(missing, folder, cache, report)
            cache.prune()
        return found


# What a compiler refused once it refuses again: the same error at once, not seconds later for every layer of a model.
_refused: dict[tuple[str, str], NativeBuildError] = {}


def _raise_again(directory: str, key: str) -> None:
    if (directory, key) in _refused:
        raise NativeBuildError(str(_refused[directory, key]))


def _compile(builds: Sequence[_Build], folder: Path, cache: BuildCache, report: Report) -> dict[str, Path]:
    """Compile all sources of all libraries side by side, link each library, and store it."""
    started = time.perf_counter()
    workers = ThreadPoolExecutor(max_workers=usable_cores())
    stored: dict[str, Path] = {}
    errors: list[NativeBuildError] = []
    try:
        jobs = [_Job(build, folder, workers) for build in builds]
        waiting = wait([future for job in jobs for future in job.futures], timeout=_SILENT_SECONDS).not_done
        if waiting:
            report(f"compiling {_title(builds)} (once; some seconds)")
        for job in jobs:
            try:
                stored[job.build.key] = cache.store(job.finish(), job.build.key)
            except NativeBuildError as error:
                _refused[str(cache.directory), job.build.key] = error
                errors.append(error)
    finally:
        workers.shutdown(cancel_futures=True)
    if errors:
        raise errors[0]
    if waiting:
        report(f"compiled {_title(builds)} in {time.perf_counter() - started:.1f} s")
    return stored


class _Job:
    """A library whose sources are being compiled into a folder."""

    def __init__(self, build: _Build, folder: Path, workers: ThreadPoolExecutor) -> None:
        self.build = build
        self._folder = Path(tempfile.mkdtemp(dir=folder))
        self._objects = [self._folder / f"{i}-{source.stem}.o" for i, source in enumerate(build.library.sources)]
        self.futures = [
            workers.submit(build.compile, source, target)
            for source, target in zip(build.library.sources, self._objects, strict=True)
        ]

    def finish(self) -> Path:
        """Wait for the objects and link them; the library's path."""
        try:
            for future in self.futures:
                future.result()
        finally:
            for future in self.futures:
                future.cancel()
        library = self._folder / "library.so"
        self.build.link(self._objects, library)
        return library


def _hash(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
