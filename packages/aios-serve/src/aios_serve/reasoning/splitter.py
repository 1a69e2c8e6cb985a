"""Takes an answer apart into what the model thought and what it says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from aios_serve.tool_calls.parser import overlap
from aios_serve.tool_calls.pieces import Piece, Reasoning, Text, merged


@dataclass(frozen=True, slots=True)
class ThinkMarkers:
    """What stands around thoughts."""

    start: str = "<think>"
    end: str = "</think>"


class _State(Enum):
    BEFORE = auto()  # nothing but white space so far
    OPENED = auto()  # white space before the thoughts
    THINKING = auto()
    BEHIND = auto()  # white space behind the thoughts
    ANSWERING = auto()


class ReasoningSplitter:
    """Splits the text of one answer as it comes; the pieces depend on the text alone, never on how it was cut.

    Thoughts come first and once: markers in the answer itself are text. White space around both parts is dropped where
    there are thoughts. Thoughts that are never closed go to the end.

    Args:
        markers: What stands around thoughts.
        is_open: Whether they are open when the answer begins: the prompt ended inside of them, or the model leaves the
            first marker out. A first marker that comes nevertheless is dropped.
    """

    def __init__(self, markers: ThinkMarkers, *, is_open: bool) -> None:
        self._markers = markers
        self._is_open = is_open
        self._state = _State.BEFORE
        self._waiting = ""

    def push(self, text: str) -> list[Piece]:
        """Take more text; gives what is certain of it now."""
        if self._state is _State.ANSWERING:
            return [Text(text)] if text else []
        self._waiting += text
        pieces: list[Piece] = []
        while self._step(pieces):
            pass
        return merged(pieces)

    def finish(self) -> list[Piece]:
        """The text has ended: gives what was held back."""
        rest, self._waiting = self._waiting, ""
        match self._state:
            case _State.BEFORE if not self._is_open:
                return merged([Text(rest)])
            case _State.BEFORE | _State.THINKING:
                return merged([Reasoning(rest.strip() if self._state is _State.BEFORE else rest.rstrip())])
            case _:
                return []

    def _step(self, pieces: list[Piece]) -> bool:
        """Take what is certain of the waiting text; False if that needs more text."""
        match self._state:
            case _State.BEFORE:
                return self._begin()
            case _State.THINKING:
                return self._think(pieces)
            case _State.OPENED:
                return self._skip_space(_State.THINKING)
            case _State.BEHIND:
                return self._skip_space(_State.ANSWERING)
            case _State.ANSWERING:
                pieces.append(Text(self._waiting))
                self._waiting = ""
                return False

    def _begin(self) -> bool:
        begun = self._waiting.lstrip()
        if not begun or (len(begun) < len(self._markers.start) and self._markers.start.startswith(begun)):
            return False
        if begun.startswith(self._markers.start):
            self._waiting = begun[len(self._markers.start) :]
            self._state = _State.OPENED
        else:
            self._state = _State.OPENED if self._is_open else _State.ANSWERING
        return True

    def _skip_space(self, following: _State) -> bool:
        self._waiting = self._waiting.lstrip()
        if not self._waiting:
            return False
        self._state = following
        return True

    def _think(self, pieces: list[Piece]) -> bool:
        marker = self._markers.end
        end = self._waiting.find(marker)
        sure = end if end >= 0 else len(self._waiting) - overlap(self._waiting, marker)
        sure = len(self._waiting[:sure].rstrip())
        pieces.append(Reasoning(self._waiting[:sure]))
        self._waiting = self._waiting[sure:]
        if end < 0:
            return False
        self._waiting = self._waiting.lstrip()[len(marker) :]
        self._state = _State.BEHIND
        return True
