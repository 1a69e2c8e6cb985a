"""What clients get back: answers and stream chunks in the shapes of OpenAI's API, with vLLM's additions.

These are msgspec structs, not pydantic models: nothing has to be validated on the way out, and a chunk is encoded for
every token. `UNSET` members are left out of the JSON; `None` is `null`.
"""

from __future__ import annotations

from typing import Literal

from msgspec import UNSET, Struct, UnsetType


class PromptTokensDetails(Struct, kw_only=True):
    """How much of the prompt came from the prefix cache."""

    cached_tokens: int


class CompletionTokensDetails(Struct, kw_only=True):
    """What part of the answer nobody asked to see."""

    reasoning_tokens: int


class Usage(Struct, kw_only=True):
    """Tokens read and written. Prompts count once, however many choices were drawn from them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails | UnsetType = UNSET


# --- completions ---


class CompletionLogprobs(Struct, kw_only=True):
    """Four lists with one entry per token; `text_offset` counts characters from the start of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(Struct, kw_only=True):
    """One choice, whole or the piece of it in a chunk."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class Completion(Struct, kw_only=True):
    """Answer of `/v1/completions`, and each chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType = UNSET


# --- chat completions ---


class TopLogprob(Struct, kw_only=True):
    """One likely token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob, kw_only=True):
    """The chosen token and the likeliest ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, kw_only=True):
    """Log-probabilities of the tokens of a choice."""

    content: list[TokenLogprob]


class FunctionCall(Struct, kw_only=True):
    """A function and its arguments: JSON, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(Struct, kw_only=True):
    """A call that the model wants made."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class AssistantMessage(Struct, kw_only=True):
    """The whole answer of one choice.

    Thoughts go by two names: vLLM's `reasoning`, and `reasoning_content`, which it had before and many clients read.
    """

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCall] | UnsetType = UNSET


class ChatChoice(Struct, kw_only=True):
    """One choice of a chat completion."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatCompletion(Struct, kw_only=True):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionCallDelta(Struct, kw_only=True):
    """The name in the first delta of a call, and the next characters of the arguments."""

    name: str | UnsetType = UNSET
    arguments: str


class ToolCallDelta(Struct, kw_only=True):
    """The piece of a call in a chunk; id, type and name come once."""

    index: int
    id: str | UnsetType = UNSET
    type: Literal["function"] | UnsetType = UNSET
    function: FunctionCallDelta


class ChatDelta(Struct, kw_only=True):
    """The piece of a message in a chunk: the role in the first chunk of a choice, text and calls in the others."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET
    reasoning: str | UnsetType = UNSET
    reasoning_content: str | UnsetType = UNSET
    tool_calls: list[ToolCallDelta] | UnsetType = UNSET


class ChatChunkChoice(Struct, kw_only=True):
    """The piece of one choice in a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatCompletionChunk(Struct, kw_only=True):
    """One event of a streamed chat completion."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | UnsetType = UNSET


# --- the rest ---


class ModelCard(Struct, kw_only=True):
    """One entry of `/v1/models`."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "aios"
    root: str
    parent: None = None
    max_model_len: int


class ModelList(Struct, kw_only=True):
    """Answer of `/v1/models`."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(Struct, kw_only=True):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(Struct, kw_only=True):
    """Answer of `/detokenize`."""

    prompt: str


class ErrorBody(Struct, kw_only=True):
    """What went wrong: the one shape of every error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorReply(Struct, kw_only=True):
    """Body of every answer with a status of 400 or more, and of an error inside a stream."""

    error: ErrorBody
