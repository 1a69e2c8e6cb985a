"""Checks the messages of a chat and brings them into the shape that templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NoReturn

from aios_model.errors import InvalidRequestError

# How a template reads content: as one text, as a list of parts, or as either.
ContentShape = Literal["text", "parts", "either"]

# Kinds of content parts that are text, and the key it is under.
_TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}


def read_messages(messages: Any, *, shape: ContentShape) -> list[dict[str, Any]]:
    """Copies messages into plain data, checked.

    Members that are null are left out (clients send an answer back with all its empty members), null content becomes
    empty text, and the arguments of past tool calls, a string in the API, become the object that templates expect.

    Args:
        messages: Mappings with `role`, `content` (text, parts of text, or null) and whatever else the template knows.
        shape: Give content as one text, parts joined by newlines as vLLM does; as a list of parts
            `{"type": "text", "text": ...}`; or in whichever of these shapes it came.

    Raises:
        InvalidRequestError: What is wrong and in which message; parts that are not text are refused by their name.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence):
        _refuse(f"messages must be a list, got {type(messages).__name__}")
    if not messages:
        _refuse("messages must not be empty")
    return [_read_message(message, f"messages[{i}]", shape) for i, message in enumerate(messages)]


def read_plain(value: Any, where: str, *, param: str, depth: int = 0) -> Any:
    """A copy of `value` in the types of JSON: objects with methods have no place in a template.

    Raises:
        InvalidRequestError: Something in it is of another type, or it nests deeper than 100.
    """
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth > 100:
        _refuse(f"{where} is nested more than 100 deep", param)
    if isinstance(value, str):
        return str.__str__(value)  # an enumeration member, say: its text without its methods
    if isinstance(value, Mapping):
        return {str(key): read_plain(item, where, param=param, depth=depth + 1) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [read_plain(item, where, param=param, depth=depth + 1) for item in value]
    raise InvalidRequestError(f"{where} holds a {type(value).__name__}, which is no JSON value", param=param)


def _read_message(message: Any, where: str, shape: ContentShape) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        _refuse(f"{where} must be an object with a role and content, got {type(message).__name__}")
    role = message.get("role")
    if not isinstance(role, str) or not role:
        _refuse(f"{where}.role must be a text such as 'user', got {role!r}")
    rest = {key: value for key, value in message.items() if value is not None and key != "content"}
    plain = read_plain(rest, where, param="messages")
    if "tool_calls" in plain:
        plain["tool_calls"] = _read_tool_calls(plain["tool_calls"], f"{where}.tool_calls")
    content = message.get("content")
    texts = _read_content(content, f"{where}.content")
    if shape == "parts" or (shape == "either" and isinstance(content, (list, tuple))):
        return plain | {"content": [{"type": "text", "text": text} for text in texts]}
    return plain | {"content": "\n".join(texts)}


def _read_content(content: Any, where: str) -> list[str]:
    if content is None:
        return []
    if isinstance(content, str):
        return [str.__str__(content)]
    if not isinstance(content, (list, tuple)):
        _refuse(f"{where} must be text, a list of text parts or null, got {type(content).__name__}")
    return [_read_part(part, f"{where}[{i}]") for i, part in enumerate(content)]


def _read_part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return str.__str__(part)
    kind = part.get("type") if isinstance(part, Mapping) else None
    if not isinstance(kind, str):
        _refuse(f'{where} must be an object such as {{"type": "text", "text": ...}}')
    if kind not in _TEXT_PARTS:
        _refuse(f"{where} is of type {kind[:40]!r}; this model takes text only")
    text = part.get(_TEXT_PARTS[kind])
    if not isinstance(text, str):
        _refuse(f"{where}.{_TEXT_PARTS[kind]} must be text, got {type(text).__name__}")
    return str.__str__(text)


def _read_tool_calls(calls: Any, where: str) -> list[Any]:
    if not isinstance(calls, list):
        _refuse(f"{where} must be a list, got {type(calls).__name__}")
    for i, call in enumerate(calls):
        function = call.get("function") if isinstance(call, dict) else None
        if isinstance(function, dict) and isinstance(function.get("arguments"), str):
            function["arguments"] = _read_arguments(function["arguments"], f"{where}[{i}].function.arguments")
    return calls


def _read_arguments(text: str, where: str) -> Any:
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        _refuse(f"{where} must be a JSON object, got {text[:80]!r}")
    return arguments


def _refuse(message: str, param: str = "messages") -> NoReturn:
    raise InvalidRequestError(message, param=param)
