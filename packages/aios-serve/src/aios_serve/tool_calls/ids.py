"""Ids of calls, for templates that are particular about them."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from aios_serve.tool_calls.registry import MARKERS

_SHORT = re.compile(r"[a-zA-Z0-9]{9}")


def with_fitting_ids(messages: Sequence[Mapping[str, Any]], template: str) -> list[dict[str, Any]]:
    """The messages with ids that Mistral's templates take: nine letters and digits.

    Conversations begun elsewhere carry others. A longer id becomes a digest of it, the same in a call and its result.
    """
    if MARKERS["mistral"] not in template:
        return [dict(message) for message in messages]
    return [_fitting(message) for message in messages]


def _fitting(message: Mapping[str, Any]) -> dict[str, Any]:
    fitting = dict(message)
    if isinstance(fitting.get("tool_call_id"), str):
        fitting["tool_call_id"] = _short(fitting["tool_call_id"])
    if fitting.get("tool_calls"):
        fitting["tool_calls"] = [{**call, "id": _short(str(call.get("id", "")))} for call in fitting["tool_calls"]]
    return fitting


def _short(call_id: str) -> str:
    if _SHORT.fullmatch(call_id):
        return call_id
    return hashlib.blake2b(call_id.encode(errors="replace"), digest_size=8).hexdigest()[:9]
