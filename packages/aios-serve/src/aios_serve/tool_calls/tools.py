"""The tools of a request and its choice among them, checked before anything else looks at them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn

import msgspec

MAX_TOOLS = 128
MAX_TOOL_BYTES = 256 * 1024
"""Of all tools of a request together, as JSON. Templates write them into the prompt."""
MAX_SCHEMA_DEPTH = 64

_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,128}")


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may call, must call, or must call one function.

    Attributes:
        mode: What was asked for.
        name: The function, with "named".
    """

    mode: Literal["none", "auto", "required", "named"]
    name: str | None = None


def check_tools(tools: object) -> None:
    """Check the `tools` of a request.

    Raises:
        ValueError: what is wrong and with which of them.
    """
    if not isinstance(tools, list):
        raise ValueError("tools must be a list of functions")
    if len(tools) > MAX_TOOLS:
        raise ValueError(f"{len(tools)} tools in one request; at most {MAX_TOOLS} are accepted")
    names: set[str] = set()
    for index, tool in enumerate(tools):
        name = _check_tool(tool, f"tools[{index}]")
        if name in names:
            raise ValueError(f"tools[{index}].function.name: {name!r} is there twice; each function needs its own name")
        names.add(name)
    size = len(msgspec.json.encode(tools))
    if size > MAX_TOOL_BYTES:
        raise ValueError(f"the tools take {size} bytes; at most {MAX_TOOL_BYTES} are accepted")


def read_tool_choice(choice: object, tools: Sequence[Mapping[str, Any]]) -> ToolChoice:
    """The `tool_choice` of a request with these checked `tools`.

    Raises:
        ValueError: it is of no known form, or names a function that is not among the tools.
    """
    names = tool_names(tools)
    if choice is None:
        return ToolChoice("auto" if names else "none")
    if choice in ("none", "auto", "required"):
        if choice == "required" and not names:
            raise ValueError('tool_choice "required" needs tools to choose from')
        return ToolChoice(choice if names else "none")  # type: ignore[arg-type]
    name = _named(choice)
    if name not in names:
        known = ", ".join(names) or "none"
        raise ValueError(f"tool_choice names the function {name[:128]!r}, which is not among the tools ({known})")
    return ToolChoice("named", name)


def tool_names(tools: Sequence[Mapping[str, Any]]) -> list[str]:
    """The functions' names, in order."""
    return [tool["function"]["name"] for tool in tools]


def check_tool_calls(calls: object) -> None:
    """Check the `tool_calls` of an assistant's message, but for the arguments, which are read where they are rendered.

    Raises:
        ValueError: what is wrong and with which of them.
    """
    if not isinstance(calls, list):
        raise ValueError("tool_calls must be a list")
    for index, call in enumerate(calls):
        where = f"tool_calls[{index}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            _bad(where, 'it must be an object such as {"id", "type": "function", "function": {"name", "arguments"}}')
        if call.get("type", "function") != "function":
            _bad(f"{where}.type", "only calls of functions are known")
        if not isinstance(function.get("arguments", ""), (str, dict)):
            _bad(f"{where}.function.arguments", "it must be a JSON object, as text or as it is")


def _check_tool(tool: object, where: str) -> str:
    """Check one tool and return its name."""
    if not isinstance(tool, dict):
        _bad(where, "it must be an object")
    if tool.get("type") != "function":
        kind = str(tool.get("type"))[:40]
        _bad(f"{where}.type", f'only "function" is supported, got {kind!r}; this server runs no tools of its own')
    function = tool.get("function")
    if not isinstance(function, dict):
        _bad(f"{where}.function", "it must be an object with a name, a description and parameters")
    name = function.get("name")
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        _bad(f"{where}.function.name", f"it must be 1 to 128 letters, digits, dots, - or _, got {str(name)[:140]!r}")
    if not isinstance(function.get("description", ""), (str, type(None))):
        _bad(f"{where}.function.description", "it must be text")
    if not isinstance(function.get("strict", False), (bool, type(None))):
        _bad(f"{where}.function.strict", "it must be true or false")
    if function.get("parameters") is not None:
        _check_parameters(function["parameters"], f"{where}.function.parameters")
    return name


def _check_parameters(schema: object, where: str) -> None:
    """Check that this is the JSON schema of an object, as far as every tool's is."""
    if not isinstance(schema, dict):
        _bad(where, "it must be a JSON schema, an object")
    if schema.get("type", "object") != "object":
        _bad(f"{where}.type", f'arguments are an object, so it must be "object", got {str(schema["type"])[:40]!r}')
    properties = schema.get("properties", {})
    if not isinstance(properties, dict):
        _bad(f"{where}.properties", "it must be an object of schemas")
    for name, value in properties.items():
        if not isinstance(value, (dict, bool)):
            _bad(f"{where}.properties.{name[:64]}", "it must be a JSON schema")
    required = schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        _bad(f"{where}.required", "it must be a list of names")
    if _is_deeper(schema, MAX_SCHEMA_DEPTH):
        _bad(where, f"it is nested more than {MAX_SCHEMA_DEPTH} deep")


def _is_deeper(value: object, limit: int) -> bool:
    """Whether containers are nested more than `limit` deep."""
    level: list[object] = [value]
    for _ in range(limit):
        inner: list[object] = []
        for item in level:
            children = item.values() if isinstance(item, dict) else item if isinstance(item, list) else ()
            inner += [child for child in children if isinstance(child, (dict, list))]
        if not inner:
            return False
        level = inner
    return True


def _named(choice: object) -> str:
    """The function that `{"type": "function", "function": {"name": …}}` names."""
    if isinstance(choice, dict):
        function = choice.get("function")
        if choice.get("type") == "function" and isinstance(function, dict) and isinstance(function.get("name"), str):
            return function["name"]
        if choice.get("type") == "allowed_tools":
            raise ValueError('tool_choice of type "allowed_tools" is not supported; send the allowed tools only')
    raise ValueError('tool_choice is "none", "auto", "required" or {"type": "function", "function": {"name": ...}}')


def _bad(where: str, what: str) -> NoReturn:
    raise ValueError(f"{where}: {what}")
