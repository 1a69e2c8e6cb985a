"""The replicas of one deployment, as the ingress sees them. Ray's exceptions end here; what goes on is ours."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from aios_sched.errors import QueueFullError
from aios_serve.errors import EngineUnavailableError
from aios_serve.ray_app.asgi_call import AnswerStart, AsgiCall
from aios_serve.ray_app.errors import ReplicaLostError

if TYPE_CHECKING:
    from aios_serve.ray_app.roll_call import RollCall


class RayReplicas:
    """Implements ReplicaPool for a DeploymentHandle.

    Args:
        handle: Of the deployment of `EngineReplica`.
        roll_call: Hears of the replicas that run.
    """

    def __init__(self, handle: Any, roll_call: RollCall) -> None:
        self._streaming = handle.options(stream=True)
        self._roll_call = roll_call

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

    def is_up(self) -> bool:
        """See ReplicaPool."""
        return bool(self._roll_call.reports())


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
