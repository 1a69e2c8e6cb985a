"""What streaming weights needs of a device: memory, streams of work, and events that order them.

Kernels and copies are put on streams and run later. A stream runs its own work in order; between streams nothing is
ordered but by events.

`CudaDevice` has been checked by its types and by the tests of its users against another device, which keeps track of
every order between copies and reads. It has not run on a GPU yet; the tests marked `gpu` will show.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from aios_model.errors import ConfigError


class Event(Protocol):
    """A place in a stream's work. Nothing can be done with it but to wait for it."""


class Stream(Protocol):
    """Work that runs in order."""

    def record(self) -> Event:
        """An event behind all that the stream was given so far."""
        ...

    def wait(self, event: Event) -> None:
        """What the stream is given from now on starts once `event` is reached; the caller does not wait."""
        ...

    def copy_async(self, to: Tensor, source: Tensor) -> None:
        """Puts a copy on the stream: `source` [n] in host memory, `to` [n] on the device, both bytes."""
        ...


class StreamingDevice(Protocol):
    """A device that computes on one stream while it copies on another."""

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Host memory that can be copied from without the processor's help, uint8 [num_bytes]."""
        ...

    def allocate(self, num_bytes: int) -> Tensor:
        """Device memory, uint8 [num_bytes]."""
        ...

    def new_stream(self) -> Stream:
        """A stream of its own."""
        ...

    def current_stream(self) -> Stream:
        """The stream on which models compute."""
        ...

    def release_unused(self) -> None:
        """Gives memory back that nobody holds any more, so that it counts as free."""
        ...


def streaming_device(device: torch.device) -> StreamingDevice:
    """What streams weights to `device`.

    Raises:
        ConfigError: It computes from host memory.
    """
    if device.type != "cuda":
        raise ConfigError(
            f"cpu_offload_gb cannot be used on device {device.type!r}: its weights are in host memory already; "
            "leave cpu_offload_gb out"
        )
    return CudaDevice(device)


class CudaDevice:
    """A GPU behind torch.

    Args:
        device: Which one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def allocate_host(self, num_bytes: int) -> Tensor:
        """Page-locked memory; torch rounds it up to a power of two."""
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True)

    def allocate(self, num_bytes: int) -> Tensor:
        """See StreamingDevice."""
        return torch.empty(num_bytes, dtype=torch.uint8, device=self._device)

    def new_stream(self) -> CudaStream:
        """See StreamingDevice."""
        return CudaStream(torch.cuda.Stream(self._device))

    def current_stream(self) -> CudaStream:
        """See StreamingDevice."""
        return CudaStream(torch.cuda.current_stream(self._device))

    def release_unused(self) -> None:
        """See StreamingDevice."""
        torch.cuda.empty_cache()


class CudaStream:
    """A CUDA stream."""

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream

    def record(self) -> torch.cuda.Event:
        """See Stream."""
        event = torch.cuda.Event()
        self._stream.record_event(event)
        return event

    def wait(self, event: Event) -> None:
        """See Stream."""
        assert isinstance(event, torch.cuda.Event), "events come from streams of the same device"
        self._stream.wait_event(event)

    def copy_async(self, to: Tensor, source: Tensor) -> None:
        """See Stream."""
        with torch.cuda.stream(self._stream):
            to.copy_(source, non_blocking=True)
