"""Carries out what the books of the tiers have planned, for one device's share of every page.

A slot of the host tier is a number for some buffer. Demoting a page hands its buffer to the thread that writes, and the
slot gets a spare one, so nothing is copied twice and a step waits for the disk only when all spare buffers are taken.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from queue import SimpleQueue
from time import perf_counter

import torch
from torch import Tensor

from aios_kvcache.disk_tier import DiskTier
from aios_kvcache.host_tier import HostTier
from aios_kvcache.layout import NULL_BLOCK
from aios_kvcache.swap import Swap
from aios_kvcache.tier_costs import TransferSeconds
from aios_kvcache.tier_sizing import NUM_SPARE_PAGES, TierPlan
from aios_model.errors import AiosError


class SwapOrderError(AiosError):
    """Moves came that do not follow those made before: a step is missing, and this one must not run."""


class PageMover:
    """Moves pages between a pool and its tiers.

    Args:
        page_tensors: The pool: tensors whose first dimension counts pages, each page contiguous.
        plan: How many slots, and where the file goes.
        gather: As in `HostTier`.
        disk: The disk tier, if it is not to be made here.

    Raises:
        ConfigError: The file cannot be made.
    """

    def __init__(
        self,
        page_tensors: Sequence[Tensor],
        plan: TierPlan,
        *,
        gather: bool | None = None,
        disk: DiskTier | None = None,
    ) -> None:
        num_spare = NUM_SPARE_PAGES if plan.num_disk_pages else 1  # one to measure with
        self._host = HostTier(page_tensors, num_buffers=plan.num_host_pages + num_spare, gather=gather)
        self._buffer_of = list(range(plan.num_host_pages))
        self._spare: SimpleQueue[int] = SimpleQueue()
        for buffer in range(plan.num_host_pages, plan.num_host_pages + num_spare):
            self._spare.put(buffer)
        self._disk = disk
        if disk is None and plan.num_disk_pages:
            self._disk = DiskTier(
                num_slots=plan.num_disk_pages, page_bytes=self.page_bytes, directory=Path(plan.directory)
            )
        self._num_done = 0
        self._lost: set[int] = set()  # numbers of moves that found nothing; few, and asked for again after a failure

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self._host.page_bytes

    @torch.inference_mode()
    def run(self, first_swap: int, swaps: Sequence[Swap]) -> tuple[int, ...]:
        """Makes a step's moves, except those made before.

        Args:
            first_swap: Number of the first of them.
            swaps: In their order.

        Returns:
            Numbers of those whose page could not be read; the pool's page is filled with zeros then.

        Raises:
            SwapOrderError: An earlier step's moves were not made here.
        """
        if first_swap > self._num_done:
            raise SwapOrderError(f"move {first_swap} of a page came before move {self._num_done} was made")
        if first_swap + len(swaps) > self._num_done:
            self._host.begin()
            with self._host.stream():
                for swap in swaps[self._num_done - first_swap :]:
                    self._make(swap)
                    self._num_done += 1
            self._host.end()
        if not self._lost:
            return ()
        return tuple(serial for serial in range(first_swap, first_swap + len(swaps)) if serial in self._lost)

    @torch.inference_mode()
    def measure(self, *, num_pages: int = 3) -> TransferSeconds:
        """What moving a page takes, tried on the null page, which keeps its zeros; the first try is not counted."""
        host, disk, buffer = self._host, self._disk, self._spare.get()
        page_out = _median_seconds(lambda: self._finished(lambda: host.store(NULL_BLOCK, buffer)), num_pages)
        page_in = _median_seconds(lambda: self._finished(lambda: host.fetch(buffer, NULL_BLOCK)), num_pages)
        disk_write = disk_read = 0.0
        if disk is not None:
            view = host.view(buffer)
            disk_write = _median_seconds(lambda: _write_and_wait(disk, view), num_pages)
            disk_read = page_in + _median_seconds(lambda: disk.read(0, view), num_pages)
        self._spare.put(buffer)
        return TransferSeconds(page_out=page_out, page_in=page_in, disk_write=disk_write, disk_read=disk_read)

    def close(self) -> None:
        """Gives the disk's room back."""
        if self._disk is not None:
            self._disk.close()

    def _make(self, swap: Swap) -> None:
        match swap.kind:
            case "out":
                self._host.store(swap.source, self._buffer_of[swap.target])
            case "in":
                self._host.fetch(self._buffer_of[swap.source], swap.target)
            case "demote":
                self._demote(swap.source, swap.target)
            case "load":
                self._load(swap.source, swap.target)

    def _demote(self, host_slot: int, disk_slot: int) -> None:
        assert self._disk is not None, "a page goes to disk, and there is no disk tier"
        buffer, self._buffer_of[host_slot] = self._buffer_of[host_slot], self._spare.get()
        self._host.finish()
        self._disk.write(disk_slot, self._host.view(buffer), done=lambda: self._spare.put(buffer))

    def _load(self, disk_slot: int, page: int) -> None:
        assert self._disk is not None, "a page comes from disk, and there is no disk tier"
        buffer = self._spare.get()
        try:
            if self._disk.read(disk_slot, self._host.view(buffer)):
                self._host.fetch(buffer, page)
            else:
                self._lost.add(self._num_done)
                self._host.clear(page)
            self._host.finish()  # before the buffer serves someone else
        finally:
            self._spare.put(buffer)

    def _finished(self, copy: Callable[[], None]) -> None:
        self._host.begin()
        with self._host.stream():
            copy()
        self._host.finish()


def _write_and_wait(disk: DiskTier, view: memoryview) -> None:
    disk.write(0, view, done=lambda: None)
    disk.wait(0)


def _median_seconds(action: Callable[[], object], times: int) -> float:
    action()
    seconds = []
    for _ in range(times):
        started = perf_counter()
        action()
        seconds.append(perf_counter() - started)
    return sorted(seconds)[times // 2]
