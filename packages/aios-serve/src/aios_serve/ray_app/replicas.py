"""The replicas of one deployment, as the ingress sees them: one is asked to answer, or all are asked how they are.

Ray's exceptions end here; what goes on is ours.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from aios_sched.errors import QueueFullError
from aios_serve.errors import EngineUnavailableError
from aios_serve.ray_app.asgi_call import AnswerStart, AsgiCall
from aios_serve.ray_app.errors import ReplicaLostError

logger = logging.getLogger(__name__)

REPORT_AGE_SECONDS = 0.25
"""Reports are asked for at most so often: `/health` is public."""

REPORT_TIMEOUT_SECONDS = 3.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """How one replica is.

    Attributes:
        rank: 0 for the first one; a replica that takes the place of another takes its rank.
        pid: Its process, on its node.
        state: State of its engine: "ready", "draining", …
        healthy: Whether the engine moves.
        num_open_requests: Requests that are being generated or wait for it.
    """

    rank: int
    pid: int
    state: str
    healthy: bool
    num_open_requests: int


class RayReplicas:
    """Implements ReplicaPool for a DeploymentHandle.

    Args:
        handle: Of the deployment of `EngineReplica`.
    """

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)
        self._reports: list[ReplicaReport] = []
        self._reports_until = 0.0
        self._asking = asyncio.Lock()

    async def call(self, call: AsgiCall) -> AsyncGenerator[AnswerStart | bytes]:
        """See ReplicaPool."""
        response = self._streaming.answer.remote(call)
        try:
            async for part in response:
                yield part
        except Exception as error:
            raise _ours(error) from error
        except BaseException:  # closed or cancelled: nobody waits for it any more
            with suppress(Exception):  # of a request that had failed, cancelling raises the failure
                response.cancel()
            raise

    async def is_up(self) -> bool:
        """See ReplicaPool."""
        return bool(await self.reports())

    async def reports(self) -> list[ReplicaReport]:
        """How the running replicas are, by rank, at most a quarter of a second old; empty if none is running."""
        async with self._asking:
            if time.monotonic() >= self._reports_until:
                self._reports = sorted(await self._ask_all("report"), key=lambda report: report.rank)
                self._reports_until = time.monotonic() + REPORT_AGE_SECONDS
            return self._reports

    async def metrics(self) -> list[tuple[int, str]]:
        """Rank of each running replica with its metrics, in Prometheus' text format."""
        return sorted(await self._ask_all("metrics"))

    async def _ask_all(self, method: str) -> list[Any]:
        """What each running replica answers; one that fails to is left out."""
        try:
            answers = await self._handle.broadcast(method).results_async(
                timeout_s=REPORT_TIMEOUT_SECONDS, return_exceptions=True
            )
        except Exception as error:
            logger.debug("no replica can be asked: %s", error)
            return []
        return [answer for answer in answers if not isinstance(answer, BaseException)]


def _ours(error: Exception) -> Exception:
    """The error of our tree that says what `error`, raised by Ray, means for a request."""
    from ray.exceptions import RayActorError  # pyright: ignore[reportMissingImports]
    from ray.serve.exceptions import (  # pyright: ignore[reportMissingImports]
        BackPressureError,
        DeploymentUnavailableError,
    )

    match error:
        case RayActorError() | ReplicaLostError():
            return ReplicaLostError("The replica that worked on this request stopped; send the request again.")
        case BackPressureError():
            return QueueFullError("as many requests wait for a replica as may; try again later")
        case DeploymentUnavailableError():
            return EngineUnavailableError("The replicas cannot be started; the server's log says why.")
        case _:
            return error
