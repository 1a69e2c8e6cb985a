"""From logits to tokens: parameters, bans and penalties, top-k, top-p, noise, log probabilities.

`SamplingParams`, the rows and the errors import no torch; `Sampler` does. Names are loaded on first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_model.sampling.bad_words import resolve_bad_words
    from aios_model.sampling.device_sampler import DeviceSampler, LaunchedSample
    from aios_model.sampling.drafted_rows import rows_with_drafts
    from aios_model.sampling.drawer import Drawer
    from aios_model.sampling.errors import NonFiniteLogitsError, NoTokenLeftError, SamplingError
    from aios_model.sampling.logprobs import token_logprobs
    from aios_model.sampling.params import SamplingParams
    from aios_model.sampling.processors import LogitsProcessor
    from aios_model.sampling.rows import SampledToken, SamplingRow, TokenLogprobs
    from aios_model.sampling.sampler import Sampler

__all__ = [
    "DeviceSampler",
    "Drawer",
    "LaunchedSample",
    "LogitsProcessor",
    "NoTokenLeftError",
    "NonFiniteLogitsError",
    "SampledToken",
    "Sampler",
    "SamplingError",
    "SamplingParams",
    "SamplingRow",
    "TokenLogprobs",
    "resolve_bad_words",
    "rows_with_drafts",
    "token_logprobs",
]

_MODULES = {
    "DeviceSampler": "device_sampler",
    "Drawer": "drawer",
    "LaunchedSample": "device_sampler",
    "LogitsProcessor": "processors",
    "NoTokenLeftError": "errors",
    "NonFiniteLogitsError": "errors",
    "SampledToken": "rows",
    "Sampler": "sampler",
    "SamplingError": "errors",
    "SamplingParams": "params",
    "SamplingRow": "rows",
    "TokenLogprobs": "rows",
    "resolve_bad_words": "bad_words",
    "rows_with_drafts": "drafted_rows",
    "token_logprobs": "logprobs",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
