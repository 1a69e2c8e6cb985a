"""What can go wrong between ranks."""

from __future__ import annotations

from aios_model.errors import AiosError
from aios_sched.errors import ExecutorLostError


class ParallelError(AiosError):
    """Root of what goes wrong between ranks."""


class CollectiveTimeoutError(ParallelError):
    """A rank waited too long for another one; the group can no longer be used."""


class RankFailedError(ParallelError, ExecutorLostError):
    """A rank died, hung or reported an error that leaves the group out of step; the group can no longer be used."""


class WireError(ParallelError):
    """A control message that is none, or that comes from somebody without the run's token."""
