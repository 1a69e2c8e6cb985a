"""What tells a router that requests belong together."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.requests import Request

    from aios_serve.openai_types import SamplingFields

SESSION_HEADER = "x-session-id"


def session_of(request: Request, body: SamplingFields) -> str:
    """The header `X-Session-Id`, else `prompt_cache_key`, else `user`; empty without any of them.

    It decides which replica gets the request (`--data-parallel-routing session`) and nothing else: a client that makes
    up keys, or uses those of others, gets the same answers.
    """
    return request.headers.get(SESSION_HEADER) or body.prompt_cache_key or body.user or ""
