"""What goes wrong with pages, as one branch of the error tree.

    AiosError
     ├─ SequenceError              a call does not fit the sequence it names     (also a ValueError)
     │   ├─ UnknownSequenceError   no such sequence: never opened, or freed before
     │   └─ DuplicateSequenceError the id is open already
     ├─ PoolTooSmallError          the memory does not hold one sequence of the length asked for
     ├─ PageHistoryError           an event does not fit the pages before it     (page_states.py; also a ValueError)
     └─ PageTraceError             a file is no page trace, or a broken one      (page_trace.py; also a ValueError)

A pool without enough free pages is no error: `BlockManager.reserve` returns None and the scheduler waits or preempts.
"""

from __future__ import annotations

from aios_model.errors import AiosError


class SequenceError(AiosError, ValueError):
    """A call does not fit the sequence it names."""


class UnknownSequenceError(SequenceError):
    """No sequence of this id is open: it never was, or it was freed before."""

    def __init__(self, sequence_id: str) -> None:
        super().__init__(f"no sequence {sequence_id!r} is open; open() or fork() it first, and free() it only once")


class DuplicateSequenceError(SequenceError):
    """A sequence of this id is open already."""

    def __init__(self, sequence_id: str) -> None:
        super().__init__(f"sequence {sequence_id!r} is open already; free() it before its id is used again")


class PoolTooSmallError(AiosError):
    """The memory for keys and values does not hold one sequence of the length asked for."""
