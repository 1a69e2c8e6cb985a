"""A file mapped into memory, read-only. No torch here.

Mapping costs nothing until a page is touched; the kernel then reads it, shares it with every other process that maps
the file, and may drop it again at any time, because it can always be read back. That is why "weights are mapped, not
copied": several engines on one machine share one copy, and a tensor that was decoded gives its pages back at once.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from types import TracebackType

from aios_model.errors import CheckpointError, ModelNotFoundError


class MappedFile:
    """One checkpoint file in the address space.

    The mapping is read-only: writing through a view of it ends the process. Truncating the file under it does too,
    as for every program that maps files: replace a checkpoint by renaming a new file over it, never in place.

    Args:
        path: The file. It is opened, mapped as a whole and closed again.

    Raises:
        ModelNotFoundError: there is no such file, or it may not be read.
        CheckpointError: the file is empty or not a plain file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            with self.path.open("rb") as file:
                self.num_bytes = os.fstat(file.fileno()).st_size
                if self.num_bytes == 0:
                    raise CheckpointError(f"{self.path} is empty: the download or copy was cut off, fetch it again")
                self.buffer: mmap.mmap | bytes = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError as error:
            raise ModelNotFoundError(f"no such file: {self.path}") from error
        except PermissionError as error:
            raise ModelNotFoundError(f"{self.path} may not be read by this user") from error
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path} cannot be mapped: {error}") from error

    def release(self, offset: int, num_bytes: int) -> None:
        """Give the pages under `num_bytes` bytes from `offset` back to the kernel; touching them reads them again.

        The border pages go too, although a neighbour may share them: reading one again costs a page fault, keeping
        both of every tensor would keep thousands.
        """
        if num_bytes and isinstance(self.buffer, mmap.mmap) and hasattr(self.buffer, "madvise"):
            start = offset - offset % mmap.PAGESIZE
            self.buffer.madvise(mmap.MADV_DONTNEED, start, offset + num_bytes - start)

    def close(self) -> None:
        """Let go of the mapping. It goes when the last tensor that looks into it does.

        It must not be unmapped here: a tensor over it keeps the object, but not its memory, from going away.
        """
        self.buffer = b""

    def __enter__(self) -> MappedFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
