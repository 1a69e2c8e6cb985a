"""Reads GGUF's numbers, strings and arrays out of a mapped file, within bounds. No torch here.

A string is a u64 length and that many bytes of UTF-8; an array is a u32 element type, a u64 count and its elements.

The file is not trusted: every count is checked against the bytes that are left before anything is allocated for it.
GGUF readers were broken by exactly this (CVE-2024-23605, CVE-2026-33298).
"""

from __future__ import annotations

import struct
from typing import Any

from aios_model.errors import CheckpointError
from aios_model.weights.mapped_file import MappedFile

# The largest tokenizers in use take about 20 MB and 1.5 million elements of metadata.
_MAX_HEADER_BYTES = 128 << 20
_MAX_ARRAY_ELEMENTS = 1 << 22
_MAX_ARRAY_DEPTH = 4

_SCALARS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
_BOOL, _STRING, _ARRAY = 7, 8, 9
U32, U64 = _SCALARS[4], _SCALARS[10]


class HeaderCursor:
    """Reads forward through a header, never past its end; every CheckpointError names file, field and byte.

    Attributes:
        path: The file, for messages.
        position: The next byte to read.
    """

    def __init__(self, file: MappedFile) -> None:
        self.path = file.path
        self._buffer = file.buffer
        self._end = min(file.num_bytes, _MAX_HEADER_BYTES)
        self._elements_left = _MAX_ARRAY_ELEMENTS
        self.position = 0

    def corrupted(self, what: str) -> CheckpointError:
        """The error to raise about `what`, found at the current byte."""
        return CheckpointError(f"{self.path}: {what} at byte {self.position}: the file is cut off or corrupted")

    def scalar(self, kind: struct.Struct, field: str) -> Any:
        """The next number."""
        start = self.position
        self._advance(kind.size, field)
        return kind.unpack_from(self._buffer, start)[0]

    def string(self, field: str) -> str:
        """The next string."""
        length = self.scalar(U64, field)
        start = self.position
        self._advance(length, field)
        try:
            return str(self._buffer[start : self.position], "utf-8")
        except UnicodeDecodeError as error:
            self.position = start
            raise self.corrupted(f"{field} is not UTF-8") from error

    def value(self, kind: int, field: str, depth: int = 0) -> object:
        """The next metadata value, of type number `kind`."""
        if kind == _STRING:
            return self.string(field)
        if kind == _ARRAY:
            return self._array(field, depth + 1)
        if kind not in _SCALARS:
            raise self.corrupted(f"{field} has value type {kind}, which does not exist")
        if kind == _BOOL:
            return bool(self.scalar(_SCALARS[0], field))
        return self.scalar(_SCALARS[kind], field)

    def expect(self, count: int, least_bytes: int, field: str) -> None:
        """Refuse a count whose items, at `least_bytes` each, cannot fit into what is left."""
        if count * least_bytes > self._end - self.position:
            raise self.corrupted(f"{count} {field} announced, more than the file can hold,")

    def _array(self, field: str, depth: int) -> list[object]:
        kind, count = self.scalar(U32, field), self.scalar(U64, field)
        if depth > _MAX_ARRAY_DEPTH:
            raise self.corrupted(f"{field} nests arrays more than {_MAX_ARRAY_DEPTH} deep")
        if count > self._elements_left:
            raise self.corrupted(f"{field} announces {count} elements, more than any tokenizer has,")
        self._elements_left -= count
        if kind == _STRING:
            return self._strings(count, field)
        if kind in _SCALARS:
            return self._numbers(_SCALARS[kind], count, field)
        self.expect(count, 12, f"elements of {field}")
        return [self.value(kind, field, depth) for _ in range(count)]

    def _numbers(self, kind: struct.Struct, count: int, field: str) -> list[object]:
        start = self.position
        self._advance(count * kind.size, field)
        return list(struct.unpack_from(f"<{count}{kind.format[1:]}", self._buffer, start))

    def _strings(self, count: int, field: str) -> list[object]:
        """A tokenizer's 50,000 tokens and more: `string` without its calls, 4 times as fast."""
        self.expect(count, 8, f"strings of {field}")
        buffer, end, position = self._buffer, self._end, self.position
        unpack = U64.unpack_from
        strings: list[object] = []
        try:
            for _ in range(count):
                start = position + 8
                stop = start + unpack(buffer, position)[0]
                if stop > end:
                    break
                strings.append(str(buffer[start:stop], "utf-8"))
                position = stop
        except (struct.error, UnicodeDecodeError):
            pass
        self.position = position
        if len(strings) < count:
            self.string(f"element {len(strings)} of {field}")  # says what is wrong with it
            raise self.corrupted(f"{field} is unreadable")
        return strings

    def _advance(self, num_bytes: int, field: str) -> None:
        if num_bytes > self._end - self.position:
            raise self.corrupted(f"{field} needs {num_bytes} bytes where {self._end - self.position} are left,")
        self.position += num_bytes
