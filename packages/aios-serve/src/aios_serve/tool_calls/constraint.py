"""`tool_choice` "required" or a function by name: what holds the model to it.

`forced_calls_schema` says in JSON schema what the answer may be; `constrained` is the one place where that reaches the
engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aios_model.errors import InvalidRequestError
from aios_model.sampling.structured import StructuredOutputsParams

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
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": [_call(tool) for tool in tools]}}
    if not parallel:
        schema["maxItems"] = 1
    schema["$defs"] = {tool["function"]["name"]: _moved(_parameters(tool), tool["function"]["name"]) for tool in tools}
    return schema


def constrained(params: SamplingParams, schema: Mapping[str, Any] | None) -> SamplingParams:
    """`params` that hold the answer to `schema`.

    Raises:
        InvalidRequestError: the schema is too large or too deep; `param` blames the tools.
    """
    if schema is None:
        return params
    try:
        return replace(params, structured_outputs=StructuredOutputsParams.of({"json": schema}))
    except InvalidRequestError as error:
        message = str(error).replace("structured_outputs.json", "the parameters of the tools together")
        raise InvalidRequestError(message, param="tools") from None


def _parameters(tool: Mapping[str, Any]) -> dict[str, Any]:
    schema = tool["function"].get("parameters")
    if not schema:
        return {"type": "object", "properties": {}, "additionalProperties": False}
    return {"type": "object", **schema}


def _call(tool: Mapping[str, Any]) -> dict[str, Any]:
    name = tool["function"]["name"]
    return {
        "type": "object",
        "properties": {"name": {"const": name}, "parameters": {"$ref": f"#/$defs/{name}"}},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def _moved(node: Any, name: str) -> Any:
    """`node` with references that begin at its root turned to where the root is now."""
    if isinstance(node, list):
        return [_moved(item, name) for item in node]
    if not isinstance(node, dict):
        return node
    moved = {key: _moved(item, name) for key, item in node.items()}
    target = node.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        moved["$ref"] = f"#/$defs/{name}{target[1:]}"
    return moved
