"""What can go wrong between a request and its step.

    AiosError
     ├─ QueueFullError         too many requests wait already; try again later
     ├─ SchedulingError        planning a step failed at one request
     ├─ StepResultError        a step came back without a token that it owed
     ├─ PendingTokenError      a token was asked for that is still being computed
     ├─ ProposerError          whoever drafts tokens did not answer as asked
     └─ ExecutorLostError      what runs the steps is gone, and with it all keys and values

Only QueueFullError reaches the caller of `Engine.add`. SchedulingError and StepResultError end one request each, with
finish_reason "error"; PendingTokenError fails a step, like any error of a model; ProposerError costs drafts only;
ExecutorLostError ends the engine.
"""

from __future__ import annotations

from aios_model.errors import AiosError


class QueueFullError(AiosError):
    """As many requests wait as may wait."""


class SchedulingError(AiosError):
    """Planning a step failed at one request; `__cause__` is what went wrong.

    Attributes:
        request_id: The request that was being planned.
    """

    def __init__(self, request_id: str, cause: Exception) -> None:
        super().__init__(f"scheduling request {request_id!r} failed: {describe(cause)}")
        self.request_id = request_id


class StepResultError(AiosError):
    """A step came back without a token that it was asked to sample, or out of order."""


class PendingTokenError(AiosError):
    """A token was asked for on the host, or on a runner that does not have it, while a step still computes it."""


class ProposerError(AiosError):
    """A proposer did not do what `Proposer` asks of it, or cannot be made as asked."""


class ExecutorLostError(AiosError):
    """What runs the steps is gone: another process died, or hangs. No step can run any more."""


def describe(error: BaseException) -> str:
    """One line about an error: AIOS's own messages as they are, others with the name of their type."""
    return str(error) if isinstance(error, AiosError) else f"{type(error).__name__}: {error}"
