"""The FastAPI application: routes, error handlers, and the layers every request passes through."""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from fastapi import FastAPI
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware

from aios_serve.auth import RequireApiKey
from aios_serve.error_responses import LastResort, install_error_handlers
from aios_serve.metrics import ServerMetrics
from aios_serve.request_body import LimitBody
from aios_serve.request_id import EchoRequestId
from aios_serve.routes import chat, completions, health, metrics, models, responses, tokenize
from aios_serve.serving import Serving
from aios_serve.tenants.gate import TenantGate
from aios_serve.tenants.registry import TenantRegistry

if TYPE_CHECKING:
    from aios_serve.async_engine import AsyncEngine
    from aios_serve.server_config import ServerConfig


def create_app(engine: AsyncEngine, config: ServerConfig, registry: TenantRegistry | None = None) -> FastAPI:
    """Build the application around an engine, which the caller starts and shuts down (see `server.py`).

    It answers at once: 503 with the progress while the engine loads.

    Args:
        engine: Generates.
        config: The options.
        registry: Who may ask, for a caller that wants to change that; None makes one from `config`.

    Raises:
        ConfigError: The file of tenants cannot be used.
    """
    registry = registry or TenantRegistry.of(config, engine.config)
    app = FastAPI(
        title="aios-serve",
        version=version("aios-serve"),
        docs_url=None,  # the pages would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,  # a redirect would be built from the client's Host header
        middleware=middleware(config, registry),
    )
    server_metrics = ServerMetrics(engine, registry)
    engine.subscribe(server_metrics)
    app.state.serving = Serving(engine=engine, config=config, metrics=server_metrics)
    for module in (chat, completions, responses, tokenize, models, health, metrics):
        app.include_router(module.router)
    install_error_handlers(app)
    return app


def middleware(config: ServerConfig, registry: TenantRegistry) -> list[Middleware]:
    """What every request passes, from the outside in.

    CORS is outermost so that even refusals can be read by the pages that may call us.
    """
    layers = [Middleware(EchoRequestId), Middleware(LastResort)]
    if config.allowed_origins:
        layers.insert(
            0,
            Middleware(CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"]),
        )
    if registry.needs_key:
        layers += [Middleware(RequireApiKey, registry=registry), Middleware(TenantGate)]
    layers.append(Middleware(LimitBody, max_bytes=config.max_body_bytes))
    return layers
