"""Is it alive, does it take requests, how busy is it, which version: what load balancers and scripts ask."""

from __future__ import annotations

from importlib.metadata import version

from fastapi import APIRouter
from starlette.responses import Response

from aios_serve.async_engine import EngineState
from aios_serve.json_response import json_response
from aios_serve.serving import Serving, ServingDep

router = APIRouter(tags=["operations"])


@router.get("/health")
async def health(serving: ServingDep) -> Response:
    """200 while the engine lives and moves, draining included; 503 while it loads, restarts, is stuck or is dead."""
    return _state_response(serving, ok=serving.engine.is_healthy())


@router.get("/ready")
async def ready(serving: ServingDep) -> Response:
    """200 while new requests are taken, else 503."""
    return _state_response(serving, ok=serving.engine.state is EngineState.READY and serving.engine.is_healthy())


@router.get("/live")
async def live(serving: ServingDep) -> Response:
    """200 while the server serves or will, by itself: loading and restarting included; 503 once only a new one helps.

    What a liveness probe should ask: by `/health` a restart that takes minutes would be cut short by a longer one.
    """
    engine = serving.engine
    serves = engine.state in (EngineState.READY, EngineState.DRAINING)
    hopeless = serves and not engine.is_healthy() and not engine.config.engine_process  # a thread cannot be killed
    return _state_response(serving, ok=engine.state is not EngineState.DEAD and not hopeless)


@router.get("/ping")
@router.post("/ping", include_in_schema=False)
async def ping(serving: ServingDep) -> Response:
    """`/health` under the name that SageMaker asks for."""
    return _state_response(serving, ok=serving.engine.is_healthy())


@router.get("/version")
async def show_version() -> Response:
    """The version of aios-serve."""
    return json_response({"version": version("aios-serve")})


@router.get("/load")
async def load(serving: ServingDep) -> Response:
    """How many requests are being generated or wait for it."""
    return json_response({"server_load": serving.engine.num_open_requests})


def _state_response(serving: Serving, *, ok: bool) -> Response:
    """The state in a word, without details: this is public. Retry-After tells pollers not to hurry."""
    state = str(serving.engine.state)
    if ok:
        return json_response({"status": state})
    response = json_response({"status": "stuck" if state in ("ready", "draining") else state}, 503)
    response.headers["Retry-After"] = "1"
    return response
