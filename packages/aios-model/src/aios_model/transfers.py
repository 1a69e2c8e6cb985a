"""Numbers on their way between host and device, without anybody waiting.

`tensor.to("cuda")` and `torch.tensor(..., device="cuda")` wait until the device has done all that it was given so far:
with a step's work in front, milliseconds. Copies from page-locked memory do not wait, nor do copies to it, if whoever
reads them waits for an event behind them. That has not been run on a GPU yet; it was checked on torch's meta device,
whose tensors have no values, so that nothing can wait for one (`test_launch.py` of aios-sched).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


def is_asynchronous(device: torch.device) -> bool:
    """Whether what `device` is given to do runs on its own, while Python goes on."""
    return device.type == "cuda"


def upload(values: Sequence[float], *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of these numbers on `device`; the caller does not wait for what the device has to do."""
    pinned = device.type == "cuda"
    return torch.tensor(values, dtype=dtype, pin_memory=pinned).to(device, non_blocking=True)


def upload_tensor(host: Tensor, device: torch.device) -> Tensor:
    """A tensor in host memory, or a copy of it on `device`; the caller does not wait for what the device has to do."""
    if device.type == "cpu":
        return host
    return (host.pin_memory() if device.type == "cuda" else host).to(device, non_blocking=True)


class Download(Protocol):
    """Tensors on their way to host memory."""

    def wait(self) -> list[Tensor]:
        """Waits until they are there, and with them all that the device was given before."""
        ...


class Downloader(Protocol):
    """Starts copies to host memory."""

    def start(self, tensors: Sequence[Tensor]) -> Download:
        """Copies tensors as they will be when the device gets there; returns at once. Without any, just a place to
        wait for."""
        ...


def downloader(device: torch.device) -> Downloader:
    """What copies from `device`."""
    return CudaDownloader(device) if is_asynchronous(device) else HostDownloader()


class HostDownloader:
    """For a device that has computed by the time it returns: there is nothing to wait for."""

    def start(self, tensors: Sequence[Tensor]) -> HostDownload:
        """See Downloader."""
        return HostDownload([tensor.cpu() for tensor in tensors])


class HostDownload:
    """Tensors in host memory."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def wait(self) -> list[Tensor]:
        """See Download."""
        return self._tensors


class CudaDownloader:
    """Copies to page-locked memory, on the stream that computes, with an event behind.

    Args:
        device: Which GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def start(self, tensors: Sequence[Tensor]) -> CudaDownload:
        """See Downloader."""
        copies = [torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True) for tensor in tensors]
        for copy, tensor in zip(copies, tensors, strict=True):
            copy.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(self._device))
        return CudaDownload(copies, event)


class CudaDownload:
    """Copies in page-locked memory that are complete once an event is reached."""

    def __init__(self, copies: list[Tensor], event: torch.cuda.Event) -> None:
        self._copies = copies
        self._event = event

    def wait(self) -> list[Tensor]:
        """See Download."""
        self._event.synchronize()
        return self._copies
