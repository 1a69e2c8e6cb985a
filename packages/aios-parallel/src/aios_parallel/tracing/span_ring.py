"""A ring of spans in memory that Python and C++ both write: the last so many of them, and how many there were.

The structures are those of `native/csrc/span_ring.h`, field by field. No torch here.
"""

from __future__ import annotations

import ctypes
import mmap
import struct
from collections.abc import Iterator
from ctypes import c_char, c_int64
from enum import IntEnum
from typing import NamedTuple

_SPAN = struct.Struct("<4q")
_PEER_BITS = 8


class Span(NamedTuple):
    """A stretch of time.

    Attributes:
        begin: Nanoseconds on the clock of traces.
        end: The same.
        label: What it is: a step's number, or an exchange's kind and peer, as `label_of` makes it.
        amount: Tokens of a step, bytes of an exchange's tensor.
    """

    begin: int
    end: int
    label: int
    amount: int


class ExchangeKind(IntEnum):
    """`aios::Operation`: the calls of a communicator."""

    ALL_REDUCE = 1
    BARRIER = 2
    BROADCAST = 3
    GATHER = 4
    SEND = 5
    RECEIVE = 6
    ALL_GATHER = 7  # in native code a gather to everybody

    @property
    def is_transfer(self) -> bool:
        """Whether it pairs two ranks; all others take the whole group."""
        return self in (ExchangeKind.SEND, ExchangeKind.RECEIVE)


class RingHeader(ctypes.Structure):
    """`aios::SpanRing`."""

    _fields_ = (("spans", c_int64), ("capacity", c_int64), ("count", c_int64))


class SpanRing:
    """Keeps the last `capacity` spans; one thread writes.

    Args:
        capacity: At 32 bytes each, which the system gives as they are written.
    """

    def __init__(self, capacity: int) -> None:
        if capacity < 1:
            raise ValueError(f"a ring of {capacity} spans keeps nothing; give 1 or more")
        self._memory = mmap.mmap(-1, capacity * _SPAN.size)
        self.header = RingHeader(ctypes.addressof(c_char.from_buffer(self._memory)), capacity, 0)

    @property
    def num_recorded(self) -> int:
        """Spans that were written, those that are gone included."""
        return self.header.count

    @property
    def num_dropped(self) -> int:
        """Spans that later ones have replaced."""
        return max(0, self.header.count - self.header.capacity)

    def record(self, begin: int, end: int, label: int, amount: int) -> None:
        """Writes one span, over the oldest one if there is no room."""
        header = self.header
        _SPAN.pack_into(self._memory, header.count % header.capacity * _SPAN.size, begin, end, label, amount)
        header.count += 1

    def packed(self) -> bytes:
        """The spans that are left, oldest first, as `unpack_spans` reads them."""
        capacity, count = self.header.capacity, self.header.count
        if count <= capacity:
            return self._memory[: count * _SPAN.size]
        oldest = count % capacity * _SPAN.size
        return self._memory[oldest:] + self._memory[:oldest]


def unpack_spans(data: bytes) -> Iterator[Span]:
    """The spans in `data`, in their order."""
    return map(Span._make, _SPAN.iter_unpack(data))


def label_of(kind: ExchangeKind, peer: int = 0) -> int:
    """The label of an exchange: its kind, and the rank that the call names, if any."""
    return kind << _PEER_BITS | peer


def read_label(label: int) -> tuple[ExchangeKind, int]:
    """What `label_of` was given. A native gather counts its target from 1, and 0 is everybody."""
    kind, peer = ExchangeKind(label >> _PEER_BITS), label & (1 << _PEER_BITS) - 1
    if kind is ExchangeKind.GATHER:
        return (kind, peer - 1) if peer else (ExchangeKind.ALL_GATHER, 0)
    return kind, peer
