"""How to speculate, in the words of vLLM's `--speculative-config`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, get_args, get_type_hints

from aios_model.errors import ConfigError

METHODS: dict[str, tuple[str, ...]] = {
    "ngram": ("prompt_lookup_max", "prompt_lookup_min"),
    "suffix": ("suffix_min_match", "suffix_min_probability", "suffix_store_tokens"),
    "draft_model": ("model", "quantization"),
    "self": ("quantization",),
    "early_exit": ("num_layers",),
}
"""Who drafts, and the options that each method has beside those of all methods."""

MAX_DRAFTS = 32
"""Most drafts of a request in one step. More are never right, and the sampler remembers no further back."""

_MAX_NGRAM = 32
_KINDS: dict[type, str] = {int: "a whole number", float: "a number", bool: "true or false", str: "a text"}
_WITH_A_MODEL = ("draft_model", "self", "early_exit")


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculativeConfig:
    """Who guesses tokens ahead, and how many. The output is the same with every setting.

    Attributes:
        method: "ngram" looks for what followed the last tokens when they occurred before; "suffix" does so with matches
            of any length, in recent outputs of the same salt, too. "draft_model" is a smaller model with the same
            tokens, "self" a copy of the served one with fewer bits, "early_exit" its first layers.
        num_speculative_tokens: Drafts per request and step, at most.
        adaptive: Whether as many are made as are worth their time, down to none; else always that many.
        prompt_lookup_max: "ngram": most tokens to look for; None is 4, or `prompt_lookup_min` if that is more.
        prompt_lookup_min: "ngram": fewest tokens to look for; None is 2, or `prompt_lookup_max` if that is less.
        suffix_min_match: "suffix": shortest match, in tokens; None is 2.
        suffix_min_probability: "suffix": drafts end where all of them together are believed less; None is 0.25.
        model: "draft_model": folder, GGUF file or hub name.
        quantization: "draft_model" and "self": bits of the drafting weights; None is "auto", for "self" "int4".
        num_layers: "early_exit": how many layers draft.
        suffix_store_tokens: "suffix": tokens of recent outputs to keep, 0 for none; None is 262,144.

    Raises:
        ConfigError: A method that does not exist, an option that the method does not have, or a value out of range.
    """

    method: str
    num_speculative_tokens: int = 8
    adaptive: bool = True
    prompt_lookup_max: int | None = None
    prompt_lookup_min: int | None = None
    suffix_min_match: int | None = None
    suffix_min_probability: float | None = None
    suffix_store_tokens: int | None = None
    model: str | None = None
    quantization: str | None = None
    num_layers: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.method, str) or self.method not in METHODS:
            raise _bad("method", self.method, f"choose one of {', '.join(METHODS)}")
        self._check_options()
        if not 1 <= self.num_speculative_tokens <= MAX_DRAFTS:
            raise _bad("num_speculative_tokens", self.num_speculative_tokens, f"it must be 1 to {MAX_DRAFTS}")
        low, high = self.ngram_sizes
        if not 1 <= low <= high <= _MAX_NGRAM:
            raise _bad(
                "prompt_lookup_min",
                low,
                f"it must be at least 1 and at most prompt_lookup_max={high}, which goes up to {_MAX_NGRAM}",
            )
        self._check_suffix_options()
        for method, name in (("draft_model", "model"), ("early_exit", "num_layers")):
            if self.method == method and not getattr(self, name):
                raise _bad(name, getattr(self, name), f"method {method!r} needs it")

    @classmethod
    def from_mapping(cls, options: Mapping[str, Any]) -> SpeculativeConfig:
        """From what a JSON object holds; a value of None counts as not given.

        Raises:
            ConfigError: As above; also for unknown keys, with those that there are.
        """
        known = [field.name for field in fields(cls)]
        for name in options:
            if name not in known:
                raise ConfigError(f"unknown option {name!r}; {_what_there_is(options.get('method'))}")
        if options.get("method") is None:
            raise ConfigError(f"no method is given; choose one of {', '.join(METHODS)}")
        return cls(**{name: value for name, value in options.items() if value is not None})

    @classmethod
    def from_json(cls, text: str) -> SpeculativeConfig:
        """From the text of a JSON object.

        Raises:
            ConfigError: As above; also where it is no JSON object.
        """
        example = '{"method": "ngram", "num_speculative_tokens": 4}'
        try:
            options = json.loads(text)
        except ValueError as error:
            raise ConfigError(f"it is no JSON ({error}); write, for example, {example}") from None
        if not isinstance(options, dict):
            raise ConfigError(f"it is no JSON object; write, for example, {example}")
        return cls.from_mapping(options)

    def _check_options(self) -> None:
        """Whether the method has them, and whether they are what they should be."""
        for name, hint in get_type_hints(type(self)).items():
            value, types = getattr(self, name), get_args(hint) or (hint,)
            if type(value) not in types and not (type(value) is int and float in types):
                raise _bad(name, value, f"it must be {next(_KINDS[kind] for kind in types if kind in _KINDS)}")
            if value is not None and name not in _options(self.method):
                raise _bad(name, value, f"it is no option of method {self.method!r}; {_what_there_is(self.method)}")

    def _check_suffix_options(self) -> None:
        if self.suffix_min_match is not None and self.suffix_min_match < 1:
            raise _bad("suffix_min_match", self.suffix_min_match, "it must be at least 1")
        if self.suffix_min_probability is not None and not 0.0 < self.suffix_min_probability <= 1.0:
            raise _bad("suffix_min_probability", self.suffix_min_probability, "it must be above 0 and at most 1")
        if self.suffix_store_tokens is not None and self.suffix_store_tokens < 0:
            raise _bad("suffix_store_tokens", self.suffix_store_tokens, "it must be 0 or more")

    @property
    def needs_model(self) -> bool:
        """Whether a model drafts, which somebody has to load."""
        return self.method in _WITH_A_MODEL

    @property
    def suffix_options(self) -> dict[str, float]:
        """What "suffix" was given, in the words of `SuffixProposer`."""
        options = {
            "min_match": self.suffix_min_match,
            "min_probability": self.suffix_min_probability,
            "max_store_tokens": self.suffix_store_tokens,
        }
        return {name: value for name, value in options.items() if value is not None}

    @property
    def ngram_sizes(self) -> tuple[int, int]:
        """Fewest and most tokens that "ngram" looks for."""
        low, high = self.prompt_lookup_min, self.prompt_lookup_max
        if low is None:
            low = 2 if high is None else min(2, high)
        return low, max(4, low) if high is None else high


def _options(method: str) -> tuple[str, ...]:
    return ("method", "num_speculative_tokens", "adaptive", *METHODS[method])


def _what_there_is(method: object) -> str:
    if isinstance(method, str) and method in METHODS:
        return f"method {method!r} takes {', '.join(_options(method))}"
    return "; ".join(f"method {name!r} takes {', '.join(_options(name))}" for name in METHODS)


def _bad(name: str, value: object, remedy: str) -> ConfigError:
    return ConfigError(f"{name}={value!r} cannot be used: {remedy}")
