"""Calls of functions: what clients may ask for, and how calls are found in what a model writes.

- `tools`: the tools and the tool choice of a request, checked.
- `ToolCallParser`: takes an answer apart as it comes; one subclass per format: `hermes`, `llama3_json`, `mistral`, and
  `forced` for answers that a grammar holds to calls (`constraint`).
- `pieces`: what they give.
- `call_reader`, `json_scanner`: one call, character by character.
- `registry`: parsers by name, and the one that a chat template asks for.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_serve.tool_calls.parser import ToolCallParser
    from aios_serve.tool_calls.pieces import CallArguments, CallEnd, CallStart, Piece, Reasoning, Text
    from aios_serve.tool_calls.registry import TOOL_CALL_PARSERS, detect_tool_call_parser, make_tool_call_parser

__all__ = [
    "TOOL_CALL_PARSERS",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "Piece",
    "Reasoning",
    "Text",
    "ToolCallParser",
    "detect_tool_call_parser",
    "make_tool_call_parser",
]

_HOMES = {
    "TOOL_CALL_PARSERS": "registry",
    "CallArguments": "pieces",
    "CallEnd": "pieces",
    "CallStart": "pieces",
    "Piece": "pieces",
    "Reasoning": "pieces",
    "Text": "pieces",
    "ToolCallParser": "parser",
    "detect_tool_call_parser": "registry",
    "make_tool_call_parser": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
