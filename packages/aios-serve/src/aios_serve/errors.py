"""What can go wrong between a caller and the engine, hung on `AiosError`.

    AiosError
     ├─ EngineUnavailableError      the engine takes no requests at the moment: answer 503 with Retry-After
     │   ├─ EngineLoadingError      not ready yet
     │   ├─ EngineDrainingError     shutting down: what is running finishes, nothing new is taken
     │   ├─ EngineRestartingError   its process ended or its loop failed; it is being started again
     │   └─ EngineDeadError         the same, and it will not come back by itself
     └─ RequestFailedError          this request failed inside the engine, the others go on: answer 500

From the layers below: `InvalidRequestError` (400) and `aios_sched.errors.QueueFullError` (503).
"""

from __future__ import annotations

from aios_model.errors import AiosError


class EngineUnavailableError(AiosError):
    """The engine takes no requests at the moment."""


class EngineLoadingError(EngineUnavailableError):
    """The model is still being loaded."""


class EngineDrainingError(EngineUnavailableError):
    """The engine is shutting down and takes no new requests."""


class EngineRestartingError(EngineUnavailableError):
    """The engine process ended, failed or was stuck, and is being started again; the message says why."""


class EngineDeadError(EngineUnavailableError):
    """The engine process ended or its loop failed and will not come back; the message says why."""


class RequestFailedError(AiosError):
    """One request failed inside the engine; the others go on.

    Attributes:
        request_id: The id the caller knows the request by.
    """

    def __init__(self, message: str, *, request_id: str) -> None:
        super().__init__(message)
        self.request_id = request_id
