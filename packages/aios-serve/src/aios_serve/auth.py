"""Who may ask: API keys as bearer tokens, compared in constant time, for everything that is not on the public list."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aios_sched.request import DEFAULT_TENANT
from aios_serve.error_responses import ApiError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

_TENANT = "aios_tenant"
PUBLIC_PATHS = frozenset({"/health", "/ready", "/live", "/ping"})
"""What load balancers ask. Anything else, known or not, needs a key when keys are set."""


class RequireApiKey:
    """ASGI middleware that answers 401 to requests without one of `keys`.

    Which key it was tells tenants apart, see `tenant_of`. The decision is made on the very path the router will use,
    never on `request.url`, which is built from the Host header that the client chooses (GHSA-94f4-hr76-p5j6). Only
    exact matches are public, so no prefix, suffix or dot segment makes a path public, and neither does a root path,
    which the router would strip.
    """

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self.app = app
        self._digests = tuple(_digest(key.encode()) for key in keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is public or carries a key."""
        key = None if scope["type"] == "lifespan" else self._matching_key(scope)
        if key is not None and len(self._digests) > 1:
            scope.setdefault("state", {})[_TENANT] = f"key-{key + 1}"
        if scope["type"] == "lifespan" or self._is_public(scope) or key is not None:
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await unauthorized().response()(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        return scope["type"] == "http" and not scope.get("root_path") and scope["path"] in PUBLIC_PATHS

    def _matching_key(self, scope: Scope) -> int | None:
        """Compare digests of equal length with every key, so that neither content, length nor order shows in time."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return None
        scheme, _, token = values[0].partition(b" ")
        digest = _digest(token.strip())
        matches = [hmac.compare_digest(digest, known) for known in self._digests]
        return matches.index(True) if scheme.lower() == b"bearer" and any(matches) else None


def tenant_of(scope: Scope) -> str:
    """Whose request it is: with several API keys "key-1", "key-2", ... in their order, else "default"."""
    return scope.get("state", {}).get(_TENANT, DEFAULT_TENANT)


def unauthorized() -> ApiError:
    """The answer to a missing or wrong key; it does not say which."""
    return ApiError(
        401,
        "A valid API key is needed: send the header 'Authorization: Bearer KEY'.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
