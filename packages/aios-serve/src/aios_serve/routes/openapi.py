"""Descriptions for `/openapi.json`: bodies are read by `request_body.py`, so FastAPI has to be told their schema."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel


def json_body(*kinds: type[BaseModel]) -> dict[str, Any]:
    """`openapi_extra` for a route whose body is one of `kinds`."""
    schemas = [_schema(kind) for kind in kinds]
    schema = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _schema(kind: type[BaseModel]) -> dict[str, Any]:
    """The JSON schema of `kind` in one piece: its `$defs` would be looked up at the root of the document."""
    schema = kind.model_json_schema()
    definitions = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, dict):
            if "$ref" in node:
                return inlined(definitions[node["$ref"].rpartition("/")[2]])
            return {name: inlined(value) for name, value in node.items()}
        return [inlined(item) for item in node] if isinstance(node, list) else node

    return inlined(schema)
