"""Calling C from Python: one shared library per layer, opened once, called with the interpreter lock released.

No torch at import. A layer keeps its kernels as C++ files in `<package>/native/csrc`; `load_library` opens them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_model.errors import NativeBuildError
from aios_model.native.compiler import build_library
from aios_model.native.isa import Isa, choose_isa

if TYPE_CHECKING:
    from torch import Tensor


def load_library(package: str, *, below: Sequence[str] = (), extra_flags: Sequence[str] = ()) -> NativeLibrary:
    """The library of all C++ files in a package's `native/csrc`, compiled if need be, opened once per process.

    Args:
        package: Top-level package, such as `aios_quant`; it is looked up, not imported.
        below: Packages whose headers its sources include.
        extra_flags: More flags for the compiler.

    Raises:
        NativeBuildError: no compiler, or it refused, or the result cannot be loaded.
        ConfigError: `AIOS_ISA` asks for what this CPU lacks.
    """
    return NativeLibrary.open(
        name=package,
        sources=_sources(package),
        include_dirs=[source_folder(package), *map(source_folder, below)],
        extra_flags=extra_flags,
    )


@functools.cache
def _sources(package: str) -> tuple[Path, ...]:
    return tuple(sorted(source_folder(package).glob("*.cpp")))


@functools.cache
def source_folder(package: str) -> Path:
    """Where a top-level package keeps the C++ of its kernels. The package is not imported."""
    spec = find_spec(package)
    assert spec is not None, package
    assert spec.origin is not None, package
    return Path(spec.origin).parent / "native" / "csrc"


class NativeLibrary:
    """A loaded shared library. Its functions are callable once their signatures are declared.

    Attributes:
        name: What it was opened as.
        isa: The instruction set it was compiled for.
        path: The file it was loaded from.
    """

    def __init__(self, path: Path, *, name: str, isa: Isa) -> None:
        self.name = name
        self.isa = isa
        self.path = path
        self._library = ctypes.CDLL(str(path))

    @classmethod
    def open(
        cls,
        *,
        name: str,
        sources: Sequence[Path],
        include_dirs: Sequence[Path],
        isa: Isa | None = None,
        extra_flags: Sequence[str] = (),
    ) -> NativeLibrary:
        """Build if need be and load, once per process and instruction set; arguments as of `build_library`.

        Args:
            name: What it is called.
            sources: C++ files.
            include_dirs: Where their headers are.
            isa: The instruction set; None for `choose_isa()`.
            extra_flags: More flags for the compiler.

        Raises:
            NativeBuildError: no compiler, or it refused, or the result cannot be loaded.
            ConfigError: `AIOS_ISA` asks for what this CPU lacks.
        """
        isa = isa or choose_isa()
        key = (name, isa.name, *map(str, sources), *map(str, include_dirs), *extra_flags)
        with _lock:
            if key not in _opened:

                def build(*, rebuild: bool) -> Path:
                    return build_library(name, sources, include_dirs, isa, extra_flags, rebuild=rebuild)

                _opened[key] = cls._load(build, name=name, isa=isa)
            return _opened[key]

    @classmethod
    def _load(cls, build: Callable[..., Path], *, name: str, isa: Isa) -> NativeLibrary:
        """Load what `build` returns; what does not load (another C library, say) is built once more."""
        try:
            return cls(build(rebuild=False), name=name, isa=isa)
        except OSError:
            path = build(rebuild=True)
        try:
            return cls(path, name=name, isa=isa)
        except OSError as error:
            raise NativeBuildError(
                f"the native kernels of {name} were compiled, but cannot be loaded: {error}; if libraries may not be "
                f"loaded from {path.parent}, set AIOS_CACHE_DIR to a folder from which they may"
            ) from error

    def declare(self, name: str, restype: Any, *argtypes: Any) -> Callable[..., Any]:
        """Give the C function `name` its signature in ctypes' types, and return it.

        Raises:
            AttributeError: the library exports no such function.
        """
        function = getattr(self._library, name)
        function.restype = restype
        function.argtypes = argtypes
        return function


_lock = threading.Lock()
_opened: dict[tuple[str, ...], NativeLibrary] = {}


def _renew_lock() -> None:
    global _lock
    _lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)  # a thread that the child does not have may have held it


def pointer(tensor: Tensor) -> int:
    """Address of a tensor's first element, for an argument declared as `ctypes.c_void_p`.

    The caller keeps the tensor alive until the call returns.

    Raises:
        ValueError: the tensor is not in the host's memory, or not contiguous.
    """
    if tensor.device.type != "cpu":
        raise ValueError(f"native kernels read the host's memory, and this tensor is on {tensor.device}")
    if not tensor.is_contiguous():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} has strides {tensor.stride()}: make it contiguous")
    return tensor.data_ptr()
