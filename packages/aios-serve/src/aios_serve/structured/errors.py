"""What can go wrong with a constraint.

AiosError
 ├─ InvalidRequestError
 │   └─ GrammarError             it cannot be compiled: answer 400
 ├─ SamplingError
 │   └─ ConstraintFailedError    it could not be followed any further: this request fails, the others go on
 └─ CheckerLostError             constraints cannot be checked here at all: answer 500, and the log says why
"""

from __future__ import annotations

from aios_model.errors import AiosError, InvalidRequestError
from aios_model.sampling.errors import SamplingError


class GrammarError(InvalidRequestError):
    """A constraint that cannot be compiled; `param` is the field that holds it."""


class ConstraintFailedError(SamplingError):
    """The constraints of some requests could not be followed any further."""

    def __init__(self, reasons: dict[str, str]) -> None:
        texts = "; ".join(f"request {request_id}: {reason}" for request_id, reason in reasons.items())
        super().__init__(f"structured_outputs could not be followed: {texts}", request_ids=tuple(reasons))


class CheckerLostError(AiosError):
    """The process that compiles constraints cannot be started."""
