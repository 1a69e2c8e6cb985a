"""What a model thinks before it answers, kept apart from the answer.

- `ReasoningSplitter`: takes the text apart as it comes.
- `ReasoningTokenCounter`: what the thoughts cost.
- `registry`: how a model marks them, by name or by its chat template.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_serve.reasoning.registry import REASONING_PARSERS, detect_reasoning_parser, reasoning_format
    from aios_serve.reasoning.splitter import ReasoningSplitter, ThinkMarkers
    from aios_serve.reasoning.token_counter import ReasoningTokenCounter

__all__ = [
    "REASONING_PARSERS",
    "ReasoningSplitter",
    "ReasoningTokenCounter",
    "ThinkMarkers",
    "detect_reasoning_parser",
    "reasoning_format",
]

_HOMES = {
    "REASONING_PARSERS": "registry",
    "ReasoningSplitter": "splitter",
    "ReasoningTokenCounter": "token_counter",
    "ThinkMarkers": "splitter",
    "detect_reasoning_parser": "registry",
    "reasoning_format": "registry",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
