"""The compiled kernels of this layer and their C structures, as ctypes sees them. No torch here.

The structures are those of `csrc/kv_pool.h`, field by field.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from aios_kvcache.layout import KvDtype
from aios_model.native.isa import Isa
from aios_model.native.library import LayerKernels, NativeLibrary, load_library

KVCACHE_KERNELS = LayerKernels("aios_kvcache", below=("aios_model",))
KV_TYPES: dict[KvDtype, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "fp8": 3}


class KvPool(ctypes.Structure):
    """One layer's pages: addresses, and the sizes that the layout depends on."""

    _fields_ = [
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("key_scales", ctypes.c_void_p),
        ("value_scales", ctypes.c_void_p),
        ("type", ctypes.c_int32),
        ("num_kv_heads", ctypes.c_int32),
        ("head_dim", ctypes.c_int32),
        ("block_size", ctypes.c_int32),
    ]


SEQUENCE_FORMAT = "iiiiQ"
"""One `Sequence` for `struct`: start, length, first_row, num_blocks, and the address of its block table (int32)."""


class AttentionBatch(ctypes.Structure):
    """One step's sequences."""

    _fields_ = [
        ("sequences", ctypes.c_void_p),
        ("num_sequences", ctypes.c_int32),
        ("num_rows", ctypes.c_int32),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionKernels:
    """The C functions; see `csrc/kvcache.cpp` for what they take.

    Attributes:
        store_kv: Writes a batch's keys and values into their pages.
        attend: Attends from a batch's queries over what is stored.
        attention_scratch_bytes: Memory that `attend` needs for itself.
    """

    store_kv: Callable[..., None]
    attend: Callable[..., None]
    attention_scratch_bytes: Callable[..., int]


def kvcache_library(isa: Isa | None = None) -> NativeLibrary:
    """Everything in `aios_kvcache/native/csrc`, compiled for this CPU; opened once.

    Args:
        isa: The instruction set; None for `choose_isa()`.

    Raises:
        NativeBuildError: It cannot be compiled or loaded; ask `native_status(kvcache_library)` first.
        ConfigError: `AIOS_ISA` asks for what this CPU lacks.
    """
    return load_library(KVCACHE_KERNELS, isa)


def attention_kernels(library: NativeLibrary) -> AttentionKernels:
    """Declares the library's functions."""
    address, stride, count, scale = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32, ctypes.c_float
    batch, pool = ctypes.POINTER(AttentionBatch), ctypes.POINTER(KvPool)
    attend: tuple[Any, ...] = (address, batch, pool, address, stride, count, scale, count, address, stride, address)
    return AttentionKernels(
        store_kv=library.declare("aios_store_kv", None, address, batch, pool, address, address, stride),
        attend=library.declare("aios_attend", None, *attend),
        attention_scratch_bytes=library.declare("aios_attention_scratch_bytes", stride, batch, pool, count, count),
    )
