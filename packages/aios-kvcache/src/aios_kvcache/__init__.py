"""Where do keys and values live? Pages, block tables, the prefix cache, and attention that reads pages.

Bookkeeping (no torch):
    `BlockManager`      which page holds which token of which sequence
    `BlockCopy`         a page to copy before the step: copy-on-write
    `PrefixCacheStats`  what prefix caching saved
    `PoolPlan`, `plan_pool`, `available_memory`, `device_budget`, `native_kv_bytes_per_token`
                        how many pages there is room for
    `PageTiers`, `TierCosts`, `TransferSeconds`, `Swap`, `TierPlan`, `plan_tiers`
                        host memory and disk below the pool: what is kept there, and what is worth moving
    `PageRecorder`, `PageTrace`, `PageStates`, `PageWatcher`, `draw_page_map`
                        watching it: what happened to which page, in memory, in a file, as a picture
Numbers (torch):
    `PagedKVCache`      the pages, filling the socket `aios_model.KVCache`
    `PageMover`         moves pages between pool, host memory and disk
    `SequenceSlice`     one sequence's share of a step
    `aios_kvcache.native`   the same in C++: `NativePagedKVCache`
Errors:
    `SequenceError`, `UnknownSequenceError`, `DuplicateSequenceError`, `PoolTooSmallError`, `PageTraceError`,
    `PageHistoryError`
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_kvcache.attention_plan import SequenceSlice
    from aios_kvcache.block import BlockCopy
    from aios_kvcache.block_manager import BlockManager
    from aios_kvcache.errors import DuplicateSequenceError, PoolTooSmallError, SequenceError, UnknownSequenceError
    from aios_kvcache.page_events import PageWatcher
    from aios_kvcache.page_map import draw_page_map
    from aios_kvcache.page_mover import PageMover
    from aios_kvcache.page_recorder import PageRecorder, PageSnapshot
    from aios_kvcache.page_states import PageHistoryError, PageStates
    from aios_kvcache.page_trace import PageTrace, PageTraceError
    from aios_kvcache.paged_cache import PagedKVCache
    from aios_kvcache.prefix_cache import PrefixCacheStats
    from aios_kvcache.sizing import PoolPlan, available_memory, device_budget, native_kv_bytes_per_token, plan_pool
    from aios_kvcache.swap import Swap
    from aios_kvcache.tier_costs import TierCosts, TransferSeconds
    from aios_kvcache.tier_sizing import TierPlan, plan_tiers
    from aios_kvcache.tiers import PageTiers

__all__ = [
    "BlockCopy",
    "BlockManager",
    "DuplicateSequenceError",
    "PageHistoryError",
    "PageMover",
    "PageRecorder",
    "PageSnapshot",
    "PageStates",
    "PageTiers",
    "PageTrace",
    "PageTraceError",
    "PageWatcher",
    "PagedKVCache",
    "PoolPlan",
    "PoolTooSmallError",
    "PrefixCacheStats",
    "SequenceError",
    "SequenceSlice",
    "Swap",
    "TierCosts",
    "TierPlan",
    "TransferSeconds",
    "UnknownSequenceError",
    "available_memory",
    "device_budget",
    "draw_page_map",
    "native_kv_bytes_per_token",
    "plan_pool",
    "plan_tiers",
]

_HOMES = {
    "attention_plan": ("SequenceSlice",),
    "block": ("BlockCopy",),
    "block_manager": ("BlockManager",),
    "errors": ("DuplicateSequenceError", "PoolTooSmallError", "SequenceError", "UnknownSequenceError"),
    "page_events": ("PageWatcher",),
    "page_map": ("draw_page_map",),
    "page_mover": ("PageMover",),
    "page_recorder": ("PageRecorder", "PageSnapshot"),
    "page_states": ("PageHistoryError", "PageStates"),
    "page_trace": ("PageTrace", "PageTraceError"),
    "paged_cache": ("PagedKVCache",),
    "prefix_cache": ("PrefixCacheStats",),
    "sizing": ("PoolPlan", "available_memory", "device_budget", "native_kv_bytes_per_token", "plan_pool"),
    "swap": ("Swap",),
    "tier_costs": ("TierCosts", "TransferSeconds"),
    "tier_sizing": ("TierPlan", "plan_tiers"),
    "tiers": ("PageTiers",),
}
_MODULE_OF = {name: f"{__name__}.{module}" for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
