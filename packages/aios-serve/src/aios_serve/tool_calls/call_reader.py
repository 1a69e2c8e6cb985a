"""Reads one call, a JSON object with a name and arguments, and passes the arguments on while they come."""

from __future__ import annotations

import json
from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum, auto

from aios_serve.tool_calls.json_scanner import WHITESPACE, Ended, JsonScanner

ARGUMENT_KEYS = ("arguments", "parameters")
"""Llama 3 writes "parameters", the others "arguments"; models mix them up, so both are read everywhere."""


class ReadState(Enum):
    """How far a call has been read."""

    READING = auto()
    COMPLETE = auto()
    """The object is closed; the character belonged to it."""
    OVER = auto()
    """The arguments are whole, the object around them is not; the character does not belong to it."""
    REFUSED = auto()
    """This is no call, and nothing of it was passed on."""
    TORN = auto()
    """A call that was passed on in part turned out to be malformed."""


@dataclass(slots=True)
class Gained:
    """What a character brought.

    Attributes:
        state: How far the call has been read.
        name: Set once, when function and beginning of the arguments are known.
        arguments: Their next characters.
    """

    state: ReadState
    name: str | None = None
    arguments: str = ""


class CallReader:
    """Reads `{"name": …, "arguments": {…}}`, keys in any order.

    Nothing is passed on before it is certain that this is a call: the name is a string, and arguments have begun as an
    object. Arguments come as the model wrote them, but for line breaks inside strings, which become escapes. A string
    that holds the object (a habit of some models) is unpacked; no arguments are `{}`.

    Args:
        known_names: If given, an object with another name or with keys of its own is no call: for formats in which a
            call looks like any other JSON.
    """

    def __init__(self, known_names: Collection[str] | None = None) -> None:
        self._known_names = known_names
        self._scanner = JsonScanner()
        self._key: str | None = None
        self._name: str | None = None
        self._in_arguments = False
        self._waiting = ""  # arguments that came before the name
        self._is_passing = False
        self._has_arguments = False

    @property
    def is_torn(self) -> bool:
        """Whether arguments were passed on in part, should no more text come."""
        return self._is_passing and not self._has_arguments

    @property
    def is_whole(self) -> bool:
        """Whether everything of the call was passed on, should no more text come."""
        return self._is_passing and self._has_arguments

    def push(self, character: str) -> Gained:
        """Read one character, the first of which is `{`."""
        scanner = self._scanner
        begins_value = scanner.depth == 1 and scanner.at_value and character not in WHITESPACE
        escaped = json.dumps(character)[1:-1] if scanner.in_string and character < " " else character
        ended = scanner.push(character)
        if scanner.broken:
            return Gained(self._failed())
        if begins_value and not self._begins_well(character):
            return Gained(ReadState.REFUSED)
        gained = Gained(ReadState.READING)
        if self._in_arguments:
            self._take_arguments(escaped, gained)
        if ended is not None and scanner.depth <= 1 and not self._end(ended, gained):
            return Gained(ReadState.REFUSED)
        if scanner.done:
            gained.state = self._closed(gained)
        return gained

    def _failed(self) -> ReadState:
        if not self._is_passing:
            return ReadState.REFUSED
        return ReadState.OVER if self._has_arguments else ReadState.TORN

    def _begins_well(self, character: str) -> bool:
        """Look at the first character of a value of the object; False if this cannot be a call."""
        if self._key == "name" and self._name is None:
            return character == '"'
        if self._key in ARGUMENT_KEYS and not self._has_arguments and not self._in_arguments:
            self._in_arguments = character == "{"
            return character in '{"n'
        return self._is_passing or self._known_names is None or self._key in ("id", "type")

    def _take_arguments(self, text: str, gained: Gained) -> None:
        if self._name is None:
            self._waiting += text
            return
        self._begin_passing(gained)
        gained.arguments += text

    def _begin_passing(self, gained: Gained) -> None:
        if not self._is_passing:
            self._is_passing = True
            gained.name, gained.arguments = self._name, self._waiting
            self._waiting = ""

    def _end(self, ended: Ended, gained: Gained) -> bool:
        """A key or a value of the object has ended; False if this cannot be a call."""
        if ended is Ended.KEY:
            self._key = _decoded(self._scanner.string)
            return True
        if self._scanner.depth == 0:
            return True
        if self._in_arguments:
            self._in_arguments, self._has_arguments = False, True
        elif self._key == "name" and self._name is None:
            return self._end_name(gained)
        elif self._key in ARGUMENT_KEYS and not self._has_arguments:
            return self._end_odd_arguments(ended, gained)
        return True

    def _end_name(self, gained: Gained) -> bool:
        name = _decoded(self._scanner.string)
        if not name or not _is_text(name) or (self._known_names is not None and name not in self._known_names):
            return False
        self._name = name
        if self._has_arguments:
            self._begin_passing(gained)
        return True

    def _end_odd_arguments(self, ended: Ended, gained: Gained) -> bool:
        """Arguments that are a string or null."""
        text = "{}" if ended is Ended.LITERAL else (_decoded(self._scanner.string) or "{}")
        if not _is_text(text) or not _is_object(text):
            return False
        self._has_arguments = True
        self._take_arguments(text, gained)
        return True

    def _closed(self, gained: Gained) -> ReadState:
        if self._name is None:
            return ReadState.REFUSED
        if not self._has_arguments:
            self._has_arguments = True
            self._take_arguments("{}", gained)
        return ReadState.COMPLETE


class ArgumentsReader:
    """Reads arguments alone, for formats that write the name before them."""

    def __init__(self, name: str) -> None:
        self._scanner = JsonScanner()
        self._name: str | None = name
        self.is_torn = False
        self.is_whole = False

    def push(self, character: str) -> Gained:
        """Read one character, the first of which is `{`."""
        escaped = json.dumps(character)[1:-1] if self._scanner.in_string and character < " " else character
        self._scanner.push(character)
        if self._scanner.broken:
            return Gained(ReadState.TORN)
        self.is_whole = self._scanner.done
        self.is_torn = not self.is_whole
        name, self._name = self._name, None
        return Gained(ReadState.COMPLETE if self.is_whole else ReadState.READING, name, escaped)


def _decoded(string: str) -> str:
    return json.loads(string, strict=False)


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def _is_text(string: str) -> bool:
    """Whether it can be sent: an escape may stand for half a character."""
    try:
        string.encode()
    except UnicodeEncodeError:
        return False
    return True
