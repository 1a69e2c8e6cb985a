"""Parsers for answers that a grammar holds to calls: nothing but JSON, in whatever format the model was trained on."""

from __future__ import annotations

from aios_serve.tool_calls.call_reader import ArgumentsReader
from aios_serve.tool_calls.mistral import MistralParser
from aios_serve.tool_calls.parser import ToolCallParser


class RequiredCallsParser(MistralParser):
    """Reads what `constraint.forced_calls_schema` admits for `tool_choice: "required"`: a list of calls."""

    def __init__(self) -> None:
        super().__init__()
        self._state = self._before_calls


class NamedCallParser(ToolCallParser):
    """Reads what it admits for a named function: the arguments of one call.

    Args:
        name: The function.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._state = self._before_arguments

    def _before_arguments(self) -> bool:
        character = self._open_space()
        if not character:
            return False
        return self._begin_call(ArgumentsReader(self._name)) if character == "{" else self._give_back()

    def _in_text(self) -> bool:
        self._show(len(self._waiting))
        return False

    def _after(self) -> bool:
        self._state = self._in_text
        return True
