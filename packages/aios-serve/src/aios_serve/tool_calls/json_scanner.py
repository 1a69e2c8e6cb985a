"""JSON character by character: where values begin and end, long before the text is whole (RFC 8259)."""

from __future__ import annotations

import re
from enum import Enum, auto

WHITESPACE = " \t\n\r"
MAX_DEPTH = 512
"""Deeper nesting counts as broken: nobody could read it back."""

_NUMBER = re.compile(r"-?(0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?", re.ASCII)
_NUMBER_CHARACTERS = frozenset("0123456789+-.eE")
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_ESCAPES = frozenset('"\\/bfnrtu')


class Ended(Enum):
    """What ended with the character just read."""

    KEY = auto()
    STRING = auto()
    LITERAL = auto()
    CONTAINER = auto()


class _Expect(Enum):
    VALUE = auto()
    VALUE_OR_END = auto()
    KEY = auto()
    KEY_OR_END = auto()
    COLON = auto()
    COMMA_OR_END = auto()
    NOTHING = auto()


class JsonScanner:
    """Reads one JSON value that begins with the first character that is no whitespace.

    One liberty: raw control characters inside strings are let through, since models write line breaks there.

    Attributes:
        broken: No JSON value begins with what was read. What is read after that means nothing.
        string: The string that is being read or was read last, with its quotes and escapes.
    """

    def __init__(self) -> None:
        self.broken = False
        self.string = ""
        self._stack: list[str] = []
        self._expect = _Expect.VALUE
        self._in_string = False
        self._escape = ""
        self._word = ""  # of a literal or a number, as far as it was read

    @property
    def depth(self) -> int:
        """Containers that are open."""
        return len(self._stack)

    @property
    def done(self) -> bool:
        """Whether the value is whole. A number at the top ends with what follows it, so it never is."""
        return self._expect is _Expect.NOTHING and not self.broken

    @property
    def in_string(self) -> bool:
        """Whether the next character belongs to a string."""
        return self._in_string

    @property
    def at_value(self) -> bool:
        """Whether the next character that is no whitespace begins a value."""
        return self._expect in (_Expect.VALUE, _Expect.VALUE_OR_END) and not (self._in_string or self._word)

    def push(self, character: str) -> Ended | None:
        """Read one character."""
        if self.broken:
            return None
        if self._in_string:
            return self._push_string(character)
        if self._word:
            return self._push_word(character)
        if character in WHITESPACE:
            return None
        return self._push_structure(character)

    def _push_string(self, character: str) -> Ended | None:
        self.string += character
        if self._escape:
            return self._push_escape(character)
        if character == "\\":
            self._escape = "\\"
        elif character == '"':
            self._in_string = False
            if self._expect is _Expect.COLON:
                return Ended.KEY
            self._value_ended()
            return Ended.STRING
        return None

    def _push_escape(self, character: str) -> None:
        self._escape += character
        if len(self._escape) == 2:
            self.broken = character not in _ESCAPES
            self._escape = self._escape if character == "u" else ""
            return
        self.broken = character not in "0123456789abcdefABCDEF"
        if len(self._escape) == len("\\uXXXX"):
            self._escape = ""

    def _push_word(self, character: str) -> Ended | None:
        if self._word[0] in _LITERALS:
            return self._push_literal(character)
        if character in _NUMBER_CHARACTERS:
            self._word += character
            return None
        self.broken = _NUMBER.fullmatch(self._word) is None
        self._word = ""
        self._value_ended()
        return self.push(character)  # a number ends with what follows it

    def _push_literal(self, character: str) -> Ended | None:
        whole = _LITERALS[self._word[0]]
        self._word += character
        if not whole.startswith(self._word):
            self.broken = True
        elif self._word == whole:
            self._word = ""
            self._value_ended()
            return Ended.LITERAL
        return None

    def _push_structure(self, character: str) -> Ended | None:
        match self._expect, character:
            case ((_Expect.KEY | _Expect.KEY_OR_END), '"'):
                self._begin_string()
                self._expect = _Expect.COLON
            case _Expect.COLON, ":":
                self._expect = _Expect.VALUE
            case _Expect.COMMA_OR_END, ",":
                self._expect = _Expect.KEY if self._stack[-1] == "{" else _Expect.VALUE
            case ((_Expect.COMMA_OR_END | _Expect.KEY_OR_END), "}") if self._stack[-1] == "{":
                return self._close()
            case ((_Expect.COMMA_OR_END | _Expect.VALUE_OR_END), "]") if self._stack[-1] == "[":
                return self._close()
            case ((_Expect.VALUE | _Expect.VALUE_OR_END), _):
                self._begin_value(character)
            case _:
                self.broken = True
        return None

    def _begin_value(self, character: str) -> None:
        if character == '"':
            self._begin_string()
        elif character in "{[":
            self._stack.append(character)
            self._expect = _Expect.KEY_OR_END if character == "{" else _Expect.VALUE_OR_END
            self.broken = len(self._stack) > MAX_DEPTH
        elif character in _LITERALS or character in _NUMBER_CHARACTERS:
            self._word = character
        else:
            self.broken = True

    def _begin_string(self) -> None:
        self._in_string, self.string = True, '"'

    def _close(self) -> Ended:
        self._stack.pop()
        self._value_ended()
        return Ended.CONTAINER

    def _value_ended(self) -> None:
        self._expect = _Expect.COMMA_OR_END if self._stack else _Expect.NOTHING
