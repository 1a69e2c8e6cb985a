"""`tool_choice` "required" or a function by name: what holds the model to it.

`forced_calls_schema` says in JSON schema what the answer may be; `constrained` is the one place where that reaches the
engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from aios_serve.error_responses import ApiError

if TYPE_CHECKING:
    from aios_model.sampling.params import SamplingParams
    from aios_serve.tool_calls.tools import ToolChoice


def forced_calls_schema(
    tools: Sequence[Mapping[str, Any]], choice: ToolChoice, *, parallel: bool = True
) -> dict[str, Any] | None:
    """The JSON schema of an answer that is held to calls; None where the model is free.

    "required" gives a list of `{"name", "parameters"}`, of one call unless `parallel`; a named function gives its
    arguments alone. `forced.py` reads both back.
    """
    if choice.mode == "named":
        return next(_parameters(tool) for tool in tools if tool["function"]["name"] == choice.name)
    if choice.mode != "required":
        return None
    # References point at the root of the schema they are written in, so definitions move up to the root of ours.
    definitions: dict[str, Any] = {}
    calls = [_call(tool, definitions) for tool in tools]
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": calls}}
    if not parallel:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema


def constrained(params: SamplingParams, schema: Mapping[str, Any] | None) -> SamplingParams:
    """`params` that hold the answer to `schema`.

    Raises:
        ApiError: 501, as long as the engine takes no constraints.
    """
    if schema is None:
        return params
    raise ApiError(
        501,
        'tool_choice "required" and a function by name need constrained decoding, which this server does not do yet; '
        'send tool_choice "auto" and ask for the call in the prompt.',
        type="server_error",
        code="not_implemented",
        param="tool_choice",
    )


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool["function"].get("parameters")
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **schema}


def _call(tool: Mapping[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    name = tool["function"]["name"]
    parameters = _parameters(tool)
    for key in ("$defs", "definitions"):
        own = parameters.pop(key, None)
        if isinstance(own, dict):
            for label, definition in own.items():
                definitions[f"{name}.{label}"] = _moved(definition, name)
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": _moved(parameters, name)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(node: Any, name: str) -> Any:
    """`node` with its references to definitions turned to where `_call` puts them."""
    if isinstance(node, dict):
        return {key: _reference(item, name) if key == "$ref" else _moved(item, name) for key, item in node.items()}
    return [_moved(item, name) for item in node] if isinstance(node, list) else node


def _reference(target: Any, name: str) -> Any:
    for root in ("#/$defs/", "#/definitions/"):
        if isinstance(target, str) and target.startswith(root):
            return f"#/$defs/{name}.{target.removeprefix(root)}"
    return target
