"""A step's sequences as the C structures that kernels read, built once per step and kept in place. No torch here."""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aios_kvcache.native.kernels import SEQUENCE_FORMAT, AttentionBatch

if TYPE_CHECKING:
    from aios_kvcache.attention_plan import SequenceSlice

_SEQUENCE_BYTES = struct.calcsize(SEQUENCE_FORMAT)
_INT32_BYTES = 4
_SPARE_PAGES = 32


class BatchBuffer:
    """Holds one batch at a time.

    From step to step a block table stays as it is, or grows at its end. So every table that was converted is remembered
    beside its numbers: to see that it is still the same takes 1 ns an entry, to convert it 20.

    Args:
        block_size: Tokens per page.
        num_blocks: The largest page number.

    Attributes:
        batch: The structure that kernels take. It and what it points to stay where they are until the next `fill`.
    """

    def __init__(self, *, block_size: int, num_blocks: int) -> None:
        self.batch = AttentionBatch(None, 0, 0)
        self._block_size = block_size
        self._num_blocks = num_blocks
        self._numbers = array("i")
        self._rooms: list[_Room] = []  # room i holds the table of the batch's sequence i
        self._sequences = ctypes.create_string_buffer(_SEQUENCE_BYTES)

    def fill(self, batch: Sequence[SequenceSlice]) -> None:
        """Takes in a batch whose tokens are packed in its order.

        Raises:
            ValueError: A slice is empty, or its block table has no room for its tokens or names a page that is none.
        """
        if len(batch) > len(self._rooms):
            self._lay_out(batch)
        size, rooms, base = self._block_size, self._rooms, self._numbers.buffer_info()[0]
        fields: list[int] = []
        row = 0
        for place, piece in enumerate(batch):
            start, length, table = piece.start, piece.length, piece.block_table
            if length < 1 or start < 0 or start + length > len(table) * size:
                raise ValueError(
                    f"tokens [{start}, {start + length}) are none, or more than {len(table)} pages of {size} hold"
                )
            if rooms[place].table != table:
                self._find_room(place, table)
                if len(table) > rooms[place].size:
                    self._lay_out(batch)
                    return self.fill(batch)
                self._hold(rooms[place], table)
            fields += (start, length, row, len(table), base + rooms[place].begin * _INT32_BYTES)
            row += length
        self._point_to(fields, num_sequences=len(batch), num_rows=row)
        return None

    def _lay_out(self, batch: Sequence[SequenceSlice]) -> None:
        """Makes a room for each sequence, with so much space to grow that this is seldom done."""
        self._rooms, begin = [], 0
        for piece in batch:
            self._rooms.append(_Room(begin, size=2 * len(piece.block_table) + _SPARE_PAGES))
            begin += self._rooms[-1].size
        self._numbers = array("i", bytes(_INT32_BYTES * begin))

    def _find_room(self, place: int, table: Sequence[int]) -> None:
        """Brings the room that holds the table, or its beginning, to this place: earlier sequences may have ended."""
        rooms = self._rooms
        for later in range(place, len(rooms)):
            if rooms[later].holds_beginning_of(table):
                rooms[place:] = rooms[later:] + rooms[place:later]
                return

    def _hold(self, room: _Room, table: Sequence[int]) -> None:
        known = len(room.table) if room.holds_beginning_of(table) else 0
        room.table = ()  # a table that is refused is not held
        fresh = table[known:]
        if fresh and (min(fresh) < 0 or max(fresh) > self._num_blocks):
            raise ValueError(
                f"a block table names pages {min(fresh)} to {max(fresh)}; there are pages 0 to {self._num_blocks}"
            )
        self._numbers[room.begin + known : room.begin + len(table)] = array("i", fresh)
        room.table = table[:]  # a copy: the caller may go on changing its own

    def _point_to(self, fields: list[int], *, num_sequences: int, num_rows: int) -> None:
        if _SEQUENCE_BYTES * num_sequences > len(self._sequences):
            self._sequences = ctypes.create_string_buffer(_SEQUENCE_BYTES * num_sequences)
        struct.pack_into(SEQUENCE_FORMAT * num_sequences, self._sequences, 0, *fields)
        self.batch.sequences = ctypes.addressof(self._sequences)
        self.batch.num_sequences = num_sequences
        self.batch.num_rows = num_rows


class _Room:
    """Where one block table lies, from `begin` on, and which it is."""

    __slots__ = ("begin", "size", "table")

    def __init__(self, begin: int, *, size: int) -> None:
        self.begin = begin
        self.size = size
        self.table: Sequence[int] = ()

    def holds_beginning_of(self, table: Sequence[int]) -> bool:
        length = len(self.table)
        return 0 < length <= len(table) and self.table[0] == table[0] and self.table == table[:length]
