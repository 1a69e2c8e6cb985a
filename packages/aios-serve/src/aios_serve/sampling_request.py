"""From a checked request body to what the engine takes: SamplingParams, with the model's own defaults filled in."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from aios_model.sampling.params import SamplingParams
from aios_serve.structured_request import structured_outputs_of

if TYPE_CHECKING:
    from aios_model.generation_config import GenerationDefaults
    from aios_serve.openai_types import ChatCompletionRequest, CompletionRequest, SamplingFields

COMPLETION_MAX_TOKENS = 16
"""Default of `/v1/completions`, as OpenAI's. The default of chat completions is what the context has left."""

_FIELDS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "seed",
    "min_tokens",
    "stop",
    "stop_token_ids",
    "include_stop_str_in_output",
    "ignore_eos",
    "logit_bias",
    "allowed_token_ids",
    "bad_words",
    "skip_special_tokens",
)


def completion_params(body: CompletionRequest, defaults: GenerationDefaults) -> SamplingParams:
    """Sampling parameters of a completion.

    Raises:
        InvalidRequestError: a parameter out of range; `param` names it.
    """
    return _params(body, defaults, max_tokens=body.max_tokens, logprobs=body.logprobs)


def chat_params(body: ChatCompletionRequest, defaults: GenerationDefaults) -> SamplingParams:
    """Sampling parameters of a chat completion.

    Raises:
        InvalidRequestError: a parameter out of range; `param` names it.
    """
    max_tokens = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    logprobs = (body.top_logprobs or 0) if body.logprobs else None
    return _params(body, defaults, max_tokens=max_tokens, logprobs=logprobs)


def with_default_max_tokens(params: SamplingParams, default: int | None, *, room: int) -> SamplingParams:
    """`params` with `max_tokens` filled in if the request left it out: `default`, as far as the context has `room`."""
    if params.max_tokens is not None:
        return params
    return replace(params, max_tokens=room if default is None else min(default, room))


def _params(
    body: SamplingFields, defaults: GenerationDefaults, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """What the request says, else what the model's generation_config says, else what the API says."""
    given = {name: getattr(body, name) for name in _FIELDS}
    given["structured_outputs"] = structured_outputs_of(body)
    return SamplingParams.from_optional({**given, "max_tokens": max_tokens, "logprobs": logprobs}, defaults=defaults)
