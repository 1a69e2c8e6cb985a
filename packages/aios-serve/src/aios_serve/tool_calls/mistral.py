"""The formats of Mistral: `[TOOL_CALLS][{"name": …, "arguments": {…}}, …]`, and later `[TOOL_CALLS]name[ARGS]{…}`."""

from __future__ import annotations

import re

from aios_serve.tool_calls.call_reader import ArgumentsReader, CallReader
from aios_serve.tool_calls.parser import ToolCallParser

MARKER = "[TOOL_CALLS]"
LONGEST_HEAD = 256
"""Characters between the marker and the arguments beyond which no name can be meant."""

_HEAD = re.compile(r"([\w.:/-]+)\s*(?:\[CALL_ID\]\s*[\w-]+\s*)?(?:\[ARGS\]\s*)?", re.ASCII)


class MistralParser(ToolCallParser):
    """Reads a list of calls, a single one, or a name with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self._in_list = False

    def _in_text(self) -> bool:
        if self._seek(MARKER) is None:
            return False
        self._state = self._before_calls
        return True

    def _before_calls(self) -> bool:
        character = self._open_space()
        self._in_list = character == "["
        if self._in_list:
            self._open(1)
            self._state = self._before_item
            return True
        if character == "{":
            return self._begin_call(CallReader())
        return self._read_head()

    def _read_head(self) -> bool:
        """The name of a call whose arguments alone are JSON."""
        end = self._waiting.find("{", 0, LONGEST_HEAD)
        if end < 0:
            return len(self._waiting) >= LONGEST_HEAD and self._give_back()
        head = _HEAD.fullmatch(self._waiting, 0, end)
        if head is None:
            return self._give_back()
        self._open(end)
        return self._begin_call(ArgumentsReader(head[1]))

    def _before_item(self) -> bool:
        character = self._open_space()
        if not character:
            return False
        return self._begin_call(CallReader()) if character == "{" else self._give_back()

    def _after(self) -> bool:
        behind = self._waiting.lstrip()
        if not behind:
            return False
        self._state = self._in_text
        if self._in_list and behind[0] == ",":
            self._open_space()
            self._open(1)
            self._state = self._before_item
        elif self._in_list and behind[0] == "]":
            self._waiting = behind[1:]
            self._in_list = False
        return True

    def _is_padding(self, rest: str) -> bool:
        return not rest.strip(", \t\r\n" if self._in_list else None)
