"""What every route needs: the engine, the options, and the answer to "is this model served, and now?"."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated

from fastapi import Depends, Request

from aios_serve.async_engine import EngineState
from aios_serve.error_responses import ApiError
from aios_serve.errors import EngineDeadError, EngineDrainingError, EngineLoadingError, EngineRestartingError
from aios_serve.request_identity import identity_of

if TYPE_CHECKING:
    from aios_serve.async_engine import AsyncEngine
    from aios_serve.metrics import ServerMetrics
    from aios_serve.server_config import ServerConfig
    from aios_serve.tenants.visit import Visit


@dataclass(kw_only=True)
class Serving:
    """One per application, reached from routes through `ServingDep`."""

    engine: AsyncEngine
    config: ServerConfig
    metrics: ServerMetrics
    started_at: int = field(default_factory=lambda: int(time.time()))

    def ready_engine(self) -> AsyncEngine:
        """The engine, if it takes requests.

        Raises:
            EngineUnavailableError: loading, draining, restarting or dead, with what is known about it.
        """
        match self.engine.state:
            case EngineState.READY:
                return self.engine
            case EngineState.LOADING:
                raise EngineLoadingError(f"The model is being loaded: {self.engine.state_detail or 'starting'}.")
            case EngineState.DRAINING:
                raise EngineDrainingError("The server is shutting down and takes no new requests.")
            case EngineState.RESTARTING:
                raise EngineRestartingError(self.engine.state_detail)
            case _:
                raise EngineDeadError(self.engine.state_detail)

    def served_name(self, model: str | None, visit: Visit) -> str:
        """The name to answer with: `model` if it is served to this tenant, the first such name if it is None.

        Raises:
            ApiError: 404, listing what is served to it.
        """
        names = visit.allowed(self.engine.model_names)
        if model is None and names:
            return names[0]
        if model not in names:
            served = ", ".join(repr(name) for name in names) or f"nothing that tenant {visit.tenant.name!r} may use"
            model = model or ""
            message = f"The model {model[:200]!r} is not served here; served: {served}."
            raise ApiError(404, message, code="model_not_found", param="model")
        return model


def new_id(prefix: str, request: Request, *, separator: str = "-") -> str:
    """An id for one answer. Never taken from the client: two requests with one X-Request-Id are two requests."""
    identity = identity_of(request.scope)
    return f"{prefix}{separator}{uuid.uuid4().hex if identity is None else identity.id}"


async def _serving(request: Request) -> Serving:
    return request.app.state.serving


ServingDep = Annotated[Serving, Depends(_serving)]
