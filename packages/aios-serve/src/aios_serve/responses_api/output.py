"""The pieces of an answer as items of a response, with the events that say how they grow."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, assert_never

import msgspec

from aios_serve.responses_api.structs import (
    Event,
    FunctionCallItem,
    Item,
    MessageItem,
    OutputText,
    ReasoningItem,
    ReasoningText,
)
from aios_serve.tool_calls.pieces import CallArguments, CallEnd, CallStart, Piece, Reasoning, Text

if TYPE_CHECKING:
    from aios_serve.openai_responses import TokenLogprob


class EventWriter:
    """Numbers events and writes them as server-sent events, `event:` line included."""

    def __init__(self) -> None:
        self._num_events = 0

    def write(self, kind: str, **members: Any) -> bytes:
        """One event; its members are encoded now, since items grow."""
        event = Event(type=kind, sequence_number=self._num_events, **members)
        self._num_events += 1
        return b"event: " + kind.encode() + b"\ndata: " + msgspec.json.encode(event) + b"\n\n"


class ResponseOutput:
    """The output of one response as it grows: thoughts, text and calls in the order in which they come.

    Attributes:
        items: The items so far; the last one may be growing.

    Args:
        events: Writes the events.
        new_call_id: Makes ids for calls, which clients send back with the results.
    """

    def __init__(self, events: EventWriter, new_call_id: Callable[[], str]) -> None:
        self.items: list[Item] = []
        self._events = events
        self._new_call_id = new_call_id
        self._is_growing = False

    def add(self, pieces: Sequence[Piece], logprobs: Sequence[TokenLogprob] = ()) -> list[bytes]:
        """Take the next pieces; `logprobs` are those of the tokens of their text. Gives the events."""
        written: list[bytes] = []
        unused = list(logprobs)
        for piece in pieces:
            match piece:
                case Text(text=text):
                    written += self._add_text(text, unused)
                    unused = []
                case Reasoning(text=text):
                    written += self._add_reasoning(text)
                case CallStart(name=name):
                    written += self._open(_new_call(name, self._new_call_id()))
                case CallArguments(text=text):
                    written += self._add_arguments(text)
                case CallEnd(complete=complete):
                    written += self.close(status="completed" if complete else "incomplete")
                case _:
                    assert_never(piece)
        return written

    def close(self, *, status: str = "completed") -> list[bytes]:
        """End the item that grows, if one does."""
        if not self._is_growing:
            return []
        self._is_growing = False
        item = self.items[-1]
        item.status = status
        match item:
            case MessageItem(id=item_id, content=[part]):
                place = self._place(item_id)
                done = [
                    self._events.write("response.output_text.done", text=part.text, logprobs=part.logprobs, **place)
                ]
                done += [self._events.write("response.content_part.done", part=part, **place)]
            case ReasoningItem(id=item_id, content=[part]):
                place = self._place(item_id)
                done = [self._events.write("response.reasoning_text.done", text=part.text, **place)]
                done += [self._events.write("response.content_part.done", part=part, **place)]
            case FunctionCallItem(id=item_id, name=name, arguments=arguments):
                members = {"item_id": item_id, "output_index": len(self.items) - 1, "arguments": arguments}
                done = [self._events.write("response.function_call_arguments.done", name=name, **members)]
            case _:
                done = []
        return [*done, self._events.write("response.output_item.done", item=item, output_index=len(self.items) - 1)]

    def _add_text(self, text: str, logprobs: list[TokenLogprob]) -> list[bytes]:
        written: list[bytes] = []
        if not (self._is_growing and isinstance(self.items[-1], MessageItem)):
            written += self._open(MessageItem(id=_new_id("msg"), status="in_progress"), OutputText(text=""))
        item = self.items[-1]
        assert isinstance(item, MessageItem)
        item.content[0].text += text
        item.content[0].logprobs += logprobs
        place = self._place(item.id)
        return [*written, self._events.write("response.output_text.delta", delta=text, logprobs=logprobs, **place)]

    def _add_reasoning(self, text: str) -> list[bytes]:
        written: list[bytes] = []
        if not (self._is_growing and isinstance(self.items[-1], ReasoningItem)):
            written += self._open(ReasoningItem(id=_new_id("rs"), status="in_progress"), ReasoningText(text=""))
        item = self.items[-1]
        assert isinstance(item, ReasoningItem)
        item.content[0].text += text
        return [*written, self._events.write("response.reasoning_text.delta", delta=text, **self._place(item.id))]

    def _add_arguments(self, text: str) -> list[bytes]:
        item = self.items[-1]
        assert isinstance(item, FunctionCallItem)
        item.arguments += text
        members = {"item_id": item.id, "output_index": len(self.items) - 1, "delta": text}
        return [self._events.write("response.function_call_arguments.delta", **members)]

    def _open(self, item: Item, part: OutputText | ReasoningText | None = None) -> list[bytes]:
        """Begin an item, and end the one before it."""
        written = self.close()
        self.items.append(item)
        self._is_growing = True
        written.append(self._events.write("response.output_item.added", item=item, output_index=len(self.items) - 1))
        if part is not None and not isinstance(item, FunctionCallItem):
            written.append(self._events.write("response.content_part.added", part=part, **self._place(item.id)))
            item.content.append(part)  # type: ignore[arg-type]
        return written

    def _place(self, item_id: str) -> dict[str, Any]:
        return {"item_id": item_id, "output_index": len(self.items) - 1, "content_index": 0}


def _new_call(name: str, call_id: str) -> FunctionCallItem:
    return FunctionCallItem(id=_new_id("fc"), call_id=call_id, name=name, arguments="", status="in_progress")


def _new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"
