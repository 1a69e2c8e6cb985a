"""Is it cheaper to move a page or to compute it again? Plain arithmetic on what was measured.

Moving costs seconds per page, taken from a few pages at start-up. Computing costs seconds per token, the exponential
average over steps that mostly read prompts. Both grow with the number of tokens, so what decides is the machine: how
fast its memory and disk are against how fast it computes this model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from aios_model.errors import ConfigError

PreemptionMode = Literal["auto", "recompute", "swap"]
PREEMPTION_MODES: tuple[PreemptionMode, ...] = ("auto", "recompute", "swap")

AVERAGING = 0.2
"""Weight of the newest step in the average."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransferSeconds:
    """Seconds that one page of all layers takes.

    Attributes:
        page_out: From the pool to host memory.
        page_in: From host memory to the pool.
        disk_write: From host memory to disk, checksum included.
        disk_read: From disk to the pool, checksum included.
    """

    page_out: float = 0.0
    page_in: float = 0.0
    disk_write: float = 0.0
    disk_read: float = 0.0

    @classmethod
    def slowest(cls, parts: Sequence[TransferSeconds]) -> TransferSeconds:
        """Of ranks that move their parts of a page side by side: as slow as the slowest."""
        names = ("page_out", "page_in", "disk_write", "disk_read")
        return cls(**{name: max(getattr(part, name) for part in parts) for name in names})


class TierCosts:
    """Decides what is worth moving.

    Until a prompt has been computed nobody knows what computing costs, and pages are moved.

    Args:
        transfers: What moving costs.
        mode: `auto` compares; `swap` always moves; `recompute` never saves the pages of preempted requests, while
            evicted pages are kept as in `auto`.
        block_size: Tokens per page.

    Attributes:
        seconds_per_token: Of computing prompts; None until it is known.

    Raises:
        ConfigError: No such mode.
    """

    def __init__(
        self, transfers: TransferSeconds | None = None, *, mode: PreemptionMode = "auto", block_size: int = 16
    ) -> None:
        if mode not in PREEMPTION_MODES:
            raise ConfigError(f"preemption_mode must be one of {', '.join(PREEMPTION_MODES)}, got {mode!r}")
        self.mode = mode
        self.transfers = transfers or TransferSeconds()
        self.seconds_per_token: float | None = None
        self._block_size = block_size

    def note_prefill(self, num_tokens: int, seconds: float) -> None:
        """A step computed so many prompt tokens in that time."""
        newest = seconds / num_tokens
        known = self.seconds_per_token
        self.seconds_per_token = newest if known is None else known + AVERAGING * (newest - known)

    def worth_saving(self, *, num_pages: int, num_tokens: int) -> bool:
        """Whether to save pages of a preempted request that hold so many tokens."""
        if self.mode != "auto":
            return self.mode == "swap"
        return self._is_cheaper(num_pages * (self.transfers.page_out + self.transfers.page_in), num_tokens)

    def worth_keeping(self) -> bool:
        """Whether to keep an evicted page in host memory."""
        return self._is_cheaper(self.transfers.page_out + self.transfers.page_in, self._block_size)

    def worth_demoting(self) -> bool:
        """Whether to write a page to disk that leaves host memory; writing happens beside the steps."""
        return self._is_cheaper(self.transfers.disk_read, self._block_size)

    def worth_fetching(self, *, num_host_pages: int, num_disk_pages: int, num_tokens: int) -> bool:
        """Whether to bring pages back that hold so many tokens."""
        seconds = num_host_pages * self.transfers.page_in + num_disk_pages * self.transfers.disk_read
        return self._is_cheaper(seconds, num_tokens)

    def _is_cheaper(self, seconds: float, num_tokens: int) -> bool:
        if self.mode == "swap" or self.seconds_per_token is None:
            return True
        return seconds < num_tokens * self.seconds_per_token
