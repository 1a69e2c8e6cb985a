"""One replica: an AsyncEngine with its engine process, and the plain server's application around it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace
from typing import TYPE_CHECKING

from rich.console import Console

from aios_serve.app import create_app
from aios_serve.async_engine import AsyncEngine, EngineState
from aios_serve.errors import EngineDeadError
from aios_serve.logging_setup import configure_logging
from aios_serve.ray_app.asgi_call import AnswerStart, AsgiCall, call_app
from aios_serve.ray_app.errors import ReplicaLostError
from aios_serve.ray_app.roll_call import REPORT_SECONDS, ReplicaReport

if TYPE_CHECKING:
    from fastapi import FastAPI

    from aios_serve.config import EngineConfig
    from aios_serve.metrics import ServerMetrics
    from aios_serve.server_config import ServerConfig

logger = logging.getLogger(__name__)

ENGINE_DEPLOYMENT = "Engine"
INGRESS_DEPLOYMENT = "Ingress"
WATCH_SECONDS = 0.1


class EngineReplica:
    """The class that Ray Serve makes replicas of. It counts as running once its model is loaded.

    A replica whose engine has died ends its process: Ray then takes it out of rotation at once and starts another,
    while one that stayed would look idle and draw requests to fail them. If the replica dies, its engine leaves by
    itself.
    """

    async def __init__(self, engine_config: EngineConfig, server_config: ServerConfig) -> None:
        configure_logging(engine_config.log_level, Console(stderr=True))
        # An engine that is lost is not started again here: Ray replaces the replica, and others answer meanwhile.
        self._engine = AsyncEngine(replace(engine_config, max_engine_restarts=0))
        self._app: FastAPI = create_app(self._engine, server_config)
        await self._engine.start()
        try:
            await self._engine.wait_ready()
        except BaseException:
            await self._engine.shutdown()
            raise
        self._tasks = [asyncio.create_task(work) for work in (self._leave_with_engine(), self._report())]

    async def answer(self, call: AsgiCall) -> AsyncGenerator[AnswerStart | bytes]:
        """Answer one request, in the pieces of `call_app`.

        Raises:
            ReplicaLostError: the engine is dead; another replica may answer.
        """
        async with aclosing(call_app(self._app, call)) as parts:
            async for part in parts:
                if isinstance(part, AnswerStart) and part.status == 503 and self._engine.state is EngineState.DEAD:
                    raise ReplicaLostError("the replica's engine has stopped")
                yield part

    async def check_health(self) -> None:
        """Called by Ray every few seconds; a replica that raises is replaced.

        Raises:
            EngineDeadError: the engine is dead, or gives no sign of life.
        """
        if not self._engine.is_healthy():
            raise EngineDeadError(self._engine.state_detail or "the engine gives no sign of life")

    async def __del__(self) -> None:
        """Called by Ray once the open requests have ended, or their time is up."""
        for task in getattr(self, "_tasks", ()):
            task.cancel()
        await self._engine.shutdown()

    async def _leave_with_engine(self) -> None:
        while self._engine.state is not EngineState.DEAD:
            await asyncio.sleep(WATCH_SECONDS)
        logger.error("the engine is dead, and this replica leaves: %s", self._engine.state_detail)
        os._exit(1)

    async def _report(self) -> None:
        """Tell every ingress process how this replica is."""
        from ray import serve  # pyright: ignore[reportMissingImports]

        ingress = serve.get_deployment_handle(INGRESS_DEPLOYMENT, serve.get_replica_context().app_name)
        while True:
            report = self._describe(serve.get_replica_context().rank.rank)
            try:
                await ingress.broadcast("hear", report).results_async(timeout_s=REPORT_SECONDS, return_exceptions=True)
            except Exception as error:  # none is there yet, or any more
                logger.debug("no ingress can be told: %s", error)
            await asyncio.sleep(REPORT_SECONDS)

    def _describe(self, rank: int) -> ReplicaReport:
        metrics: ServerMetrics = self._app.state.serving.metrics
        return ReplicaReport(
            rank=rank,
            state=str(self._engine.state),
            healthy=self._engine.is_healthy(),
            num_open_requests=self._engine.num_open_requests,
            metrics=metrics.exposition("")[0].decode(),
        )
