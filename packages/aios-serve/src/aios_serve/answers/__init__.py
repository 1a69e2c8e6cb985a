"""From the text of a choice to a message: thoughts, answer, calls.

- `AnswerPlan`: which parsers an answer goes through, decided once for a request.
- `ChoiceParser`: takes one choice apart as it comes.
- `message_of`, `ChatDeltas`: the parts as members of a message, and of a chunk.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from aios_serve.answers.choice_parser import ChoiceParser
    from aios_serve.answers.messages import ChatDeltas, message_of
    from aios_serve.answers.plan import AnswerPlan, plan_answer

__all__ = ["AnswerPlan", "ChatDeltas", "ChoiceParser", "message_of", "plan_answer"]

_HOMES = {
    "AnswerPlan": "plan",
    "ChatDeltas": "messages",
    "ChoiceParser": "choice_parser",
    "message_of": "messages",
    "plan_answer": "plan",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
