"""The file behind a shared-memory group: made by the first rank, gone once all have mapped it. No torch here.

It appears under its name complete, by a hard link from a private file, so nobody ever sees half of it. Its blocks are
reserved there and then: where shared memory is scarce (Docker gives 64 MB) that is an error to read, not a bus error in
the middle of a sum.
"""

from __future__ import annotations

import os
import struct
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from aios_parallel.errors import ParallelError

MAGIC = b"AIOSRANK"
VERSION = 1  # of `csrc/segment.h`: raise it when the layout changes

_HEADER = struct.Struct("<8sIIQ")


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentFile:
    """An open segment.

    Attributes:
        path: Where it is linked, until `unlink`.
        descriptor: Open for reading and writing; the caller closes it.
    """

    path: Path
    descriptor: int

    @classmethod
    def open(cls, path: Path, *, size: int, num_bytes: int) -> SegmentFile:
        """Opens the group's file, and makes it if nobody else has.

        Args:
            path: In a folder of memory, as `/dev/shm`; with a name that no other run uses.
            size: Number of ranks.
            num_bytes: Of the whole segment.

        Raises:
            ParallelError: It cannot be made or opened, or is not this group's.
        """
        try:
            while True:
                with suppress(FileNotFoundError):
                    return cls(path=path, descriptor=_open(path, size=size, num_bytes=num_bytes))
                _create(path, size=size, num_bytes=num_bytes)
        except OSError as error:
            raise ParallelError(
                f"cannot make or open the shared memory of a group of {size} ranks, {num_bytes >> 10} KiB at {path}: "
                f"{error}; make room there (in a container: --shm-size), or let the ranks talk through gloo"
            ) from error

    def unlink(self) -> None:
        """Takes the name away, unless another file has it by now; who has the file open keeps it."""
        with suppress(FileNotFoundError):
            if os.path.samestat(self.path.stat(follow_symlinks=False), os.fstat(self.descriptor)):
                self.path.unlink()


def _create(path: Path, *, size: int, num_bytes: int) -> None:
    """Links a new file to `path`; does nothing if another rank was faster."""
    descriptor, name = tempfile.mkstemp(prefix=f"{path.name}-", dir=path.parent)
    try:
        _reserve(descriptor, num_bytes)
        os.pwrite(descriptor, _HEADER.pack(MAGIC, VERSION, size, num_bytes), 0)
        with suppress(FileExistsError):
            os.link(name, path)
    finally:
        os.close(descriptor)
        Path(name).unlink()


def _reserve(descriptor: int, num_bytes: int) -> None:
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, num_bytes)
    else:  # macOS
        os.ftruncate(descriptor, num_bytes)


def _open(path: Path, *, size: int, num_bytes: int) -> int:
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        _check(path, descriptor, expected=(MAGIC, VERSION, size, num_bytes))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(path: Path, descriptor: int, *, expected: tuple[bytes, int, int, int]) -> None:
    status = os.fstat(descriptor)
    if status.st_uid != os.geteuid():
        raise ParallelError(f"{path} belongs to user {status.st_uid}, not to us: give the group another name")
    header = os.pread(descriptor, _HEADER.size, 0)
    found = _HEADER.unpack(header) if len(header) == _HEADER.size else None
    if found != expected or status.st_size != expected[-1]:
        raise ParallelError(
            f"{path} is not the shared memory of this group (magic, version, ranks, bytes are {found}, should be "
            f"{expected}): all ranks need the same version of aios-parallel and the same number of ranks, and the name "
            "must be new in every run"
        )
