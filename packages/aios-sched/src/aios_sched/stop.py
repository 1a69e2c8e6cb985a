"""When a request is done, judged by its tokens. (Stop strings are a matter of text: the layer above watches those.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_sched.request import FinishReason, Request


@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Why a request ends.

    Attributes:
        reason: "stop" or "length".
        token_id: The id of `params.stop_token_ids` that was met; None for end-of-sequence, as in vLLM.
    """

    reason: FinishReason
    token_id: int | None = None


def check_stop(request: Request, *, max_model_len: int) -> Stop | None:
    """Whether the newest output token ends the request; None if it goes on.

    A stop token is looked at first: met on the last token allowed, it is still a "stop". It counts once `min_tokens`
    tokens stand before it; until then the sampler does not draw it, unless `allowed_token_ids` leaves nothing else.
    Where the output has a form to keep, nothing else is left only if it is complete: then the stop token wins.
    """
    output = request.output_token_ids
    token_id = output[-1]
    params = request.params
    counts = len(output) > params.min_tokens or params.structured_outputs is not None
    if counts and token_id in request.stop_token_ids:
        is_eos = token_id in request.eos_token_ids and not params.ignore_eos
        return Stop(reason="stop", token_id=None if is_eos else token_id)
    if len(output) == request.max_tokens or len(request.token_ids) >= max_model_len:
        return Stop(reason="length")
    return None
