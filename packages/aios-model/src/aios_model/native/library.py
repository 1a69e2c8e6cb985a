"""Calling C from Python: one shared library per layer, opened once, called with the interpreter lock released.

No torch at import. A layer keeps its kernels as C++ files in `<package>/native/csrc`; `load_library` opens them.
"""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aios_model.errors import NativeBuildError
from aios_model.native.build import LibrarySource, build_libraries, build_library
from aios_model.native.isa import Isa, choose_isa

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerKernels:
    """The C++ of one layer.

    Attributes:
        package: Top-level package, such as `aios_quant`; it is looked up, not imported.
        below: Packages whose headers its sources include.
    """

    package: str
    below: Sequence[str] = ()

    @property
    def source(self) -> LibrarySource:
        """All C++ files in the package's `native/csrc`."""
        return LibrarySource(
            name=self.package,
            sources=_sources(self.package),
            include_dirs=[source_folder(package) for package in (self.package, *self.below)],
        )


def build_layers(*layers: LayerKernels) -> None:
    """Compile what is missing of several layers side by side, so that opening them one by one takes no time.

    Raises:
        NativeBuildError: no compiler, or it refused.
        ConfigError: `AIOS_ISA` asks for what this CPU lacks.
    """
    build_libraries([layer.source for layer in layers], choose_isa())


def load_library(layer: LayerKernels, isa: Isa | None = None) -> NativeLibrary:
    """The library of a layer's C++ files, compiled if need be, opened once per process.

    Args:
        layer: Whose.
        isa: The instruction set; None for `choose_isa()`.

    Raises:
        NativeBuildError: no compiler, or it refused, or the result cannot be loaded.
        ConfigError: `AIOS_ISA` asks for what this CPU lacks.
    """
    source = layer.source
    return NativeLibrary.open(name=source.name, sources=source.sources, include_dirs=source.include_dirs, isa=isa)


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
        """Build if need be and load, once per process and instruction set; arguments as of `LibrarySource`.

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
                source = LibrarySource(name=name, sources=sources, include_dirs=include_dirs, extra_flags=extra_flags)
                _opened[key] = cls._load(source, isa)
            return _opened[key]

    @classmethod
    def _load(cls, source: LibrarySource, isa: Isa) -> NativeLibrary:
        """Load what `source` makes; what does not load (another C library, say) is built once more."""
        try:
            return cls(build_library(source, isa), name=source.name, isa=isa)
        except OSError:
            path = build_library(source, isa, rebuild=True)
        try:
            return cls(path, name=source.name, isa=isa)
        except OSError as error:
            raise NativeBuildError(
                f"the native kernels of {source.name} were compiled, but cannot be loaded: {error}; if libraries may "
                f"not be loaded from {path.parent}, set AIOS_CACHE_DIR to a folder from which they may"
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
