"""Paged attention in C++: pages in the native layout, read where they lie.

`NativePagedKVCache`   the pages, a drop-in for `PagedKVCache` on a CPU
`kvcache_library`      the compiled kernels
`reference`            the same layout and rounding in plain torch, for tests and for readers
`csrc/`                the kernels: begin with `paged_attention.h`
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_kvcache.native.kernels import AttentionBatch, KvPool, kvcache_library
    from aios_kvcache.native.native_cache import NativePagedKVCache

__all__ = ["AttentionBatch", "KvPool", "NativePagedKVCache", "kvcache_library"]

_HOMES = {
    "AttentionBatch": "kernels",
    "KvPool": "kernels",
    "NativePagedKVCache": "native_cache",
    "kvcache_library": "kernels",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
