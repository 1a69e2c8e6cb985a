"""What a planner has to refuse."""

from __future__ import annotations

from aios_parallel.errors import ParallelError


class PlanError(ParallelError, ValueError):
    """A model cannot be spread over devices as asked, or does not fit those there are; says what would."""
