"""One request and where it stands.

    WAITING ──► RUNNING ──► FINISHED
                 │   ▲
                 ▼   │
               PREEMPTED

There is no "prefill" or "decode" state. A request has `num_tokens` known tokens, of which `num_computed_tokens` have
their keys and values in the cache and `num_in_flight_tokens` are being computed right now; a step takes some of the
rest. A fresh prompt, the next chunk of a long one, a single new token and a whole prefix to compute again after a
preemption differ only in how large that rest is.
"""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.sampling.params import SamplingParams

FinishReason = Literal["stop", "length", "abort", "error", "timeout"]

DEFAULT_TENANT = "default"


class RequestStatus(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTED = "preempted"
    FINISHED = "finished"


class Request:
    """A prompt, what is wanted of it, and how far it got. The scheduler alone changes it.

    Args:
        request_id: Unique among unfinished requests.
        prompt_token_ids: The prompt.
        params: How to sample and when to stop.
        seed: Keys the sampling noise, together with a token's position; the same seed gives the same tokens again.
        eos_token_ids: Tokens with which the model ends its answer.
        arrival_time: In seconds of `time.monotonic()`, which the processes of one machine share; None means now.
        priority: Lower is more important, as in vLLM; for the policy "priority" only.
        tenant: Who shares the engine with whom: the policy "fair" serves tenants evenly.
        deadline: In seconds of `time.monotonic()`: unfinished then, it ends with finish_reason "timeout"; None waits
            as long as it takes.
        cache_salt: Only requests with the same salt share cached pages.
        reads_output: Whether a logits processor looks at the tokens that were drawn: then it is never planned ahead.

    Attributes:
        token_ids: Prompt and output, in one list. Kept through preemption: outputs are never sampled twice.
        output_token_ids: The output alone.
        num_computed_tokens: Tokens, from the first, whose keys and values are in the cache.
        num_in_flight_tokens: Tokens behind those, in steps that were submitted and have not returned. Drafts that go
            with them do not count.
        num_in_flight_drafts: Those drafts.
        awaits_drafts: Whether its next row is to have drafts, so that it is not planned ahead.
        draft_token_ids: Guesses of the tokens behind the known ones, for the next step to check; see `drafting.py`.
        num_cached_tokens: Tokens of the prompt that were found in the prefix cache when it first ran.
        stop_token_ids: The tokens that end this request.
        max_tokens: Most output tokens; the scheduler resolves None of the params to what the context leaves.
        arrival_order: Position in the order of arrival, given by the scheduler.
        rank: Given by the policy; with the order of arrival it says who is more important. Lower is more.
        num_preemptions: How often it lost its pages.
        has_lost_pages: Whether a page did not come back from a tier: once no step is on its way, it starts over.
        reads_output: Whether the next draw needs the tokens drawn so far on the host, for that or for a penalty.
        use_tiers: Whether to look for its pages below the pool; not again after it lost some there.
        finish_reason: "stop", "length", "abort", "error" or "timeout" once finished.
        stop_reason: The id of `params.stop_token_ids` that ended it; None for end-of-sequence and other reasons.
    """

    __slots__ = (
        "arrival_order",
        "arrival_time",
        "awaits_drafts",
        "cache_salt",
        "deadline",
        "draft_token_ids",
        "eos_token_ids",
        "finish_reason",
        "finished_time",
        "first_scheduled_time",
        "first_token_time",
        "has_lost_pages",
        "max_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight_drafts",
        "num_in_flight_tokens",
        "num_preemptions",
        "output_token_ids",
        "params",
        "priority",
        "prompt_token_ids",
        "rank",
        "reads_output",
        "request_id",
        "seed",
        "status",
        "stop_reason",
        "stop_token_ids",
        "tenant",
        "token_ids",
        "use_tiers",
    )

    def __init__(
        self,
        *,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        seed: int,
        eos_token_ids: Sequence[int],
        arrival_time: float | None = None,
        priority: int = 0,
        cache_salt: str = "",
        tenant: str = DEFAULT_TENANT,
        deadline: float | None = None,
        reads_output: bool = False,
    ) -> None:
        self.request_id = request_id
        self.prompt_token_ids = list(prompt_token_ids)
        self.params = params
        self.seed = seed
        self.eos_token_ids = frozenset(eos_token_ids)
        self.arrival_time = time.monotonic() if arrival_time is None else arrival_time
        self.priority = priority
        self.cache_salt = cache_salt
        self.tenant = tenant
        self.deadline = deadline
        self.reads_output = reads_output or params.reads_output
        # Told to ignore the end of sequence, the model may write it like any other token.
        self.stop_token_ids = frozenset(params.stop_token_ids).union(() if params.ignore_eos else eos_token_ids)

        self.status = RequestStatus.WAITING
        self.token_ids = list(self.prompt_token_ids)
        self.output_token_ids: list[int] = []
        self.draft_token_ids: list[int] = []
        self.num_in_flight_drafts = 0
        self.awaits_drafts = False
        self.num_computed_tokens = 0
        self.num_in_flight_tokens = 0
        self.num_cached_tokens = 0
        self.num_preemptions = 0
        self.has_lost_pages = False
        self.use_tiers = True
        self.max_tokens = params.max_tokens
        self.arrival_order = 0
        self.rank = 0.0
        self.finish_reason: FinishReason | None = None
        self.stop_reason: int | None = None
        self.first_scheduled_time: float | None = None
        self.first_token_time: float | None = None
        self.finished_time: float | None = None

    @property
    def num_tokens(self) -> int:
        """Known tokens: prompt and output."""
        return len(self.token_ids)

    @property
    def num_new_tokens(self) -> int:
        """Known tokens that are neither computed nor being computed: what a step may take.

        -1 while a token is being computed that is not known here, see `ahead.py`.
        """
        return len(self.token_ids) - self.num_computed_tokens - self.num_in_flight_tokens

    def append_token(self, token_id: int) -> None:
        """Adds a sampled token. It is known now, but not computed."""
        self.token_ids.append(token_id)
        self.output_token_ids.append(token_id)

    def importance(self) -> tuple[float, int]:
        """Sorts requests: whoever is smaller gets pages first and loses them last. Fixed while it has any."""
        return (self.rank, self.arrival_order)

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, {self.status.value}, {len(self.prompt_token_ids)} prompt "
            f"+ {len(self.output_token_ids)} output tokens, {self.num_computed_tokens} computed, "
            f"{self.num_in_flight_tokens} in flight)"
        )
