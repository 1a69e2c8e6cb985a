"""The tokens that were just sampled, kept on the device: the next step computes them before the host has seen them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from aios_model.transfers import upload
from aios_sched.errors import PendingTokenError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from torch import Tensor


class NewestTokens:
    """The newest token of each request, as the device will have sampled it when it gets there.

    Nothing is copied: of every request it is noted in which step's tokens [S] its own stands, and where.
    """

    def __init__(self) -> None:
        self._places: dict[str, tuple[Tensor, int]] = {}

    def __len__(self) -> int:
        return len(self._places)

    def keep(self, request_ids: Iterable[str], token_ids_S: Tensor) -> None:
        """The newest launched step samples these tokens."""
        self._places |= {request_id: (token_ids_S, place) for place, request_id in enumerate(request_ids)}

    def forget(self, request_id: str) -> None:
        """Drops a request's token; unknown ids are ignored."""
        self._places.pop(request_id, None)

    def put(self, tokens_T: Tensor, pending: Sequence[tuple[int, str]]) -> None:
        """Writes tokens to where they are pending.

        Args:
            tokens_T: int64 [T], changed in place.
            pending: Places in T, each with the request whose newest token belongs there.

        Raises:
            PendingTokenError: No launched step samples a token of that request.
        """
        for source_S, targets, places in self._by_step(pending):
            target_P = upload(targets, dtype=torch.int64, device=tokens_T.device)
            place_P = upload(places, dtype=torch.int64, device=tokens_T.device)
            tokens_T.index_copy_(0, target_P, source_S.index_select(0, place_P))

    def _by_step(self, pending: Sequence[tuple[int, str]]) -> Iterable[tuple[Tensor, list[int], list[int]]]:
        """One entry for each step that samples some of them: nearly always the one before."""
        groups: dict[int, tuple[Tensor, list[int], list[int]]] = {}
        for target, request_id in pending:
            if request_id not in self._places:
                raise PendingTokenError(f"no step on its way samples the token of request {request_id!r} that is due")
            source_S, place = self._places[request_id]
            _, targets, places = groups.setdefault(id(source_S), (source_S, [], []))
            targets.append(target)
            places.append(place)
        return groups.values()
