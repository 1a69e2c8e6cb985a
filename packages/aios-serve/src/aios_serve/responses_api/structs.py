"""What `/v1/responses` sends: responses, the items of their output, and the events of a stream."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, UnsetType, field

from aios_serve.openai_responses import TokenLogprob


class InputDetails(Struct, kw_only=True):
    """How much of the input came from the prefix cache."""

    cached_tokens: int
    cache_write_tokens: int = 0


class OutputDetails(Struct, kw_only=True):
    """How much of the output were thoughts."""

    reasoning_tokens: int


class ResponseUsage(Struct, kw_only=True):
    """Tokens read and written."""

    input_tokens: int
    input_tokens_details: InputDetails
    output_tokens: int
    output_tokens_details: OutputDetails
    total_tokens: int


class OutputText(Struct, kw_only=True, tag_field="type", tag="output_text"):
    """A part of a message."""

    text: str
    annotations: list[Any] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)


class ReasoningText(Struct, kw_only=True, tag_field="type", tag="reasoning_text"):
    """A part of an item of thoughts."""

    text: str


class MessageItem(Struct, kw_only=True, tag_field="type", tag="message"):
    """Text for the user."""

    id: str
    status: str
    role: str = "assistant"
    content: list[OutputText] = field(default_factory=list)


class ReasoningItem(Struct, kw_only=True, tag_field="type", tag="reasoning"):
    """Thoughts, in full: there is nothing to hide, so no summary."""

    id: str
    status: str
    summary: list[Any] = field(default_factory=list)
    content: list[ReasoningText] = field(default_factory=list)


class FunctionCallItem(Struct, kw_only=True, tag_field="type", tag="function_call"):
    """A call that the model wants made."""

    id: str
    call_id: str
    name: str
    arguments: str
    status: str


Item = MessageItem | ReasoningItem | FunctionCallItem


class IncompleteDetails(Struct, kw_only=True):
    """Why a response ended early."""

    reason: str


class ResponseError(Struct, kw_only=True):
    """Why a response failed."""

    code: str
    message: str


class Response(Struct, kw_only=True):
    """A response; of the request it repeats what OpenAI's clients look at."""

    id: str
    object: str = "response"
    created_at: int
    completed_at: int | None = None
    status: str
    error: ResponseError | None = None
    incomplete_details: IncompleteDetails | None = None
    model: str
    output: list[Item] = field(default_factory=list)
    usage: ResponseUsage | None = None
    instructions: str | None
    metadata: dict[str, str]
    parallel_tool_calls: bool
    temperature: float
    top_p: float
    max_output_tokens: int | None
    tool_choice: Any
    tools: list[dict[str, Any]]
    text: dict[str, Any]
    reasoning: dict[str, Any]
    store: bool = False
    background: bool = False
    previous_response_id: None = None
    truncation: str = "disabled"
    user: str | None = None


class Event(Struct, kw_only=True):
    """One event of a stream; `type` names it, and says which of the members it has."""

    type: str
    sequence_number: int
    response: Response | UnsetType = UNSET
    output_index: int | UnsetType = UNSET
    content_index: int | UnsetType = UNSET
    item_id: str | UnsetType = UNSET
    item: Item | UnsetType = UNSET
    part: OutputText | ReasoningText | UnsetType = UNSET
    delta: str | UnsetType = UNSET
    text: str | UnsetType = UNSET
    name: str | UnsetType = UNSET
    arguments: str | UnsetType = UNSET
    logprobs: list[TokenLogprob] | UnsetType = UNSET
