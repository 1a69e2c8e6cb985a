"""The chat completion that a request for a response stands for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from aios_model.errors import InvalidRequestError
from aios_serve.openai_types import ChatCompletionRequest
from aios_serve.refusals import CHAT, UnsupportedFieldError, refuse_unsupported

if TYPE_CHECKING:
    from aios_serve.responses_api.request import ResponsesRequest

_SAME = (
    "model",
    "temperature",
    "top_p",
    "parallel_tool_calls",
    "stream",
    "user",
    "prompt_cache_key",
    "seed",
    "top_k",
    "min_p",
    "repetition_penalty",
    "priority",
    "cache_salt",
    "chat_template_kwargs",
    "timeout",
    "deadline",
)
_TEXTS = ("input_text", "output_text", "text", "reasoning_text", "summary_text")


def to_chat(body: ResponsesRequest) -> ChatCompletionRequest:
    """The chat completion.

    Raises:
        UnsupportedFieldError: an item, a tool or a format of a kind that is not supported.
        InvalidRequestError: an item or a tool is malformed.
        pydantic.ValidationError: something of the chat completion is out of range.
    """
    fields: dict[str, Any] = {name: getattr(body, name) for name in _SAME}
    fields |= {"messages": _messages(body), "max_completion_tokens": body.max_output_tokens}
    fields |= {"logprobs": body.wants_logprobs or None, "top_logprobs": body.top_logprobs or None}
    fields |= {"tools": [_tool(tool, index) for index, tool in enumerate(body.tools or [])] or None}
    fields |= {"tool_choice": _tool_choice(body.tool_choice), "response_format": _response_format(body)}
    given = {name: value for name, value in fields.items() if value is not None}
    refuse_unsupported(given, CHAT)
    return ChatCompletionRequest.model_validate(given)


def _messages(body: ResponsesRequest) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    if isinstance(body.input, str):
        return [*messages, {"role": "user", "content": body.input}]
    for index, item in enumerate(body.input):
        _add_item(item, f"input[{index}]", messages)
    return messages


def _add_item(item: Mapping[str, Any], where: str, messages: list[dict[str, Any]]) -> None:
    """Add what an item says to the conversation. Thoughts, text and calls of one turn become one message."""
    match item.get("type", "message"):
        case "message":
            role, content = item.get("role"), _content(item.get("content"), f"{where}.content")
            if role == "assistant":
                _turn(messages, needs="content")["content"] = content
            else:
                messages.append({"role": role, "content": content})
        case "function_call":
            call = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            calls = _turn(messages).setdefault("tool_calls", [])
            calls.append({"id": _text(item, "call_id", where), "type": "function", "function": call})
        case "function_call_output":
            content = _content(item.get("output"), f"{where}.output")
            messages.append({"role": "tool", "tool_call_id": _text(item, "call_id", where), "content": content})
        case "reasoning":
            thoughts = _content(item.get("content") or item.get("summary") or [], f"{where}.content")
            if thoughts:
                _turn(messages, needs="reasoning_content")["reasoning_content"] = thoughts
        case kind:
            _unsupported(f"{where} of type {str(kind)[:40]!r}", "text, calls of functions and their outputs are read")


def _turn(messages: list[dict[str, Any]], *, needs: str | None = None) -> dict[str, Any]:
    """The assistant's message that an item belongs to: the last one, unless it has what the item `needs` to say."""
    last = messages[-1] if messages else None
    is_open = last is not None and last["role"] == "assistant" and (needs is None or not last.get(needs))
    if last is None or not is_open or (needs is not None and "tool_calls" in last):
        last = {"role": "assistant", "content": None}
        messages.append(last)
    return last


def _content(content: object, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        _malformed(f"{where} must be text or a list of parts of text")
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(content))


def _part(part: object, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind == "refusal":
        return str(part.get("refusal", ""))
    if kind is not None and kind not in _TEXTS:
        _unsupported(f"{where} of type {str(kind)[:40]!r}", "this server reads text only")
    if not isinstance(part, Mapping) or not isinstance(part.get("text"), str):
        _malformed(f'{where} must be an object such as {{"type": "input_text", "text": ...}}')
    return part["text"]


def _text(item: Mapping[str, Any], name: str, where: str) -> str:
    if not isinstance(item.get(name), str):
        _malformed(f"{where}.{name} must be text")
    return item[name]


def _tool(tool: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Chat completions have a function's fields in an object of their own."""
    if tool.get("type") != "function":
        kind = str(tool.get("type"))[:40]
        raise UnsupportedFieldError(
            f"tools[{index}] of type {kind!r} cannot be honoured: this server runs no tools of its own, only functions "
            "that the client runs",
            param="tools",
        )
    return {"type": "function", "function": {name: value for name, value in tool.items() if name != "type"}}


def _tool_choice(choice: object) -> object:
    if isinstance(choice, dict) and choice.get("type") == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _response_format(body: ResponsesRequest) -> dict[str, Any] | None:
    form = body.text.format if body.text else None
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_schema":
        return {"type": "json_schema", "json_schema": {name: form[name] for name in form if name != "type"}}
    return form


def _unsupported(what: str, why: str) -> NoReturn:
    raise UnsupportedFieldError(f"{what} cannot be honoured: {why}", param="input")


def _malformed(message: str) -> NoReturn:
    raise InvalidRequestError(message, param="input")
