"""What can happen to a replica while it answers, hung on the tree of `aios_serve.errors`.

EngineUnavailableError
 └─ ReplicaLostError      the replica stopped before its answer was complete: asked again elsewhere, or a 503
"""

from __future__ import annotations

from aios_serve.errors import EngineUnavailableError


class ReplicaLostError(EngineUnavailableError):
    """The replica that worked on a request stopped, or cannot be reached any more."""
