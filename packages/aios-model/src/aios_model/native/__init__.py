"""Native CPU kernels: choosing an instruction set, compiling, calling, and the one thread pool.

C++ is compiled on first use by the compiler at hand and kept; without a compiler everything runs on torch, and
`native_status` says why. The kernels of this layer lie in `csrc`; layers above open their own with `load_library`.
Nothing here imports torch before it is given a tensor.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_model.native.base_library import model_library
    from aios_model.native.build import LibrarySource, build_libraries, build_library
    from aios_model.native.compiler import find_compiler
    from aios_model.native.cores import numa_cores, parse_cpu_list, resolve_cpu_bind, usable_cores, usable_cpus
    from aios_model.native.isa import Isa, available_isas, choose_isa
    from aios_model.native.library import (
        LayerKernels,
        NativeLibrary,
        build_layers,
        load_library,
        pointer,
        source_folder,
    )
    from aios_model.native.status import NativeStatus, native_status
    from aios_model.native.threads import ThreadPool, current_pool, default_num_threads, get_pool

__all__ = [
    "Isa",
    "LayerKernels",
    "LibrarySource",
    "NativeLibrary",
    "NativeStatus",
    "ThreadPool",
    "available_isas",
    "build_layers",
    "build_libraries",
    "build_library",
    "choose_isa",
    "current_pool",
    "default_num_threads",
    "find_compiler",
    "get_pool",
    "load_library",
    "model_library",
    "native_status",
    "numa_cores",
    "parse_cpu_list",
    "pointer",
    "resolve_cpu_bind",
    "source_folder",
    "usable_cores",
    "usable_cpus",
]

_HOMES = {
    "Isa": "isa",
    "LayerKernels": "library",
    "LibrarySource": "build",
    "NativeLibrary": "library",
    "NativeStatus": "status",
    "ThreadPool": "threads",
    "available_isas": "isa",
    "build_layers": "library",
    "build_libraries": "build",
    "build_library": "build",
    "choose_isa": "isa",
    "current_pool": "threads",
    "default_num_threads": "threads",
    "find_compiler": "compiler",
    "get_pool": "threads",
    "load_library": "library",
    "model_library": "base_library",
    "native_status": "status",
    "numa_cores": "cores",
    "parse_cpu_list": "cores",
    "pointer": "library",
    "resolve_cpu_bind": "cores",
    "source_folder": "library",
    "usable_cores": "cores",
    "usable_cpus": "cores",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
