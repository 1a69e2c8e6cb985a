"""What parsers of all formats share: text outside of calls, what is held back, and what becomes of a bad call."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING

from aios_serve.tool_calls.call_reader import ReadState
from aios_serve.tool_calls.pieces import CallArguments, CallEnd, CallStart, Piece, Text, merged

if TYPE_CHECKING:
    from aios_serve.tool_calls.call_reader import ArgumentsReader, CallReader

State = Callable[[], bool]
"""Takes from the waiting text as much as it can be sure about; False if it needs more of it."""


class ToolCallParser(ABC):
    """Takes the text of one answer apart, as it comes.

    The pieces depend on the text alone, never on how it was cut: a state decides by what the text says, and waits where
    that is not enough. Text is held back only as long as a call may begin in it. White space around calls is dropped;
    other text before, between and after them is kept. What begins like a call and is none becomes text as it was
    written; what turns out to be malformed after some of its arguments were passed on ends as incomplete.

    A subclass knows the markers of a format: it begins in `_in_text` and says what comes after a call.
    """

    def __init__(self) -> None:
        self._waiting = ""
        self._opening = ""  # taken from the waiting text, and to be given back if no call follows
        self._state: State = self._in_text
        self._pieces: list[Piece] = []
        self._num_calls = 0
        self._after_call = False  # nothing but white space since the last call
        self._anything_shown = False
        self._reader: CallReader | ArgumentsReader | None = None
        self._raw: list[str] = []  # of the call that is being read, `_opening` aside
        self._is_torn = False

    def push(self, text: str) -> list[Piece]:
        """Take more text; gives the pieces that are certain now."""
        self._waiting += text
        while self._waiting and self._state():
            pass
        return self._taken()

    def finish(self) -> list[Piece]:
        """The text has ended: gives what was held back."""
        if self._is_torn or (self._reader is not None and self._reader.is_torn):
            self._pass_torn(self._waiting)
            self._close_call(complete=False)
            self._waiting = ""
        elif self._reader is not None and self._reader.is_whole:
            self._close_call(complete=True)
        rest = self._opening + "".join(self._raw) + self._waiting
        self._opening, self._raw, self._waiting, self._reader = "", [], "", None
        self._add_text("" if self._after_call and self._is_padding(rest) else rest)
        return self._taken()

    @abstractmethod
    def _in_text(self) -> bool:
        """State outside of calls, and the first one."""

    @abstractmethod
    def _after(self) -> bool:
        """State behind a call."""

    def _is_padding(self, rest: str) -> bool:
        """Whether `rest`, at the end behind a call, belongs to the format."""
        return not rest.strip()

    def _torn_end(self) -> str:
        """The marker up to which a malformed call goes; empty if to the end of the text."""
        return ""

    def _seek(self, *markers: str) -> str | None:
        """Take text up to the first of `markers`, and the marker as opening; None if none is there yet.

        White space before the marker goes with it.
        """
        found = [(start, marker) for marker in markers if (start := self._waiting.find(marker)) >= 0]
        if not found:
            held = max(overlap(self._waiting, marker) for marker in markers)
            self._show(len(self._waiting) - held)
            return None
        start, marker = min(found)
        self._show(start)
        self._open(self._waiting.index(marker) + len(marker))
        return marker

    def _show(self, end: int) -> None:
        """Give out waiting text up to `end`, but for white space at its end."""
        end = len(self._waiting[:end].rstrip())
        self._add_text(self._waiting[:end])
        self._waiting = self._waiting[end:]

    def _open(self, length: int) -> None:
        """Take the next `length` waiting characters as part of an opening."""
        self._opening += self._waiting[:length]
        self._waiting = self._waiting[length:]

    def _open_space(self) -> str:
        """Take white space as part of an opening; returns the character behind it, "" if there is none yet."""
        self._open(len(self._waiting) - len(self._waiting.lstrip()))
        return self._waiting[:1]

    def _give_back(self) -> bool:
        """No call follows: the opening is text."""
        self._add_text(self._opening)
        self._opening = ""
        self._state = self._in_text
        return True

    def _begin_call(self, reader: CallReader | ArgumentsReader) -> bool:
        """Read a call from here on; the next waiting character is its `{`."""
        self._reader, self._raw = reader, []
        self._state = self._in_call
        return True

    def _in_call(self) -> bool:
        assert self._reader is not None
        for position, character in enumerate(self._waiting):
            gained = self._reader.push(character)
            if gained.name is not None:
                self._pieces.append(CallStart(self._num_calls, gained.name))
            if gained.arguments:
                self._pieces.append(CallArguments(self._num_calls, gained.arguments))
            if gained.state is not ReadState.READING:
                self._leave_call(gained.state, position)
                return True
            self._raw.append(character)
        self._waiting = ""
        return False

    def _leave_call(self, state: ReadState, position: int) -> None:
        """The reader stopped at the waiting character `position`."""
        self._reader = None
        self._waiting = self._waiting[position + (state is ReadState.COMPLETE) :]
        if state is ReadState.TORN:
            self._is_torn = True
            self._state = self._in_torn_call
        elif state is ReadState.REFUSED:
            self._opening += "".join(self._raw)
            self._raw = []
            self._give_back()
        else:
            self._close_call(complete=True)

    def _in_torn_call(self) -> bool:
        """All that is left of a malformed call counts as its arguments: that is where somebody will look for it."""
        marker = self._torn_end()
        end = self._waiting.find(marker) if marker else -1
        if end < 0:
            held = overlap(self._waiting, marker)
            end = len(self._waiting) - held
            self._pass_torn(self._waiting[:end])
            self._waiting = self._waiting[end:]
            return False
        self._pass_torn(self._waiting[:end])
        self._waiting = self._waiting[end:]
        self._raw.append(marker)
        self._close_call(complete=False)
        return True

    def _pass_torn(self, text: str) -> None:
        self._raw.append(text)
        if text:
            self._pieces.append(CallArguments(self._num_calls, text))

    def _close_call(self, *, complete: bool) -> None:
        raw = "" if complete else self._opening + "".join(self._raw)
        self._pieces.append(CallEnd(self._num_calls, complete, raw))
        self._num_calls += 1
        self._opening, self._raw, self._reader, self._is_torn = "", [], None, False
        self._after_call = True
        self._state = self._after

    def _add_text(self, text: str) -> None:
        if text:
            self._pieces.append(Text(text))
            self._after_call = False
            self._anything_shown = True

    def _taken(self) -> list[Piece]:
        pieces, self._pieces = merged(self._pieces), []
        return pieces


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of `text` with which `marker` begins, the whole marker aside."""
    longest = min(len(text), len(marker) - 1)
    return next((length for length in range(longest, 0, -1) if text.endswith(marker[:length])), 0)
