"""The one thread pool of the process, which the native kernels of all layers share. No torch at import.

Idle workers spin for a moment before they sleep, because being woken costs more than most pieces of work. So two busy
pools in one process fight for the cores: all kernels run on this one, and while they work torch should run one thread.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

from aios_model.errors import ConfigError
from aios_model.native.base_library import model_library
from aios_model.native.cores import parse_cpu_list, resolve_cpu_bind, usable_cores

_MAX_THREADS = 1024


def get_pool(
    num_threads: int | None = None, *, cpu_bind: str | Sequence[int] | None = None, own_torch_threads: bool = False
) -> ThreadPool:
    """The process's pool, created when first asked for, and resized when asked for another size or binding.

    Args:
        num_threads: Its size, the calling thread included. None for the size it has or, at first, one thread for each
            CPU that `cpu_bind` names, or else `default_num_threads()`.
        cpu_bind: `auto`, `none` or CPUs, as of `resolve_cpu_bind`; thread 0 is the caller's and is never bound. None
            for the binding it has, or for `none` if the size is a new one.
        own_torch_threads: Let torch run one thread from now on, as it should while native kernels do the work.

    Raises:
        ConfigError: a size that is none, CPUs that may not be used, more threads than the system grants.
        NativeBuildError: there is no native code here; ask `native_status` first.
    """
    _pool.resize(num_threads, cpu_bind)
    if own_torch_threads:
        import torch

        torch.set_num_threads(1)
    return _pool


def current_pool() -> ThreadPool | None:
    """The process's pool; None if nobody has asked for one."""
    return None if _pool.setup is None else _pool


def default_num_threads() -> int:
    """As many as `usable_cores()`, or `OMP_NUM_THREADS` if that is less: a limit that users know from torch."""
    named = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    limit = int(named) if named.isascii() and named.isdigit() else 0
    return min(usable_cores(), limit or _MAX_THREADS)


class PoolSetup(NamedTuple):
    """How a pool is laid out.

    Attributes:
        num_threads: Its size, the calling thread included.
        cpus: One CPU for each thread; None if the operating system places them.
    """

    num_threads: int
    cpus: tuple[int, ...] | None


class ThreadPool:
    """The process's pool, whatever its size is at the moment. It comes from `get_pool`.

    Attributes:
        setup: Its size and binding; None before the first `get_pool`.
    """

    def __init__(self) -> None:
        self.setup: PoolSetup | None = None
        self._pointer: int | None = None
        # Native pools by layout, kept until the process ends. To destroy one when another size is asked for would pull
        # it from under a thread that is inside a kernel; its idle workers sleep and cost nothing.
        self._native: dict[PoolSetup, _NativePool] = {}
        self._lock = threading.Lock()

    @property
    def pointer(self) -> int:
        """What kernels take as `void* pool`. Ask for it at each call: resizing and forking change it."""
        return self._pointer or self._start()

    @property
    def num_threads(self) -> int:
        """Its size, the calling thread included."""
        assert self.setup is not None, "a pool comes from get_pool()"
        return self.setup.num_threads

    def resize(self, num_threads: int | None, cpu_bind: str | Sequence[int] | None) -> None:
        """Take another size or binding, as `get_pool` describes; kernels that are running finish on the old ones."""
        with self._lock:
            setup = _resolve(num_threads, cpu_bind, now=self.setup)
            self._pointer = self._native_pool(setup)
            self.setup = setup

    def _start(self) -> int:
        """A native pool of the layout that this one has: the first use in a forked child, which has no workers."""
        with self._lock:
            assert self.setup is not None, "a pool comes from get_pool()"
            self._pointer = self._native_pool(self.setup)
            return self._pointer

    def _native_pool(self, setup: PoolSetup) -> int:
        if setup not in self._native:
            self._native[setup] = _create(setup)
        return self._native[setup].pointer

    def _forget(self) -> None:
        """In a forked child, which has neither its parent's workers nor the thread that may have held the lock."""
        self._pointer, self._native, self._lock = None, {}, threading.Lock()

    def _close(self) -> None:
        """At exit: end the workers, unless another thread may still be computing; then they end with the process."""
        if threading.active_count() > 1:
            return
        pools, self._pointer, self._native = self._native, None, {}
        for pool in pools.values():
            pool.destroy(pool.pointer)


class _NativePool(NamedTuple):
    pointer: int
    destroy: Callable[[int], None]


def _resolve(num_threads: int | None, cpu_bind: str | Sequence[int] | None, *, now: PoolSetup | None) -> PoolSetup:
    if now is not None and cpu_bind is None and num_threads in (None, now.num_threads):
        return now
    bind = cpu_bind or "none"
    if isinstance(bind, str) and bind not in ("auto", "none"):
        bind = parse_cpu_list(bind)
    if num_threads is None and not isinstance(bind, str):
        num_threads = len(bind)
    elif num_threads is None:
        num_threads = default_num_threads() if now is None else now.num_threads
    if not 1 <= num_threads <= _MAX_THREADS:
        raise ConfigError(f"num_threads is {num_threads}; it must be between 1 and {_MAX_THREADS}")
    cpus = resolve_cpu_bind(bind, num_threads=num_threads)
    return PoolSetup(num_threads, None if cpus is None else tuple(cpus))


def _create(setup: PoolSetup) -> _NativePool:
    """Start the workers of a native pool."""
    library = model_library()
    destroy = library.declare("aios_pool_destroy", None, ctypes.c_void_p)
    create = library.declare("aios_pool_create", ctypes.c_void_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32))
    cpus = None if setup.cpus is None else (ctypes.c_int32 * setup.num_threads)(*setup.cpus)
    pointer = create(setup.num_threads, cpus)
    if not pointer:
        raise ConfigError(f"the system does not grant {setup.num_threads} threads; ask for fewer, or raise its limits")
    return _NativePool(pointer, destroy)


_pool = ThreadPool()
atexit.register(_pool._close)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool._forget)
