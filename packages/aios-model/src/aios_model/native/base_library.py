"""The library of this layer's own kernels. It carries the thread pool for the layers above, too. No torch here."""

from __future__ import annotations

from aios_model.native.library import LayerKernels, NativeLibrary, load_library

MODEL_KERNELS = LayerKernels("aios_model")


def model_library() -> NativeLibrary:
    """Everything in `aios_model/native/csrc`, compiled for `choose_isa()`; opened once.

    Raises:
        NativeBuildError: it cannot be compiled or loaded; ask `native_status` first.
        ConfigError: `AIOS_ISA` asks for what this CPU lacks.
    """
    return load_library(MODEL_KERNELS)
