"""What communicators written in Python count, and record one by one while they are traced."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_parallel.communicator import Traffic
from aios_parallel.tracing.clock import now
from aios_parallel.tracing.span_ring import ExchangeKind, SpanRing, label_of

if TYPE_CHECKING:
    from torch import Tensor


class ExchangeMeter:
    """Attributes: `traffic`, what was exchanged so far; `ring`, where exchanges are recorded, or None."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.ring: SpanRing | None = None

    def note(self, kind: ExchangeKind, x: Tensor | None, started: int, *, peer: int = 0, gives: bool = True) -> None:
        """Counts one exchange that ends now.

        Args:
            kind: What it was.
            x: Its tensor.
            started: When it began, by `now`.
            peer: The rank that the call named.
            gives: Whether this rank gave the tensor away; else its bytes are not counted as traffic.
        """
        ended = now()
        num_bytes = 0 if x is None else x.numel() * x.element_size()
        self.traffic.calls += 1
        self.traffic.num_bytes += num_bytes if gives else 0
        self.traffic.seconds += (ended - started) / 1e9
        if self.ring is not None:
            named = peer + 1 if kind is ExchangeKind.GATHER else peer
            self.ring.record(started, ended, label_of(kind, named), num_bytes)
