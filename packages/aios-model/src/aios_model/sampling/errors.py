"""Errors of the sampler. Each names the requests at fault, so that the engine can fail those alone.

AiosError
 └─ SamplingError            no token could be drawn for some requests
     ├─ NonFiniteLogitsError     the model gave NaN or +inf
     ├─ NoTokenLeftError         allowed ids and logits processors together exclude every token
     └─ NoProcessorError         structured_outputs, and no logits processor that knows what they mean
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from aios_model.errors import AiosError

if TYPE_CHECKING:
    from collections.abc import Sequence


class SamplingError(AiosError):
    """No token can be drawn for some requests of a batch; nothing was drawn for the others either.

    Attributes:
        request_ids: Requests at fault. Without them the rest can be sampled again, and may name further ones.
    """

    def __init__(self, message: str, *, request_ids: Sequence[str]) -> None:
        super().__init__(message)
        self.request_ids = tuple(request_ids)


class NonFiniteLogitsError(SamplingError):
    """The logits of some requests hold NaN or +inf, so there is no distribution to draw from."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        super().__init__(
            f"the model returned NaN or infinite logits for request {', '.join(request_ids)}; "
            "the weights may be corrupted, or the dtype too narrow for this model",
            request_ids=request_ids,
        )


class NoTokenLeftError(SamplingError):
    """Every token of some requests is excluded, even with bad_words and min_tokens set aside."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        super().__init__(
            f"no token is left to choose from for request {', '.join(request_ids)}; "
            "allowed_token_ids and the logits processors together exclude the whole vocabulary",
            request_ids=request_ids,
        )


class NoProcessorError(SamplingError):
    """Requests ask for structured outputs, and the sampler was built without a processor for them."""

    def __init__(self, request_ids: Sequence[str]) -> None:
        super().__init__(
            f"structured_outputs cannot be honoured for request {', '.join(request_ids)}: this sampler was built "
            "without a logits processor for them; use aios_serve's InferenceEngine or aios-serve",
            request_ids=request_ids,
        )
