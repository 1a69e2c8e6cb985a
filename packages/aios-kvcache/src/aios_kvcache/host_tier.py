"""Pages in host memory: one buffer per slot, which a page's parts of all layers share, and a few more on their way.

Two ways to copy. Where the pool is host memory too, plain `memmove`: 60 pieces a page take 25 µs beside the copying.
On a device the pieces are gathered there, and one transfer per page goes to or from pinned memory, on a stream of its
own that waits for the step before and that the step behind waits for. That way has been run on CPU tensors only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from aios_kvcache.pool_memory import allocate_pool


class HostTier:
    """Buffers of one page each, and the way between them and the pool.

    Args:
        page_tensors: The pool: tensors whose first dimension counts pages, each page contiguous.
        num_buffers: Pages that fit.
        gather: Copy through torch instead of `memmove`; None decides by the device.

    Attributes:
        page_bytes: Bytes of one page in all tensors together.
    """

    def __init__(self, page_tensors: Sequence[Tensor], *, num_buffers: int, gather: bool | None = None) -> None:
        self._pages = [tensor.flatten(1).view(torch.uint8) for tensor in page_tensors]
        self._sizes = [pages.shape[1] for pages in self._pages]
        self.page_bytes = sum(self._sizes)
        self._device = page_tensors[0].device
        self._gather = self._device.type != "cpu" if gather is None else gather
        shape = (num_buffers, self.page_bytes)
        if self._device.type == "cuda":
            self._buffers = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            self._buffers = allocate_pool(shape, dtype=torch.uint8, device=torch.device("cpu"))
        self._stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        self._bases = [(pages.data_ptr(), size) for pages, size in zip(self._pages, self._sizes, strict=True)]
        self._base = self._buffers.data_ptr()

    def view(self, buffer: int) -> memoryview:
        """A buffer's bytes; call `finish` first if a page was just copied there."""
        return self._buffers[buffer].numpy().data

    def store(self, page: int, buffer: int) -> None:
        """Copies a page of the pool into a buffer."""
        if self._gather:
            row = torch.cat([pages[page] for pages in self._pages])
            self._buffers[buffer].copy_(row, non_blocking=True)
            return
        target = self._base + buffer * self.page_bytes
        for base, size in self._bases:
            ctypes.memmove(target, base + page * size, size)
            target += size

    def fetch(self, buffer: int, page: int) -> None:
        """Copies a buffer into a page of the pool."""
        if self._gather:
            row = self._buffers[buffer].to(self._device, non_blocking=True)
            for pages, part in zip(self._pages, row.split(self._sizes), strict=True):
                pages[page].copy_(part)
            return
        source = self._base + buffer * self.page_bytes
        for base, size in self._bases:
            ctypes.memmove(base + page * size, source, size)
            source += size

    def clear(self, page: int) -> None:
        """Fills a page of the pool with zeros: its leftovers may be no numbers at all."""
        for pages in self._pages:
            pages[page].zero_()

    def begin(self) -> None:
        """Copies that follow start behind what the device was given so far."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))

    def stream(self) -> torch.cuda.StreamContext:
        """What copies run in; does nothing where there are no streams."""
        return torch.cuda.stream(self._stream)  # type: ignore[arg-type]  # None is fine

    def end(self) -> None:
        """What the device is given from now on starts behind the copies."""
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)

    def finish(self) -> None:
        """Waits until all copies so far are made."""
        if self._stream is not None:
            self._stream.synchronize()
