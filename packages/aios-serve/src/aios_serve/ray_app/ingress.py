"""The ingress: keys, limits, and questions about all replicas are answered here, everything else by a replica."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from aios_serve.app import middleware
from aios_serve.generation import cancel_and_wait, wait_for_disconnect
from aios_serve.json_response import json_response
from aios_serve.ray_app.asgi_call import AnswerStart, AsgiCall
from aios_serve.ray_app.forwarding import Forwarder
from aios_serve.ray_app.merged_metrics import merge_expositions
from aios_serve.ray_app.replicas import RayReplicas
from aios_serve.ray_app.roll_call import RollCall
from aios_serve.request_id import HEADER as REQUEST_ID
from aios_serve.request_id import EchoRequestId
from aios_serve.request_identity import RequestIdentity
from aios_serve.tenants.registry import TenantRegistry

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from aios_serve.ray_app.options import RayServeConfig
    from aios_serve.ray_app.roll_call import ReplicaReport

NO_REPLICA = "loading"
"""What `/health` says while no replica runs: one is being started."""


class Ingress:
    """The class that Ray Serve makes ingress replicas of.

    Args:
        handle: DeploymentHandle of `EngineReplica`.
        config: The options.
    """

    def __init__(self, handle: Any, config: RayServeConfig) -> None:
        self._roll_call = RollCall()
        self._replicas = RayReplicas(handle, self._roll_call)
        self._config = config

    async def hear(self, report: ReplicaReport) -> None:
        """Called by every replica, twice a second."""
        self._roll_call.hear(report)

    def __serve_build_asgi_app__(self) -> ASGIApp:
        """Called by Ray Serve: what speaks HTTP here."""
        forwarder = Forwarder(self._replicas, patience=self._config.replica_patience)
        seed = self._config.engine.seed
        source = random.SystemRandom() if seed is None else random.Random(seed)
        app: ASGIApp = _Endpoint(self._roll_call, forwarder, source)
        registry = TenantRegistry.of(self._config.server, self._config.engine)
        for layer in reversed(middleware(self._config.server, registry)):
            if layer.cls is not EchoRequestId:  # Ray Serve does that
                app = layer.cls(app, *layer.args, **layer.kwargs)
        return _AtRoot(app)


class _AtRoot:
    """ASGI middleware: the path without the prefix under which Ray Serve mounts the application, as keys need it."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await _live(receive, send)
        elif scope["type"] == "http":
            path = scope["path"].removeprefix(scope.get("root_path", "")) or "/"
            await self.app({**scope, "path": path, "root_path": ""}, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})


async def _live(receive: Receive, send: Send) -> None:
    for phase in ("startup", "shutdown"):
        await receive()
        await send({"type": f"lifespan.{phase}.complete"})


class _Endpoint:
    """Answers what concerns all replicas, forwards the rest."""

    def __init__(self, roll_call: RollCall, forwarder: Forwarder, source: random.Random) -> None:
        self._roll_call = roll_call
        self._forwarder = forwarder
        self._source = source
        self._own: dict[tuple[str, str], Callable[[Scope], Awaitable[Response]]] = {
            ("GET", "/health"): self._health,
            ("GET", "/ping"): self._health,
            ("POST", "/ping"): self._health,
            ("GET", "/ready"): self._ready,
            ("GET", "/load"): self._load,
            ("GET", "/metrics"): self._metrics,
            ("GET", "/version"): self._version,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._own.get((scope["method"], scope["path"]))
        if answer is not None:
            await (await answer(scope))(scope, receive, send)
            return
        body = await _read_body(receive)
        if body is None:
            return
        call = AsgiCall(
            method=scope["method"],
            path=scope["path"],
            query_string=scope["query_string"],
            headers=[(bytes(name), bytes(value)) for name, value in scope["headers"]],
            body=body,
            identity=RequestIdentity.draw(self._source),
        )
        await _send_unless_gone(self._forwarder.answer(call), receive, send)

    async def _health(self, _scope: Scope) -> Response:
        """As the plain `/health`, of the replica that is best off."""
        return _state_response(self._roll_call.reports(), lambda report: report.healthy)

    async def _ready(self, _scope: Scope) -> Response:
        reports = self._roll_call.reports()
        return _state_response(reports, lambda report: report.healthy and report.state == "ready")

    async def _load(self, _scope: Scope) -> Response:
        load = sum(report.num_open_requests for report in self._roll_call.reports())
        return json_response({"server_load": load})

    async def _metrics(self, scope: Scope) -> Response:
        accept = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"accept"), "")
        expositions = [(report.rank, report.metrics) for report in self._roll_call.reports()]
        text, content_type = merge_expositions(expositions, accept)
        return Response(text, headers={"Content-Type": content_type})

    async def _version(self, _scope: Scope) -> Response:
        return json_response({"version": version("aios-serve")})


def _state_response(reports: list[ReplicaReport], is_ok: Callable[[ReplicaReport], bool]) -> Response:
    fine = [report for report in reports if is_ok(report)]
    if fine:
        return json_response({"status": fine[0].state})
    state = reports[0].state if reports else NO_REPLICA
    response = json_response({"status": "stuck" if state in ("ready", "draining") else state}, 503)
    response.headers["Retry-After"] = "1"
    return response


async def _read_body(receive: Receive) -> bytes | None:
    """The whole body; None if the client went away before it was sent."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if not message.get("more_body", False):
            return bytes(body)


async def _send_unless_gone(parts: AsyncGenerator[AnswerStart | bytes], receive: Receive, send: Send) -> None:
    """Send the answer; a client that goes away closes `parts`, which aborts the request in the engine."""
    sender = asyncio.ensure_future(_send(parts, send))
    gone = asyncio.ensure_future(wait_for_disconnect(receive))
    try:
        await asyncio.wait((sender, gone), return_when=asyncio.FIRST_COMPLETED)
        if sender.done():
            sender.result()
    finally:
        await cancel_and_wait(sender, gone)


async def _send(parts: AsyncGenerator[AnswerStart | bytes], send: Send) -> None:
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, AnswerStart):
                headers = [pair for pair in part.headers if pair[0] != REQUEST_ID]  # Ray Serve adds its own
                await send({"type": "http.response.start", "status": part.status, "headers": headers})
                part = part.body
            await send({"type": "http.response.body", "body": part, "more_body": True})
    await send({"type": "http.response.body", "body": b"", "more_body": False})
