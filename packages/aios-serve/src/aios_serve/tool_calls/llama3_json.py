"""The format of Llama 3: `<|python_tag|>{"name": …, "parameters": {…}}`, or the object alone; `;` between calls."""

from __future__ import annotations

import re
from collections.abc import Collection

from aios_serve.tool_calls.call_reader import CallReader
from aios_serve.tool_calls.parser import ToolCallParser

TAG = "<|python_tag|>"

_LINE_WITH_OBJECT = re.compile(r"\n\s*\{")
_SEPARATOR = re.compile(r"\s*;?\s*")


class Llama3JsonParser(ToolCallParser):
    """Behind the tag any object with a name is a call, elsewhere only one at the beginning of a line that names a tool.

    Args:
        names: The tools of the request.
    """

    def __init__(self, names: Collection[str]) -> None:
        super().__init__()
        self._names = frozenset(names)

    def _in_text(self) -> bool:
        tag, bare = self._waiting.find(TAG), self._find_object()
        if bare >= 0 and not 0 <= tag < bare:
            self._show(bare)
            self._open_space()
            return self._begin_call(CallReader(self._names))
        if self._seek(TAG) is None:
            return False
        self._state = self._before_tagged_call
        return True

    def _find_object(self) -> int:
        """Where a line begins with an object, -1 if none does."""
        behind = self._waiting.lstrip()
        if behind.startswith("{") and (self._after_call or not self._anything_shown):
            return len(self._waiting) - len(behind)
        found = _LINE_WITH_OBJECT.search(self._waiting)
        return -1 if found is None else found.end() - 1

    def _before_tagged_call(self) -> bool:
        character = self._open_space()
        if not character:
            return False
        return self._begin_call(CallReader()) if character == "{" else self._give_back()

    def _after(self) -> bool:
        separator = _SEPARATOR.match(self._waiting)
        assert separator is not None
        behind = self._waiting[separator.end() :]
        if TAG.startswith(behind):
            return False
        if behind.startswith("{"):
            self._open(separator.end())
            return self._begin_call(CallReader(self._names))
        if behind.startswith(TAG):
            self._waiting = behind
        self._state = self._in_text
        return True

    def _is_padding(self, rest: str) -> bool:
        return not rest.strip("; \t\r\n")
