"""Which parser a model needs: by vLLM's names, or as its chat template tells."""

from __future__ import annotations

import secrets
import string
from collections.abc import Collection

from aios_serve.tool_calls.hermes import HermesParser
from aios_serve.tool_calls.llama3_json import Llama3JsonParser
from aios_serve.tool_calls.mistral import MistralParser
from aios_serve.tool_calls.parser import ToolCallParser

TOOL_CALL_PARSERS = ("hermes", "llama3_json", "mistral")
"""Values of `--tool-call-parser`."""

MARKERS = {"hermes": "<tool_call>", "llama3_json": "<|python_tag|>", "mistral": "[TOOL_CALLS]"}
"""What begins a call. Where it is a special token, it must not be left out of the text."""

_MISTRAL_ID_LENGTH = 9
_ALPHANUMERIC = string.ascii_letters + string.digits


def detect_tool_call_parser(template: str) -> str | None:
    """The format that a chat template shows the model; None if it shows none, or one that is not read here."""
    if MARKERS["mistral"] in template:
        return "mistral"
    if MARKERS["hermes"] in template:
        return None if "<function=" in template else "hermes"  # Qwen3-Coder writes XML into the same tags
    if MARKERS["llama3_json"] in template:
        return "llama3_json"
    # Llama 3.2 has no tag: its template asks for the object in words.
    return "llama3_json" if "<|start_header_id|>" in template and '"parameters"' in template else None


def make_tool_call_parser(name: str, tools: Collection[str]) -> ToolCallParser:
    """A parser for one answer; `tools` are the names of the request's functions."""
    match name:
        case "hermes":
            return HermesParser()
        case "mistral":
            return MistralParser()
        case "llama3_json":
            return Llama3JsonParser(tools)
        case _:
            raise ValueError(f"{name!r} is no tool call parser")


def new_call_id(parser: str | None) -> str:
    """An id for a call. Mistral's templates take nothing but nine letters and digits back."""
    if parser == "mistral":
        return "".join(secrets.choice(_ALPHANUMERIC) for _ in range(_MISTRAL_ID_LENGTH))
    return f"call_{secrets.token_hex(12)}"
