"""Body of `POST /v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from aios_serve.openai_types import ApiModel, Int64
from aios_serve.refusals import Refusal

MAX_ITEMS = 4096

_STATELESS = "this server keeps no responses; send the whole conversation as input"
_TEXT_ONLY = "this server reads and writes text only"

RESPONSES: dict[str, Refusal] = {
    "store": Refusal(_STATELESS + ", with store: false or without it", (False,)),
    "previous_response_id": Refusal(_STATELESS),
    "conversation": Refusal(_STATELESS),
    "prompt": Refusal("prompts are not stored here; send instructions and input"),
    "background": Refusal("an answer is not kept until it is asked for; use stream: true", (False,)),
    "truncation": Refusal("input is never cut silently; shorten it", ("disabled",)),
    "max_tool_calls": Refusal("it counts calls of built-in tools, and there are none here"),
    "modalities": Refusal(_TEXT_ONLY, (["text"],)),
    "context_management": Refusal("input is never rewritten; shorten it", ([],)),
    "stop": Refusal("responses know no stop strings; use /v1/chat/completions"),
    "n": Refusal("a response has one answer; use /v1/chat/completions", (1,)),
}
"""What `/v1/responses` knows and cannot honour. `store` is refused only if asked for, though OpenAI's default is true:
clients that never read a response back lose nothing."""

INCLUDABLE = ("message.output_text.logprobs", "reasoning.encrypted_content")


class Reasoning(ApiModel):
    """How to think. Efforts and summaries are for models of OpenAI's; templates take `chat_template_kwargs`."""

    effort: str | None = None
    summary: str | None = None
    generate_summary: str | None = None


class TextOptions(ApiModel):
    """The form of the answer."""

    format: dict[str, Any] | None = None
    verbosity: str | None = None


class ResponsesRequest(ApiModel):
    """What a client asks of `/v1/responses`; items of `input` and tools are checked in `to_chat.py`."""

    model: str | None = None
    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
    instructions: str | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    text: TextOptions | None = None
    reasoning: Reasoning | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    max_output_tokens: int | None = None
    stream: bool | None = None
    include: list[str] | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    user: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    # vLLM's additions, as in chat completions.
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    priority: Int64 | None = None
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None
    deadline: float | None = None

    @field_validator("include")
    @classmethod
    def _known(cls, value: list[str] | None) -> list[str] | None:
        for name in value or []:
            if name not in INCLUDABLE:
                raise ValueError(f"{name[:80]!r} cannot be included; known: {', '.join(INCLUDABLE)}")
        return value

    @property
    def wants_logprobs(self) -> bool:
        """Whether log-probabilities are to be sent."""
        return bool(self.top_logprobs) or "message.output_text.logprobs" in (self.include or [])
