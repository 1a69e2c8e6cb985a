"""Pages in a file: a fixed number of slots, a checksum for each, written by a thread of its own. No torch.

The file has no name: it is gone when the process is, however that ends. Its blocks are taken at once, so that a full
disk is noticed at the start rather than in the middle of a request. What is written is nevertheless only a hope: a page
counts as stored if, when it is read, its checksum is that of what was written. Everything else is a miss.

The checksum is `zlib.crc32`: it guards against bad disks and cut files, not against whoever can write into a nameless
file of this process. It runs at 7.5 GB/s on an AMD EPYC, five times as fast as blake2b, and lets go of the interpreter.
"""

from __future__ import annotations

import logging
import os
import tempfile
import threading
import zlib
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import BinaryIO

from aios_model.errors import ConfigError

_log = logging.getLogger(__name__)


class DiskTier:
    """Slots of one page each.

    Args:
        num_slots: How many.
        page_bytes: Size of each.
        directory: Where the file is made; it needs room for all of them.
        file: What to use instead of a new file, for tests.

    Raises:
        ConfigError: The directory does not exist, cannot be written, or has no room.
    """

    def __init__(self, *, num_slots: int, page_bytes: int, directory: Path | str, file: BinaryIO | None = None) -> None:
        self.num_slots = num_slots
        self.page_bytes = page_bytes
        self._file = file or _open_nameless(Path(directory), num_slots * page_bytes)
        self._checksums: dict[int, int] = {}  # of what was written; a slot without one holds nothing
        self._pending: dict[int, threading.Event] = {}  # slots with a write on its way
        self._has_warned = False
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="aios-disk-tier", daemon=True)
        self._thread.start()

    def write(self, slot: int, data: memoryview, *, done: Callable[[], None]) -> None:
        """Starts to write a page; `data` must not change until `done` is called, by the writing thread."""
        self.wait(slot)
        written = self._pending[slot] = threading.Event()

        def run() -> None:
            try:
                self._checksums.pop(slot, None)
                self._write(slot, data)
            finally:
                done()
                del self._pending[slot]
                written.set()

        self._queue.put(run)

    def read(self, slot: int, into: memoryview) -> bool:
        """Reads a page; False if it is not what was written last, and then `into` holds anything."""
        self.wait(slot)
        expected = self._checksums.get(slot)
        if expected is None:
            return False
        try:
            num_bytes = os.preadv(self._file.fileno(), [into], slot * self.page_bytes)
        except OSError as error:
            self._warn(f"cannot be read ({error})")
            return False
        if num_bytes != self.page_bytes or zlib.crc32(into) != expected:
            self._warn("holds something else than was written to it")
            return False
        return True

    def wait(self, slot: int) -> None:
        """Until no write to this slot is on its way."""
        pending = self._pending.get(slot)
        if pending is not None:
            pending.wait()

    def close(self) -> None:
        """Ends the thread once it has written everything, and gives the room back."""
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()
        self._file.close()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            job()

    def _write(self, slot: int, data: memoryview) -> None:
        offset, rest = slot * self.page_bytes, data
        try:
            while rest:
                num_bytes = os.pwrite(self._file.fileno(), rest, offset)
                if not num_bytes:
                    raise OSError("nothing was written")
                offset, rest = offset + num_bytes, rest[num_bytes:]
        except OSError as error:
            self._warn(f"cannot be written ({error})")
            return
        self._checksums[slot] = zlib.crc32(data)

    def _warn(self, trouble: str) -> None:
        if not self._has_warned:
            self._has_warned = True
            _log.warning(
                "the disk tier of the KV cache %s; pages that are missing are computed again (this is said once)",
                trouble,
            )


def _open_nameless(directory: Path, num_bytes: int) -> BinaryIO:
    """A file without a name (O_TMPFILE where there is that) of so many bytes, its blocks taken."""
    file = None
    try:
        file = tempfile.TemporaryFile(dir=directory, prefix="aios-kv-", buffering=0)  # noqa: SIM115  # lives as long as the tier
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            os.truncate(file.fileno(), num_bytes)
    except OSError as error:
        if file is not None:
            file.close()
        raise ConfigError(
            f"a file of {num_bytes / 2**30:.2f} GiB for pages cannot be made in {directory} ({error}); "
            "give less with kv_offloading_disk_size, or another folder with kv_offloading_path"
        ) from error
    return file  # type: ignore[return-value]  # a raw file, which is all that is needed
