"""Where compiled kernels are kept: named by what they were made from and by their own contents. No torch here.

`aios_quant-avx512-<sources and flags>-<compiler>-<contents>.so` appears by renaming a finished file, so nobody sees
half of one. The digest of the contents in the name is checked before a file is used: to load a truncated library is not
an error but a crash.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

VARIABLE = "AIOS_CACHE_DIR"

_DIGEST_LENGTH = 16
_KEEP_SECONDS = 30 * 24 * 3600.0  # builds of other versions, and what a killed build left behind


class BuildCache:
    """Compiled libraries in one directory, shared by all processes of a user.

    Args:
        directory: Where they lie. It need not exist, nor be writable, to be searched.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def find(self, key: str) -> Path | None:
        """The library whose name begins with `key`; one that is not what was stored is removed and not returned."""
        for path in sorted(self.directory.glob(f"{key}-*.so")):
            with contextlib.suppress(OSError):
                if path.stem.endswith(f"-{_digest(path)}"):
                    _touch(path)
                    return path
                path.unlink()
        return None

    def store(self, file: Path, key: str) -> Path:
        """Take in a finished library; it must lie in a workspace of this cache. Returns where it is now."""
        path = self.directory / f"{key}-{_digest(file)}.so"
        return file.replace(path)

    def discard(self, key: str) -> None:
        """Forget what is stored under `key`."""
        for path in self.directory.glob(f"{key}-*.so"):
            path.unlink(missing_ok=True)

    @contextlib.contextmanager
    def workspace(self) -> Iterator[Path]:
        """A directory beside the libraries, removed in the end."""
        with tempfile.TemporaryDirectory(prefix="build-", dir=self.directory, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def lock(self, key: str, on_wait: Callable[[], None]) -> Iterator[None]:
        """Hold `key` against other processes and threads; `on_wait` is called if another one has it.

        Where files cannot be locked, two processes may compile the same: the last to rename wins, and both are right.
        """
        with (self.directory / f"{key}.lock").open("ab") as file:
            _lock(file.fileno(), on_wait)
            yield

    def is_writable(self) -> bool:
        """Whether files can be made here; creates the directory, for this user only."""
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.directory):
                return True
        except OSError:
            return False

    def prune(self) -> None:
        """Remove what nobody has used for a month."""
        oldest = time.time() - _KEEP_SECONDS
        for pattern in ("*.so", "*.lock", "build-*"):
            for path in self.directory.glob(pattern):
                with contextlib.suppress(OSError):
                    if path.stat().st_mtime < oldest:
                        shutil.rmtree(path) if path.is_dir() else path.unlink()


def default_cache() -> BuildCache:
    """`$AIOS_CACHE_DIR`, or else `aios/native` in `$XDG_CACHE_HOME` or `~/.cache`."""
    named = os.environ.get(VARIABLE)
    if named:
        return BuildCache(Path(named).expanduser().absolute())
    try:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home
        return private_cache()
    return BuildCache(base.absolute() / "aios" / "native")


@functools.cache
def private_cache() -> BuildCache:
    """A cache of this process alone, gone when it ends: for users who can keep no files."""
    folder, owner = Path(tempfile.mkdtemp(prefix="aios-native-")), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # a forked child must not take it away from its parent
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return BuildCache(folder)


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:_DIGEST_LENGTH]


def _touch(file: Path) -> None:
    with contextlib.suppress(OSError):  # a cache may be read-only
        os.utime(file)


def _lock(descriptor: int, on_wait: Callable[[], None]) -> None:
    """Lock an open file until it is closed, or until the process ends however it ends."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        on_wait()
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        pass  # a file system without locks
