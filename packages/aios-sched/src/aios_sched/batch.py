"""From a step as plain data to tensors: all its tokens packed along one dimension, without padding.

Legend: T packed tokens of all requests, S rows that sample: one of each request that does, and one for each draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import torch

from aios_kvcache.paged_cache import SequenceSlice
from aios_model.sampling.drafted_rows import rows_with_drafts
from aios_model.transfers import upload
from aios_sched.output import PENDING_TOKEN

if TYPE_CHECKING:
    from aios_model.sampling.rows import SamplingRow
    from aios_sched.output import SchedulerOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedBatch:
    """A step, ready for the decoder.

    Attributes:
        tokens_T: Token ids, int64; one request's tokens stand together, prefill chunks and decodes side by side.
        positions_T: Each token's position in its own sequence, int64.
        sequences: For the cache: which tokens belong together and which pages are theirs.
        sample_rows_S: Where in T the tokens stand behind which one is drawn, int64: the last known one of each request
            that samples, and its drafts.
        sampling: How to draw for those S rows.
        has_drafts: Whether some requests have more than one of them.
        pending: Places in T whose tokens are still being sampled, each with the request whose token belongs there.
    """

    tokens_T: torch.Tensor
    positions_T: torch.Tensor
    sequences: list[SequenceSlice]
    sample_rows_S: torch.Tensor
    sampling: list[SamplingRow]
    pending: list[tuple[int, str]]
    has_drafts: bool = False


def pack(output: SchedulerOutput, *, device: torch.device) -> PackedBatch:
    """Packs the requests of a step in their order.

    Each tensor is built from one list: one call into torch for 64 requests, rather than 64 small ones to concatenate.
    """
    requests = output.requests
    rows: list[int] = []
    sampling: list[SamplingRow] = []
    pending: list[tuple[int, str]] = []
    num_tokens, has_drafts = 0, False
    for request in requests:
        if request.token_ids[0] == PENDING_TOKEN:
            pending.append((num_tokens, request.request_id))
        num_tokens += len(request.token_ids)
        if request.num_drafts:
            has_drafts = True
            assert request.sampling is not None, "drafts stand behind the last known token"
            rows += range(num_tokens - 1 - request.num_drafts, num_tokens)
            sampling += rows_with_drafts(request.sampling, request.token_ids[request.num_known_tokens :])
        elif request.sampling is not None:
            rows.append(num_tokens - 1)
            sampling.append(request.sampling)
    tokens = chain.from_iterable(request.token_ids for request in requests)
    positions = chain.from_iterable(range(r.start, r.start + len(r.token_ids)) for r in requests)
    return PackedBatch(
        tokens_T=upload(list(tokens), dtype=torch.int64, device=device),
        positions_T=upload(list(positions), dtype=torch.int64, device=device),
        sequences=[SequenceSlice(start=r.start, length=len(r.token_ids), block_table=r.block_table) for r in requests],
        sample_rows_S=upload(rows, dtype=torch.int64, device=device),
        sampling=sampling,
        pending=pending,
        has_drafts=has_drafts,
    )
