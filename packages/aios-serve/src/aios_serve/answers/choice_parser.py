"""Takes one choice apart as it comes: thoughts first, then text and calls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from aios_serve.reasoning.splitter import ReasoningSplitter
from aios_serve.reasoning.token_counter import ReasoningTokenCounter
from aios_serve.tool_calls.forced import NamedCallParser, RequiredCallsParser
from aios_serve.tool_calls.pieces import CallEnd, Piece, Reasoning, Text, merged
from aios_serve.tool_calls.registry import make_tool_call_parser

if TYPE_CHECKING:
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_serve.answers.plan import AnswerPlan
    from aios_serve.tool_calls.parser import ToolCallParser


class ChoiceParser:
    """One choice of an answer, by the plan for all of them.

    Attributes:
        has_called: Whether a call is complete.
    """

    def __init__(self, plan: AnswerPlan, tokenizer: Tokenizer) -> None:
        self.has_called = False
        self._plan = plan
        self._calls = _tool_call_parser(plan)
        self._splitter = self._counter = None
        if plan.reasoning is not None:
            markers, is_open = plan.reasoning.markers, plan.reasoning_is_open
            self._splitter = ReasoningSplitter(markers, is_open=is_open)
            self._counter = ReasoningTokenCounter(markers, tokenizer.token_bytes, is_open=is_open)

    @property
    def num_reasoning_tokens(self) -> int:
        """Tokens of thoughts so far."""
        return 0 if self._counter is None else self._counter.num_tokens

    def push(self, text: str, token_ids: Sequence[int]) -> list[Piece]:
        """Take what the choice gained; gives the pieces that are certain now. Calls of parsers are bounded by text."""
        if self._counter is not None:
            self._counter.push(token_ids)
        if self._splitter is None:
            return self._admitted(self._parsed(text))
        return self._admitted([part for piece in self._splitter.push(text) for part in self._inner(piece)])

    def finish(self) -> list[Piece]:
        """The choice has ended: gives what was held back."""
        rest = [] if self._splitter is None else self._splitter.finish()
        pieces = [part for piece in rest for part in self._inner(piece)]
        if self._calls is not None:
            pieces += self._calls.finish()
        return self._admitted(pieces)

    def finish_reason(self, reason: str | None) -> str | None:
        """What clients are told for the engine's `reason`: "tool_calls" where it stopped after a call."""
        return "tool_calls" if reason == "stop" and self.has_called else reason

    def _inner(self, piece: Piece) -> list[Piece]:
        return self._parsed(piece.text) if isinstance(piece, Text) else [piece]

    def _parsed(self, text: str) -> list[Piece]:
        return [Text(text)] if self._calls is None else self._calls.push(text)

    def _admitted(self, pieces: list[Piece]) -> list[Piece]:
        """What the request wants to see of it."""
        admitted = [piece for piece in merged(pieces) if self._is_wanted(piece)]
        self.has_called |= any(isinstance(piece, CallEnd) and piece.complete for piece in admitted)
        return admitted

    def _is_wanted(self, piece: Piece) -> bool:
        if isinstance(piece, Reasoning):
            return self._plan.include_reasoning
        return isinstance(piece, Text) or self._plan.parallel or piece.index == 0


def _tool_call_parser(plan: AnswerPlan) -> ToolCallParser | None:
    match plan.choice.mode:
        case "auto" if plan.tool_call_parser is not None:
            return make_tool_call_parser(plan.tool_call_parser, plan.tool_names)
        case "required":
            return RequiredCallsParser()
        case "named":
            return NamedCallParser(plan.choice.name or "")
        case _:
            return None
