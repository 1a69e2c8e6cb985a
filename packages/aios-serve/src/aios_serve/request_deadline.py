"""How long a request may take, as its body says it."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from aios_model.errors import InvalidRequestError

if TYPE_CHECKING:
    from aios_serve.openai_types import SamplingFields


def deadline_of(body: SamplingFields) -> float | None:
    """When the request must be done, in seconds of `time.monotonic()`; None if it may take as long as it likes.

    `timeout` is in seconds from now, `deadline` in seconds of Unix time; of both, the earlier counts.

    Raises:
        InvalidRequestError: the deadline is in the past.
    """
    seconds = [] if body.timeout is None else [body.timeout]
    if body.deadline is not None:
        left = body.deadline - time.time()
        if left <= 0:
            raise InvalidRequestError(
                f"deadline={body.deadline:.3f} passed {-left:.3f} s ago by this server's clock; it is in seconds of "
                "Unix time, and must lie in the future",
                param="deadline",
            )
        seconds.append(left)
    return time.monotonic() + min(seconds) if seconds else None
