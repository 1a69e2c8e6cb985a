"""What can go wrong while comparing engines."""

from __future__ import annotations

from aios_model.errors import AiosError


class BenchError(AiosError):
    """A peer cannot be installed, a model file cannot be made, or nothing could be measured."""
