"""How to speculate, in the words of vLLM's `--speculative-config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from aios_model.errors import ConfigError

METHODS: dict[str, tuple[str, ...]] = {
    "ngram": ("prompt_lookup_max", "prompt_lookup_min"),
}
"""Who drafts, and the options that each method has beside those of all methods."""

MAX_DRAFTS = 32
"""Most drafts of a request in one step. More are never right, and the sampler remembers no further back."""

_MAX_NGRAM = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Who guesses tokens ahead, and how many. The output is the same with every setting.

    Attributes:
        method: "ngram" looks for what followed the last tokens when they occurred before.
        num_speculative_tokens: Drafts per request and step, at most.
        prompt_lookup_max: "ngram": most tokens to look for; None is 4, or `prompt_lookup_min` if that is more.
        prompt_lookup_min: "ngram": fewest tokens to look for; None is 2, or `prompt_lookup_max` if that is less.

    Raises:
        ConfigError: A method that does not exist, an option that the method does not have, or a value out of range.
    """

    method: str
    num_speculative_tokens: int = 4
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise _bad("method", self.method, f"choose one of {', '.join(METHODS)}")
        for name, hint in get_type_hints(type(self)).items():
            value = getattr(self, name)
            if type(value) not in (get_args(hint) or (hint,)):
                raise _bad(name, value, "it must be a whole number")
        for name in (field.name for field in fields(self)):
            if name not in _options(self.method) and getattr(self, name) is not None:
                raise _bad(name, getattr(self, name), f"method {self.method!r} has no such option")
        if not 1 <= self.num_speculative_tokens <= MAX_DRAFTS:
            raise _bad("num_speculative_tokens", self.num_speculative_tokens, f"it must be 1 to {MAX_DRAFTS}")
        low, high = self.ngram_sizes
        if not 1 <= low <= high <= _MAX_NGRAM:
            raise _bad(
                "prompt_lookup_min",
                low,
                f"1 <= prompt_lookup_min <= prompt_lookup_max <= {_MAX_NGRAM} must hold, and prompt_lookup_max is "
                f"{high}",
            )

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> SpeculativeConfig:
        """From what a JSON object holds.

        Raises:
            ConfigError: As above; also for unknown keys, with those that there are.
        """
        if "method" not in options:
            raise ConfigError(f"speculative: no method is given; choose one of {', '.join(METHODS)}")
        method = options["method"]
        if isinstance(method, str) and method in METHODS:
            allowed = _options(method)
            for name in options:
                if name not in allowed:
                    raise ConfigError(
                        f"speculative: unknown option {name!r}; method {method!r} takes {', '.join(allowed)}"
                    )
            return cls(**options)
        raise _bad("method", method, f"choose one of {', '.join(METHODS)}")

    @property
    def ngram_sizes(self) -> tuple[int, int]:
        """Fewest and most tokens that "ngram" looks for."""
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is None:
            low = 2 if high is None else min(2, high)
        return low, max(4, low) if high is None else high


def _options(method: str) -> tuple[str, ...]:
    return ("method", "num_speculative_tokens", *METHODS[method])


def _bad(name: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"speculative: {name}={value!r} cannot be used: {remedy}")
