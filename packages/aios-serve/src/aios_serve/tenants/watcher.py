"""TenantsWatcher: reads the file of tenants again when it changes, or when told to, while the server runs."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, TypeAlias

from aios_model.errors import ConfigError
from aios_serve.tenants.file_format import read_tenants

if TYPE_CHECKING:
    from pathlib import Path

    from aios_serve.tenants.registry import TenantRegistry

logger = logging.getLogger(__name__)

INTERVAL = 0.5
"""Seconds between two looks, each of which takes microseconds. A change counts once two looks agree: an editor that
writes in place leaves half a file for a moment, and half a file may be a valid one."""


class TenantsWatcher:
    """Keeps a registry as its file says. A file that cannot be used changes nothing, and is reported once.

    Args:
        registry: What to keep.
        path: Its file.
        interval: Seconds between two looks.
    """

    def __init__(self, registry: TenantRegistry, path: Path, *, interval: float = INTERVAL) -> None:
        self._registry = registry
        self._path = path
        self._interval = interval
        self._told = asyncio.Event()
        self._adopted: _Fingerprint | None = _NEVER  # the file may have changed since the registry read it

    def reload_now(self) -> None:
        """Read it again at once, changed or not: what SIGHUP asks for."""
        self._told.set()

    async def run(self) -> None:
        """Watch until cancelled."""
        seen: _Fingerprint | None = _NEVER
        while True:
            told = await self._pause()
            found = _fingerprint(self._path)
            if told or (found == seen and found != self._adopted):
                self._adopted = found  # before reading: what changes meanwhile is another change
                await self._reload()
            seen = found

    async def _reload(self) -> None:
        before = self._registry.tenants
        try:
            tenants = await asyncio.to_thread(read_tenants, self._path)
            self._registry.adopt(tenants)
        except ConfigError as error:
            logger.error("the tenants stay as they were: %s", error)
        except Exception:
            logger.exception("the tenants stay as they were: reading %s failed", self._path)
        else:
            if list(tenants) != before:
                logger.info("the tenants have changed: %d in %s", len(tenants), self._path)

    async def _pause(self) -> bool:
        """Wait for the next look; returns whether somebody asked for it."""
        try:
            await asyncio.wait_for(self._told.wait(), self._interval)
        except TimeoutError:
            return False
        self._told.clear()
        return True


_Fingerprint: TypeAlias = tuple[int, int, int]
_NEVER: _Fingerprint = (-1, -1, -1)


def _fingerprint(path: Path) -> _Fingerprint | None:
    """What changes when the file does; None if it is not there."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
