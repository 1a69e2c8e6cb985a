"""Who may ask: API keys as bearer tokens, compared in constant time, for everything that is not on the public list."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_serve.error_responses import ApiError
from aios_serve.tenants.visit import Visit, begin_visit

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from aios_serve.tenants.account import TenantAccount
    from aios_serve.tenants.registry import TenantRegistry

PUBLIC_PATHS = frozenset({"/health", "/ready", "/live", "/ping"})
"""What load balancers ask. Anything else, known or not, needs a key when keys are set."""


class RequireApiKey:
    """ASGI middleware that answers 401 to requests without a key that the registry knows.

    Whose key it was is handed on as a `Visit`. The decision is made on the very path the router will use,
    never on `request.url`, which is built from the Host header that the client chooses (GHSA-94f4-hr76-p5j6). Only
    exact matches are public, so no prefix, suffix or dot segment makes a path public, and neither does a root path,
    which the router would strip.
    """

    def __init__(self, app: ASGIApp, registry: TenantRegistry) -> None:
        self.app = app
        self._registry = registry

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on what is public or carries a key."""
        if scope["type"] == "lifespan" or self._is_public(scope):
            await self.app(scope, receive, send)
        elif (account := self._account(scope)) is not None:
            begin_visit(scope, Visit(account))
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            await unauthorized().response()(scope, receive, send)

    def _is_public(self, scope: Scope) -> bool:
        return scope["type"] == "http" and not scope.get("root_path") and scope["path"] in PUBLIC_PATHS

    def _account(self, scope: Scope) -> TenantAccount | None:
        """Of the one key of the request. How long that takes tells nothing of the keys there are."""
        values = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(values) != 1:
            return None
        scheme, _, token = values[0].partition(b" ")
        account = self._registry.find(token.strip())
        return account if scheme.lower() == b"bearer" else None


def unauthorized() -> ApiError:
    """The answer to a missing or wrong key; it does not say which."""
    return ApiError(
        401,
        "A valid API key is needed: send the header 'Authorization: Bearer KEY'.",
        type="authentication_error",
        code="invalid_api_key",
        headers={"WWW-Authenticate": "Bearer"},
    )
