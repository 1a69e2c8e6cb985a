"""Giving memory back. No torch here."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable


def return_freed_memory() -> None:
    """Asks the C library to give freed memory back to the operating system, where it can be asked (glibc).

    Unpacking weights takes and frees buffers of all sizes. Once a large one was freed, glibc keeps those below its size
    for later, and the process stays larger than what it uses: 30 MB for the bundled model.
    """
    trim = _find_trim()
    if trim is not None:
        trim(0)


@functools.cache
def _find_trim() -> Callable[[int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
