"""From what a request says to the token ids the model reads. Long texts are tokenized off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from aios_model.errors import InvalidRequestError
from aios_serve.error_responses import ApiError
from aios_serve.tool_calls.ids import with_fitting_ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from aios_model.tokenizer.chat_template import ChatTemplate
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_serve.openai_types import CompletionRequest, SamplingFields, TemplateFields

Result = TypeVar("Result")

LONG_TEXT = 2048
"""Characters beyond which tokenizing takes longer (about 1 ms) than handing it to a thread."""

LONGEST_TOKEN = 256
"""Characters no token has more of (vocabularies in use end at 128), so that far too long a text is refused before it is
tokenized, which takes 0.4 s per million characters."""

RESERVED_TEMPLATE_NAMES = ("tools", "add_generation_prompt", "continue_final_message", "chat_template", "tokenize")
"""What `chat_template_kwargs` may not smuggle past the fields of the request (GHSA-69j4-grxj-j64p). Names that
templates themselves rely on (`messages`, `bos_token`, ...) are guarded by the tokenizer."""

NO_TOOLS = (
    "this model's chat template knows of no tools, so the model would never see them; leave them out, serve a model "
    "that was trained to use tools, or start the server with --chat-template FILE"
)


async def encode_prompts(
    tokenizer: Tokenizer,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    add_special_tokens: bool,
    most_tokens: int | None = None,
) -> list[list[int]]:
    """Token ids of each prompt; prompts that come as ids stay what they are.

    Raises:
        ApiError: a text cannot fit into `most_tokens`, however it is tokenized.
    """
    texts = [prompt for prompt in prompts if isinstance(prompt, str)]
    if not texts:
        return [list(prompt) for prompt in prompts if not isinstance(prompt, str)]
    _refuse_hopeless(max(map(len, texts)), most_tokens, param="prompt")

    def encode() -> list[list[int]]:
        return tokenizer.encode_batch(texts, add_special_tokens=add_special_tokens)

    return await _off_the_loop(encode, num_characters=sum(map(len, texts)))


async def encode_chat(tokenizer: Tokenizer, body: TemplateFields, *, most_tokens: int | None = None) -> list[int]:
    """Token ids of a conversation, through the model's chat template.

    Raises:
        ApiError: the messages cannot fit into `most_tokens`, however they are tokenized.
        InvalidRequestError: `chat_template_kwargs` replaces a reserved name, or the template knows of no tools.
        ChatTemplateError: there is no template, or it refused the messages.
    """
    variables = body.chat_template_kwargs or {}
    for name in RESERVED_TEMPLATE_NAMES:
        if name in variables:
            raise InvalidRequestError(
                f"chat_template_kwargs must not set {name!r}: the server sets it", param="chat_template_kwargs"
            )
    messages = [message.for_template() for message in body.messages]
    tools = body.tools_for_template
    template = tokenizer.chat_template(with_tools=bool(tools))
    _refuse_unknown_to_template(template, messages, tools)
    messages = with_fitting_ids(messages, template.source)
    num_characters = sum(map(_num_characters, messages))
    _refuse_hopeless(num_characters, most_tokens, param="messages")

    def encode() -> list[int]:
        if body.continue_final_message:
            return _encode_open_chat(tokenizer, messages, variables, tools)
        add_generation_prompt = body.add_generation_prompt is not False
        return tokenizer.encode_chat(messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables)

    if tools:
        num_characters += LONG_TEXT  # they are long, and rendering them takes longer than tokenizing
    return await _off_the_loop(encode, num_characters=num_characters)


def fit_prompt(
    token_ids: list[int],
    body: SamplingFields,
    max_tokens: int | None,
    *,
    max_model_len: int,
    param: str,
    whose: str = "This model's",
) -> list[int]:
    """The prompt, cut if the request asks for that, refused if it leaves no room for what is to be generated.

    Raises:
        ApiError: 400 "context_length_exceeded" with the numbers. `param` is the field that holds the prompt, which is
            to blame unless it would fit by itself, and `whose` says whose context it is.
    """
    wanted = max_tokens or 1
    prompt = _truncated(token_ids, body.truncate_prompt_tokens, room=max_model_len - wanted)
    if len(prompt) + wanted <= max_model_len:
        return prompt
    asked = f"max_tokens={max_tokens} are asked for" if max_tokens else "at least one is to be generated"
    raise ApiError(
        400,
        f"{whose} maximum context length is {max_model_len} tokens, but the prompt has {len(prompt)} and {asked}. "
        "Shorten the prompt, ask for fewer tokens, or set truncate_prompt_tokens.",
        code="context_length_exceeded",
        param=param if len(prompt) >= max_model_len else "max_tokens",
    )


async def decode(tokenizer: Tokenizer, token_ids: Sequence[int], vocab_size: int) -> str:
    """Text of token ids, special tokens included.

    Raises:
        InvalidRequestError: an id is outside the vocabulary.
    """
    for extreme in (min(token_ids, default=0), max(token_ids, default=0)):
        if not 0 <= extreme < vocab_size:
            raise InvalidRequestError(
                f"token id {extreme} is outside the model's vocabulary of {vocab_size}", param="tokens"
            )
    return await _off_the_loop(
        lambda: tokenizer.decode(list(token_ids), skip_special_tokens=False), num_characters=4 * len(token_ids)
    )


async def echoed_prompts(tokenizer: Tokenizer, body: CompletionRequest, prompts: Sequence[Sequence[int]]) -> list[str]:
    """What to repeat before the answer to each prompt: the prompt as it came, decoded if it came as ids, or nothing."""
    if not body.echo:
        return [""] * len(prompts)

    def texts() -> list[str]:
        return [
            given
            if isinstance(given, str) and body.truncate_prompt_tokens is None
            else tokenizer.decode(list(ids), skip_special_tokens=False)
            for given, ids in zip(body.prompts, prompts, strict=True)
        ]

    return await _off_the_loop(texts, num_characters=4 * sum(map(len, prompts)))


def _refuse_hopeless(num_characters: int, most_tokens: int | None, *, param: str) -> None:
    if most_tokens is not None and num_characters > most_tokens * LONGEST_TOKEN:
        raise ApiError(
            400,
            f"This model's maximum context length is {most_tokens} tokens, far too few for the {num_characters} "
            "characters of the prompt. Shorten it, or set truncate_prompt_tokens.",
            code="context_length_exceeded",
            param=param,
        )


def _refuse_unknown_to_template(
    template: ChatTemplate, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None
) -> None:
    """A template that knows of no tools, or of no calls, would leave them out without a word."""
    if tools and "tools" not in template.names:
        raise InvalidRequestError(NO_TOOLS, param="tools")
    if "tool_calls" not in template.source and any(message.get("tool_calls") for message in messages):
        raise InvalidRequestError(
            "this model's chat template knows of no tool calls, so the model would never see those of the assistant's "
            "messages; leave them out, or write them into content",
            param="messages",
        )


def _num_characters(message: Mapping[str, Any]) -> int:
    calls = message.get("tool_calls") or ()
    arguments = (call["function"].get("arguments") or "" for call in calls)
    return len(message["content"]) + sum(len(text) for text in arguments if isinstance(text, str))


def _encode_open_chat(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, Any]],
    variables: Mapping[str, Any],
    tools: Sequence[Mapping[str, Any]] | None,
) -> list[int]:
    """The conversation cut right behind the last message's text, so that the model goes on with that message."""
    text = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=False, **variables)
    last = messages[-1]["content"].strip()
    found = text.rfind(last) if last else -1
    if found < 0:
        raise InvalidRequestError(
            "continue_final_message: the last message is empty or the chat template does not show its text as it is, "
            "so there is nothing to go on from",
            param="continue_final_message",
        )
    return tokenizer.encode(text[: found + len(last)], add_special_tokens=False)


def _truncated(token_ids: list[int], limit: int | None, *, room: int) -> list[int]:
    """The last `limit` tokens, where a request asks for that; -1 stands for as many as leave room for the answer."""
    if limit is None:
        return token_ids
    if limit == 0:
        raise InvalidRequestError(
            "truncate_prompt_tokens=0 would leave nothing; give the number of tokens to keep, or -1 for what fits",
            param="truncate_prompt_tokens",
        )
    return token_ids[-max(room, 1) :] if limit == -1 else token_ids[-limit:]


async def _off_the_loop(function: Callable[[], Result], *, num_characters: int) -> Result:
    return await asyncio.to_thread(function) if num_characters > LONG_TEXT else function()
