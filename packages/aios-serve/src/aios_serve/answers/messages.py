"""Pieces of an answer as members of a message, whole or as they come."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import assert_never

from msgspec import UNSET

from aios_serve.openai_responses import (
    AssistantMessage,
    ChatDelta,
    FunctionCall,
    FunctionCallDelta,
    ToolCall,
    ToolCallDelta,
)
from aios_serve.tool_calls.pieces import CallArguments, CallEnd, CallStart, Piece, Reasoning, Text


def message_of(pieces: Sequence[Piece], new_id: Callable[[], str], *, was_cut: bool) -> AssistantMessage:
    """The whole message.

    `was_cut` says whether the answer reached its longest, see `settled`.
    """
    content: list[str] = []
    reasoning: list[str] = []
    calls: list[ToolCall] = []
    for piece in settled(pieces, was_cut=was_cut):
        match piece:
            case Text(text=text):
                content.append(text)
            case Reasoning(text=text):
                reasoning.append(text)
            case CallStart(name=name):
                calls.append(ToolCall(id=new_id(), function=FunctionCall(name=name, arguments="")))
            case CallArguments(text=text):
                calls[-1].function.arguments += text
            case CallEnd():
                pass
            case _:
                assert_never(piece)
    thoughts = "".join(reasoning) if reasoning else UNSET
    return AssistantMessage(
        content="".join(content) if content or not (calls or reasoning) else None,
        reasoning=thoughts,
        reasoning_content=thoughts,
        tool_calls=calls or UNSET,
    )


def settled(pieces: Sequence[Piece], *, was_cut: bool) -> list[Piece]:
    """The pieces of a whole answer, with calls that are not complete as the text that the model wrote.

    Nobody could run them. Unless the answer `was_cut` at its longest: then they stay calls, as far as they go, which is
    what OpenAI sends.
    """
    if was_cut:
        return list(pieces)
    raw = {piece.index: piece.raw for piece in pieces if isinstance(piece, CallEnd) and not piece.complete}
    result: list[Piece] = []
    for piece in pieces:
        if isinstance(piece, (Text, Reasoning)) or piece.index not in raw:
            result.append(piece)
        elif isinstance(piece, CallStart):
            result.append(Text(raw[piece.index]))
    return result


class ChatDeltas:
    """Deltas of one choice.

    Args:
        new_id: Makes ids for calls.
    """

    def __init__(self, new_id: Callable[[], str]) -> None:
        self._new_id = new_id

    def delta(self, pieces: Sequence[Piece]) -> ChatDelta:
        """Pieces as one delta; content is there, if empty, when nothing else is."""
        content: str = ""
        reasoning: str = ""
        calls: dict[int, ToolCallDelta] = {}
        for piece in pieces:
            match piece:
                case Text(text=text):
                    content += text
                case Reasoning(text=text):
                    reasoning += text
                case CallStart(index=index, name=name):
                    function = FunctionCallDelta(name=name, arguments="")
                    calls[index] = ToolCallDelta(index=index, id=self._new_id(), type="function", function=function)
                case CallArguments(index=index, text=text):
                    call = calls.setdefault(index, ToolCallDelta(index=index, function=FunctionCallDelta(arguments="")))
                    call.function.arguments += text
                case CallEnd():
                    pass
                case _:
                    assert_never(piece)
        return ChatDelta(
            content=content if content or not (reasoning or calls) else UNSET,
            reasoning=reasoning or UNSET,
            reasoning_content=reasoning or UNSET,
            tool_calls=list(calls.values()) or UNSET,
        )
