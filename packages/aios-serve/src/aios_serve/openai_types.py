"""What clients send: the request bodies of OpenAI's API with vLLM's extensions, checked field by field.

Types are strict (`"5"` is no integer, `true` is no number), `null` means "not given", and a field nobody knows is
accepted. A field that is known but cannot be honoured is refused by name in `refusals.py`, before these models see the
body. What a request becomes for the engine is decided in `sampling_request.py`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
    model_validator,
)

from aios_serve.tool_calls.tools import ToolChoice, check_tool_calls, check_tools, read_tool_choice

MAX_PROMPTS = 1024
"""Most prompts of one completion request: each is a request to the engine, so a million is an attack or an accident."""

Int64 = Annotated[int, Field(ge=-(2**63), le=2**63 - 1)]
# Failing fast: a list of a million wrong items is one error, not a million.
TokenIds = Annotated[list[int], Field(fail_fast=True)]
Words = Annotated[list[str], Field(fail_fast=True)]
# Checked by hand: templates are given tools as they came, and what is wrong is said with the tool's number.
Tools = Annotated[
    list[dict[str, Any]] | None,
    WithJsonSchema(
        {
            "type": "array",
            "items": {
                "type": "object",
                "properties": {
                    "type": {"const": "function"},
                    "function": {
                        "type": "object",
                        "properties": {
                            "name": {"type": "string"},
                            "description": {"type": "string"},
                            "parameters": {"type": "object", "description": "JSON schema of the arguments"},
                        },
                        "required": ["name"],
                    },
                },
                "required": ["type", "function"],
            },
        }
    ),
]


class ApiModel(BaseModel):
    """Base of every request body: strict about types, lenient about fields it does not know."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, frozen=True)


class StreamOptions(ApiModel):
    """What a stream carries besides the text."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class JsonSchemaFormat(ApiModel):
    """The schema of a `response_format`; `strict` changes nothing, for the schema is always kept to."""

    name: Annotated[str, Field(min_length=1, max_length=64, pattern="^[a-zA-Z0-9_-]+$")]
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class ResponseFormat(ApiModel):
    """What the output must look like, in OpenAI's words."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    @model_validator(mode="after")
    def _schema_where_it_belongs(self) -> ResponseFormat:
        if self.type == "json_schema" and (self.json_schema is None or self.json_schema.schema_ is None):
            raise ValueError("type json_schema needs json_schema: {name, schema}")
        if self.type != "json_schema" and self.json_schema is not None:
            raise ValueError(f"json_schema is given together with type {self.type}; write type: json_schema")
        return self


_UNKNOWN_CONSTRAINTS = {
    "structural_tag": "structural tags are not supported; write a grammar",
    "whitespace_pattern": "one space may follow a comma or a colon, and none is allowed elsewhere",
    "disable_additional_properties": 'write "additionalProperties": false into the schema',
}


class StructuredOutputs(ApiModel):
    """What the output must look like, in vLLM's words. Checked where it is defined: in `StructuredOutputsParams`."""

    json_: Annotated[dict[str, Any] | str | None, Field(alias="json")] = None
    regex: str | None = None
    choice: Words | None = None
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _nothing_ignored(cls, value: object) -> object:
        for name, reason in _UNKNOWN_CONSTRAINTS.items():
            if isinstance(value, dict) and value.get(name) not in (None, False):
                raise ValueError(f"{name} cannot be honoured: {reason}")
        return value


def _stop_list(value: object) -> object:
    """One stop string becomes a list of one."""
    return [value] if isinstance(value, str) else value


class SamplingFields(ApiModel):
    """What completions and chat completions have in common: how to sample, when to stop, what to return.

    Ranges are checked where they are defined: in `SamplingParams`, which these become.
    """

    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    stop: Annotated[Words | None, BeforeValidator(_stop_list)] = None
    stop_token_ids: TokenIds | None = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    logit_bias: Any = None  # a mapping; SamplingParams looks at its size before it looks inside
    allowed_token_ids: TokenIds | None = None
    bad_words: Words | None = None
    skip_special_tokens: bool | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Int64 | None = None
    timeout: Annotated[float, Field(gt=0)] | None = None  # seconds
    deadline: float | None = None  # seconds of Unix time
    cache_salt: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=2**31 - 1)] | None = None
    add_special_tokens: bool | None = None
    user: str | None = None
    prompt_cache_key: str | None = None

    @model_validator(mode="after")
    def _stream_options_need_stream(self) -> SamplingFields:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options can be given only together with stream: true")
        return self

    def most_prompt_tokens(self, max_model_len: int) -> int | None:
        """Longest prompt worth tokenizing: the context, or anything if the request wants the prompt cut to fit."""
        return max_model_len if self.truncate_prompt_tokens is None else None

    @property
    def wants_usage(self) -> bool:
        """Whether the stream ends with a chunk of usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_continuous_usage(self) -> bool:
        """Whether every chunk of the stream carries the usage so far."""
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionRequest(SamplingFields):
    """Body of `POST /v1/completions`."""

    prompt: Any
    echo: bool | None = None
    logprobs: int | None = None

    @field_validator("prompt")
    @classmethod
    def _known_form(cls, value: object) -> object:
        check_prompt_form(value)
        return value

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts as a list, in whichever of the four forms they came."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class ChatMessage(ApiModel):
    """One turn of a conversation. Other members (`name`, `tool_calls`, `tool_call_id`, ...) reach the template, too."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Any = None

    @field_validator("content")
    @classmethod
    def _text_only(cls, value: object) -> object:
        if isinstance(value, list):
            return "\n".join(_text_of_part(part) for part in value)
        if value is None or isinstance(value, str):
            return value
        raise ValueError("content is a string or a list of parts such as {'type': 'text', 'text': '...'}")

    @model_validator(mode="after")
    def _something_to_say(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"a {self.role} message needs content")
        if self.tool_calls:
            if self.role != "assistant":
                raise ValueError(f"a {self.role} message cannot have tool_calls; an assistant message can")
            check_tool_calls(self.tool_calls)
        return self

    @property
    def tool_calls(self) -> Any:
        """Calls that the assistant made; nothing for other messages."""
        return (self.model_extra or {}).get("tool_calls")

    def for_template(self) -> dict[str, Any]:
        """The message as templates expect it: text as one string, "developer" under its older name "system"."""
        message = dict(self.model_extra or {})
        message["role"] = "system" if self.role == "developer" else self.role
        message["content"] = self.content or ""
        if not self.tool_calls:
            message.pop("tool_calls", None)
        reasoning = message.get("reasoning_content") or message.get("reasoning")  # older and newer name of one thing
        return message | ({"reasoning_content": reasoning, "reasoning": reasoning} if reasoning else {})


class TemplateFields(ApiModel):
    """How messages become a prompt."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, fail_fast=True)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools = None

    @field_validator("tools", mode="before")
    @classmethod
    def _valid_tools(cls, value: object) -> object:
        if value is not None:
            check_tools(value)
        return value or None

    @property
    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told about."""
        return self.tools

    @model_validator(mode="after")
    def _one_way_to_go_on(self) -> TemplateFields:
        if self.continue_final_message and self.add_generation_prompt:
            raise ValueError("continue_final_message and add_generation_prompt exclude each other")
        return self


class ChatCompletionRequest(SamplingFields, TemplateFields):
    """Body of `POST /v1/chat/completions`."""

    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    @field_validator("tool_choice")
    @classmethod
    def _valid_choice(cls, value: object, info: ValidationInfo) -> object:
        if "tools" in info.data:  # else they are wrong themselves
            read_tool_choice(value, info.data["tools"] or [])
        return value

    @property
    def choice_of_tools(self) -> ToolChoice:
        """Whether the model may call, must call, or must call one function."""
        return read_tool_choice(self.tool_choice, self.tools or [])

    @property
    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """None where no call is wanted: a model that is not told of tools does not try to use them."""
        return None if self.choice_of_tools.mode == "none" else self.tools

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatCompletionRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs can be given only together with logprobs: true")
        return self


class TokenizeCompletionRequest(ApiModel):
    """Body of `POST /tokenize` for a plain text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(TemplateFields):
    """Body of `POST /tokenize` for a conversation."""

    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(ApiModel):
    """Body of `POST /detokenize`."""

    model: str | None = None
    tokens: TokenIds


def check_prompt_form(prompt: object) -> None:
    """Accept a string, a list of strings, a list of token ids or a list of such lists.

    Written by hand because a union of four list types would try them all and report an error for each wrong item.

    Raises:
        ValueError: another form, an empty list, or too many prompts.
    """
    if isinstance(prompt, str) or _is_token_ids(prompt):
        return
    if not isinstance(prompt, list):
        raise ValueError("a prompt is a string, a list of strings, a list of token ids, or a list of such lists")
    if not prompt:
        raise ValueError("the list of prompts is empty")
    if len(prompt) > MAX_PROMPTS:
        raise ValueError(f"{len(prompt)} prompts in one request; at most {MAX_PROMPTS} are accepted")
    if not (all(isinstance(item, str) for item in prompt) or all(_is_token_ids(item) for item in prompt)):
        raise ValueError("a list of prompts holds either strings only, or lists of token ids that are not empty")


def _is_token_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _text_of_part(part: object) -> str:
    """The text of one content part; the kinds that need another modality are refused by name."""
    if not isinstance(part, dict):
        raise ValueError("each part of content is an object such as {'type': 'text', 'text': '...'}")
    kind = part.get("type")
    if kind not in ("text", "input_text", "output_text"):
        raise ValueError(f"content part of type {str(kind)[:40]!r} is not supported: this server reads text only")
    if not isinstance(part.get("text"), str):
        raise ValueError(f"content part of type {kind!r} needs a string member 'text'")
    return part["text"]
