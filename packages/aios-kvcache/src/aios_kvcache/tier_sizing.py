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


def plan_tiers(
    *, page_bytes: int, host_bytes: int, disk_bytes: int = 0, directory: str, available_bytes: int
) -> TierPlan | None:
    """Decides how many pages fit.

    Args:
        page_bytes: Bytes of a page, in all layers and on all ranks.
        host_bytes: Memory for the host tier; 0 for no tiers.
        disk_bytes: Room for the disk tier; 0 for none.
        directory: Where its file goes.
        available_bytes: Memory there is to take the host tier from.

    Returns:
        None if `host_bytes` is 0.

    Raises:
        ConfigError: Not one page fits, there is not that much memory, or a disk tier has no host tier above it.
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
    if host_bytes > available_bytes:
        raise ConfigError(
            f"kv_offloading_size={host_bytes} ({host_bytes / 2**30:.2f} GiB) cannot be used: "
            f"{available_bytes / 2**30:.2f} GiB of host memory is available beside the pool; ask for less"
        )
    return TierPlan(
        num_host_pages=host_bytes // page_bytes,
        num_disk_pages=disk_bytes // page_bytes,
        directory=directory,
        page_bytes=page_bytes,
    )
