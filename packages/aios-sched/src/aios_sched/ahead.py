"""Which requests may be planned ahead: a step while the one that samples their next token still computes.

A device that computes on its own, such as a GPU, has nothing to do while Python applies a step and plans the next. With
`SchedulerConfig.schedule_ahead` the next step is planned and launched before that: it computes a token that nobody on
the host knows yet, and the runner puts it in its place on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

from aios_model.sampling.rows import SamplingRow
from aios_sched.errors import PendingTokenError
from aios_sched.output import PENDING_TOKEN, ScheduledRequest

if TYPE_CHECKING:
    from aios_sched.request import Request


def may_run_ahead(request: Request, *, max_model_len: int) -> bool:
    """Whether a step may compute the token that is on its way to this request, before it is known.

    Not if that token is certain to be its last, and not if what comes behind it depends on it beyond the model: a
    penalty, or whatever else reads the output on the host, or drafts, which stand behind a token that is known. Such a
    request waits for its token. It may still turn out that the token was the last (end of sequence, abort): then one
    row was computed in vain.
    """
    assert request.max_tokens is not None, "the scheduler resolves it"
    return (
        not request.reads_output
        and not request.awaits_drafts
        and not request.num_in_flight_drafts  # nobody knows yet which position comes next
        and len(request.output_token_ids) + 1 < request.max_tokens
        and len(request.token_ids) + 1 < max_model_len
    )


def row_ahead(request: Request, block_table: list[int]) -> ScheduledRequest:
    """The row that computes the token on its way to `request`, and draws the one behind it.

    Args:
        request: One that may run ahead.
        block_table: Its pages, with room for that token.
    """
    num_tokens = len(request.token_ids)
    sampling = SamplingRow(
        request_id=request.request_id,
        params=request.params,
        seed=request.seed,
        position=num_tokens + 1,
        prompt_token_ids=request.prompt_token_ids,
        output_token_ids=PendingOutput(len(request.output_token_ids) + 1),
        stop_token_ids=request.stop_token_ids,
    )
    return ScheduledRequest(
        request_id=request.request_id,
        token_ids=[PENDING_TOKEN],
        start=num_tokens,
        block_table=block_table,
        sampling=sampling,
    )


class PendingOutput(Sequence[int]):
    """The output of a request that was planned ahead: so long, and its newest token is not known.

    Args:
        num_tokens: Output tokens, the one on its way included.

    Raises:
        PendingTokenError: When it is asked for a token, rather than for its length.
    """

    __slots__ = ("_num_tokens",)

    def __init__(self, num_tokens: int) -> None:
        self._num_tokens = num_tokens

    def __len__(self) -> int:
        return self._num_tokens

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[int]: ...

    def __getitem__(self, index: int | slice) -> int | Sequence[int]:
        raise PendingTokenError(
            f"output token {index} was asked for while the newest of {self._num_tokens} is still being computed; "
            "whoever gives a request something that reads its output must make it with reads_output=True"
        )

    def __repr__(self) -> str:
        return f"PendingOutput({self._num_tokens})"
