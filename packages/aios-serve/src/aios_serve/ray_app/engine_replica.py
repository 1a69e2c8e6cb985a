"""One replica: an AsyncEngine with its engine process, and the plain server's application around it."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING

from rich.console import Console

from aios_serve.app import create_app
from aios_serve.async_engine import AsyncEngine, EngineState
from aios_serve.errors import EngineDeadError
from aios_serve.logging_setup import configure_logging
from aios_serve.ray_app.asgi_call import AnswerStart, AsgiCall, call_app
from aios_serve.ray_app.errors import ReplicaLostError
from aios_serve.ray_app.replicas import ReplicaReport

if TYPE_CHECKING:
    from fastapi import FastAPI

    from aios_serve.config import EngineConfig
    from aios_serve.metrics import ServerMetrics
    from aios_serve.server_config import ServerConfig

logger = logging.getLogger(__name__)

WATCH_SECONDS = 0.1


class EngineReplica:
    """The class that Ray Serve makes replicas of. It counts as running once its model is loaded.

    A replica whose engine has died ends its process: Ray then takes it out of rotation at once and starts another,
    while one that stayed would look idle and draw requests to fail them. If the replica dies, its engine leaves by
    itself.
    """

    async def __init__(self, engine_config: EngineConfig, server_config: ServerConfig) -> None:
        configure_logging(engine_config.log_level, Console(stderr=True))
        self._engine = AsyncEngine(engine_config)
        self._app: FastAPI = create_app(self._engine, server_config)
        await self._engine.start()
        try:
            await self._engine.wait_ready()
        except BaseException:
            await self._engine.shutdown()
            raise
        self._watch = asyncio.create_task(self._leave_with_engine())

    async def answer(self, call: AsgiCall) -> AsyncGenerator[AnswerStart | bytes]:
        """Answer one request, in the pieces of `call_app`.

        Raises:
            ReplicaLostError: the engine is dead; another replica may answer.
        """
        async for part in call_app(self._app, call):
            if isinstance(part, AnswerStart) and part.status == 503 and self._engine.state is EngineState.DEAD:
                raise ReplicaLostError("the replica's engine has stopped")
            yield part

    async def report(self) -> ReplicaReport:
        """How this replica is."""
        return ReplicaReport(
            rank=_rank(),
            pid=os.getpid(),
            state=str(self._engine.state),
            healthy=self._engine.is_healthy(),
            num_open_requests=self._engine.num_open_requests,
        )

    async def metrics(self) -> tuple[int, str]:
        """The rank, and the metrics in Prometheus' text format."""
        metrics: ServerMetrics = self._app.state.serving.metrics
        text, _ = metrics.exposition("")
        return _rank(), text.decode()

    async def check_health(self) -> None:
        """Called by Ray every few seconds; a replica that raises is replaced.

        Raises:
            EngineDeadError: the engine is dead, or gives no sign of life.
        """
        if not self._engine.is_healthy():
            raise EngineDeadError(self._engine.state_detail or "the engine gives no sign of life")

    async def __del__(self) -> None:
        """Called by Ray once the open requests have ended, or their time is up."""
        watch = getattr(self, "_watch", None)
        if watch is not None:
            watch.cancel()
            await self._engine.shutdown()

    async def _leave_with_engine(self) -> None:
        while self._engine.state is not EngineState.DEAD:
            await asyncio.sleep(WATCH_SECONDS)
        logger.error("the engine is dead, and this replica leaves: %s", self._engine.state_detail)
        os._exit(1)


def _rank() -> int:
    from ray import serve  # pyright: ignore[reportMissingImports]

    return serve.get_replica_context().rank.rank
