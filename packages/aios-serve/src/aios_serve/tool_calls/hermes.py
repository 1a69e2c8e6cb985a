"""The format of Hermes, Qwen 2.5 and Qwen 3: `<tool_call>{"name": …, "arguments": {…}}</tool_call>`."""

from __future__ import annotations

from aios_serve.tool_calls.call_reader import CallReader
from aios_serve.tool_calls.parser import ToolCallParser

START, END = "<tool_call>", "</tool_call>"


class HermesParser(ToolCallParser):
    """A block for each call. Several objects in one block, and a block that is never closed, are read as well."""

    def __init__(self) -> None:
        super().__init__()
        self._in_block = False

    def _in_text(self) -> bool:
        marker = self._seek(START, END) if self._in_block else self._seek(START)
        if marker is None:
            return False
        self._in_block = marker == START
        if marker == START:
            self._state = self._before_call
        else:
            self._opening = ""  # the end of a block whose call was followed by something else
        return True

    def _before_call(self) -> bool:
        character = self._open_space()
        if not character:
            return False
        if character == "{":
            return self._begin_call(CallReader())
        return self._give_back()

    def _give_back(self) -> bool:
        self._in_block = False  # the marker is text, so that of the end will be, too
        return super()._give_back()

    def _after(self) -> bool:
        behind = self._waiting.lstrip()
        if behind.startswith(END):
            self._waiting = behind[len(END) :]
            self._in_block = False
            self._state = self._in_text
        elif behind.startswith("{"):
            self._open_space()
            return self._begin_call(CallReader())
        elif END.startswith(behind):
            return False
        else:
            self._state = self._in_text
        return True

    def _is_padding(self, rest: str) -> bool:
        return END.startswith(rest.strip()) if self._in_block else not rest.strip()

    def _torn_end(self) -> str:
        return END
