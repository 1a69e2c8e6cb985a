"""How many pages the tiers below the pool have room for. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from aios_model.errors import ConfigError

NUM_SPARE_PAGES = 8
"""Buffers beside the host tier's slots where there is a disk tier: pages on their way to or from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TierPlan:
    """How large the tiers will be.

    Attributes:
        num_host_pages: Slots in host memory.
        num_disk_pages: Slots on disk.
        directory: Where the disk tier's file goes.
        page_bytes: Bytes of a page, in all layers and on all ranks.
    """

    num_host_pages: int
    num_disk_pages: int
    directory: str
    page_bytes: int

    @property
    def num_host_bytes(self) -> int:
        """Memory of the host tier, spare buffers not counted."""
        return self.num_host_pages * self.page_bytes

    @property
    def num_disk_bytes(self) -> int:
        """Size of the disk tier's files."""
        return self.num_disk_pages * self.page_bytes


def plan_tiers(*, page_bytes: int, host_bytes: int, disk_bytes: int = 0, directory: str) -> TierPlan | None:
    """Decides how many pages fit.

    Args:
        page_bytes: Bytes of a page, in all layers and on all ranks.
        host_bytes: Memory for the host tier; 0 for no tiers.
        disk_bytes: Room for the disk tier; 0 for none.
        directory: Where its file goes.

    Returns:
        None if `host_bytes` is 0.

    Raises:
        ConfigError: Not one page fits, or a disk tier has no host tier above it.
    """
    if not host_bytes:
        if disk_bytes:
            raise ConfigError(
                f"kv_offloading_disk_size={disk_bytes} cannot be used without kv_offloading_size: pages reach the disk "
                "through host memory; give it a few hundred megabytes"
            )
        return None
    for name, num_bytes in (("kv_offloading_size", host_bytes), ("kv_offloading_disk_size", disk_bytes)):
        if num_bytes and num_bytes < page_bytes:
            raise ConfigError(
                f"{name}={num_bytes} cannot be used: one page takes {page_bytes} bytes; the size is in bytes, "
                "or written as 4GiB"
            )
    return TierPlan(
        num_host_pages=host_bytes // page_bytes,
        num_disk_pages=disk_bytes // page_bytes,
        directory=directory,
        page_bytes=page_bytes,
    )


def check_host_room(num_bytes: int, *, available_bytes: int) -> None:
    """Raises ConfigError if a process has no memory for its host tier.

    Args:
        num_bytes: What the tier takes of this process.
        available_bytes: What there is, the pool taken off.
    """
    if num_bytes > available_bytes:
        raise ConfigError(
            f"kv_offloading_size cannot be honoured: a host tier of {num_bytes / 2**30:.2f} GiB is asked for, and "
            f"{max(0, available_bytes) / 2**30:.2f} GiB of host memory is available beside the pool; ask for less"
        )
