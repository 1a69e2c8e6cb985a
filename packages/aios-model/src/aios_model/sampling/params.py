"""How to draw tokens for one request: vLLM's `SamplingParams`, its names and its ranges, checked where it is built.

Nothing here imports torch: the HTTP process validates requests with it.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from aios_model.errors import InvalidRequestError
from aios_model.sampling import field_checks as checks

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from typing import Self

    from aios_model.generation_config import GenerationDefaults

MAX_CHOICES = 128
MAX_REPETITION_PENALTY = 1e6
MAX_STOP_STRINGS = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 4096
MAX_ALLOWED_TOKEN_IDS = 2**18
MAX_BAD_WORDS = 1024
DEFAULT_MAX_LOGPROBS = 20
"""What a server admits unless told otherwise; see `SamplingParams.validate_for`."""
MAX_LOGPROBS = 1024
GREEDY_TEMPERATURE = 1e-5
"""Below this temperature a row is greedy, as in vLLM."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to draw tokens for one request. Immutable, picklable, valid once built.

    Attributes:
        n: Choices per prompt, 1..128; with greedy sampling they are equal.
        temperature: 0..2; below 1e-5 the likeliest token is taken.
        top_p: (0, 1]; the smallest set of likeliest tokens that holds this probability. 1 is off.
        top_k: Only the k likeliest tokens; 0 and -1 are off.
        min_p: 0..1; only tokens at least this likely relative to the likeliest.
        presence_penalty: -2..2, subtracted from the logits of tokens that occur in the output.
        frequency_penalty: -2..2, subtracted once for every occurrence in the output.
        repetition_penalty: Above 0, at most 1e6; divides positive and multiplies negative logits of tokens that occur
            in prompt or output.
        max_tokens: At least 1; None goes as far as the context does.
        min_tokens: No end of sequence and no stop token before that many.
        seed: int64; None and -1 let the engine choose.
        stop: Strings that end the generation; a single string is accepted.
        stop_token_ids: Tokens that end the generation.
        include_stop_str_in_output: Keep the stop string in the text.
        ignore_eos: Go on after the end-of-sequence token.
        logit_bias: Token id to a value in -100..100, added to its logit.
        allowed_token_ids: If given, nothing else is drawn.
        bad_words: Words not to be completed; `resolve_bad_words` turns them into `bad_words_token_ids`.
        bad_words_token_ids: Token sequences whose last token is banned where the others have just been generated.
        logprobs: None, or how many of the likeliest tokens to report beside the chosen one.
        skip_special_tokens: Leave special tokens out of the text.

    Raises:
        InvalidRequestError: A field has the wrong type or is out of range; `param` names it.
    """

    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    max_tokens: int | None = 16
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    logit_bias: Mapping[int, float] | None = None
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[str, ...] = ()
    bad_words_token_ids: tuple[tuple[int, ...], ...] = ()
    logprobs: int | None = None
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._check_numbers()
        self._check_lengths()
        self._check_lists()
        for name in ("include_stop_str_in_output", "ignore_eos", "skip_special_tokens"):
            checks.boolean(name, getattr(self, name))

    @classmethod
    def from_optional(cls, given: Mapping[str, Any], *, defaults: GenerationDefaults | None = None) -> Self:
        """Builds params from request fields of which some are absent or None.

        An absent field takes the model's default, where `defaults` has one, and this class's otherwise. max_tokens is
        the exception: None means None there, so leave it out to get 16.

        Raises:
            InvalidRequestError: A name that is no field, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        for name in given:
            if name not in known:
                raise InvalidRequestError(f"{name} is not a sampling parameter", param=name)
        chosen: dict[str, Any] = {k: v for k, v in given.items() if v is not None or k == "max_tokens"}
        for name in ("temperature", "top_p", "top_k", "min_p", "repetition_penalty"):
            default = getattr(defaults, name, None)
            if default is not None:
                chosen.setdefault(name, default)
        return cls(**chosen)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is taken, so that top_p, top_k, min_p and seed do not matter."""
        return self.temperature < GREEDY_TEMPERATURE

    @property
    def has_penalties(self) -> bool:
        """Whether logits depend on how often tokens have occurred."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0

    @property
    def changes_logits(self) -> bool:
        """Whether logits are altered before the draw, leaving aside min_tokens, which ends on its own."""
        return (
            self.has_penalties
            or self.logit_bias is not None
            or self.allowed_token_ids is not None
            or bool(self.bad_words_token_ids)
        )

    @property
    def reads_output(self) -> bool:
        """Whether the next draw depends on which tokens were drawn before, beyond what the model makes of them."""
        return self.has_penalties or bool(self.bad_words_token_ids)

    @property
    def needs_only_argmax(self) -> bool:
        """Whether argmax over the model's logits is all there is to do."""
        return self.is_greedy and self.logprobs is None and self.min_tokens == 0 and not self.changes_logits

    def validate_for(self, *, vocab_size: int, max_logprobs: int = DEFAULT_MAX_LOGPROBS) -> None:
        """Checks what depends on the model and the server.

        Args:
            vocab_size: Width of the model's output; naming a token id at or above it is an error.
            max_logprobs: Most alternatives per token that the server reports.

        Raises:
            InvalidRequestError: A token id or `logprobs` is too large.
        """
        named = {
            "stop_token_ids": self.stop_token_ids,
            "logit_bias": self.logit_bias or (),
            "allowed_token_ids": self.allowed_token_ids or (),
            "bad_words": [token for sequence in self.bad_words_token_ids for token in sequence],
        }
        for name, token_ids in named.items():
            largest = max(token_ids, default=-1)
            if largest >= vocab_size:
                raise InvalidRequestError(
                    f"{name} holds token id {largest}; this model's ids are 0 to {vocab_size - 1}", param=name
                )
        if self.logprobs is not None and self.logprobs > max_logprobs:
            raise checks.out_of_range("logprobs", self.logprobs, f"between 0 and {max_logprobs}")

    def with_bad_words_token_ids(self, sequences: Sequence[Sequence[int]]) -> Self:
        """A copy that bans these token sequences too."""
        return replace(self, bad_words_token_ids=(*self.bad_words_token_ids, *map(tuple, sequences)))

    def _check_numbers(self) -> None:
        self._set("temperature", checks.real("temperature", self.temperature, low=0.0, high=2.0))
        self._set("top_p", checks.real("top_p", self.top_p, low=0.0, high=1.0, above_low=True))
        self._set("min_p", checks.real("min_p", self.min_p, low=0.0, high=1.0))
        self._set("presence_penalty", checks.real("presence_penalty", self.presence_penalty, low=-2.0, high=2.0))
        self._set("frequency_penalty", checks.real("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0))
        penalty = checks.real(
            "repetition_penalty", self.repetition_penalty, low=0.0, high=MAX_REPETITION_PENALTY, above_low=True
        )
        self._set("repetition_penalty", penalty)
        self._set("top_k", max(0, checks.integer("top_k", self.top_k, low=-1)))
        if self.logprobs is not None:
            checks.integer("logprobs", self.logprobs, low=0, high=MAX_LOGPROBS)
        if self.seed is not None:
            seed = checks.integer("seed", self.seed, low=-(2**63), high=2**63 - 1)
            self._set("seed", None if seed == -1 else seed)

    def _check_lengths(self) -> None:
        checks.integer("n", self.n, low=1, high=MAX_CHOICES)
        checks.integer("min_tokens", self.min_tokens, low=0)
        if self.max_tokens is None:
            return
        checks.integer("max_tokens", self.max_tokens, low=1)
        if self.min_tokens > self.max_tokens:
            raise checks.out_of_range("min_tokens", self.min_tokens, f"at most max_tokens, which is {self.max_tokens}")

    def _check_lists(self) -> None:
        self._set("stop", checks.texts("stop", self.stop, most=MAX_STOP_STRINGS))
        self._set("bad_words", checks.texts("bad_words", self.bad_words, most=MAX_BAD_WORDS))
        self._set("stop_token_ids", checks.token_ids("stop_token_ids", self.stop_token_ids, most=MAX_STOP_TOKEN_IDS))
        self._set("bad_words_token_ids", self._checked_sequences())
        self._set("logit_bias", checks.bias("logit_bias", self.logit_bias, most=MAX_LOGIT_BIAS))
        if self.allowed_token_ids is not None:
            allowed = checks.token_ids("allowed_token_ids", self.allowed_token_ids, most=MAX_ALLOWED_TOKEN_IDS)
            if not allowed:
                raise InvalidRequestError(
                    "allowed_token_ids is empty, so that no token could be drawn; leave it out to allow all",
                    param="allowed_token_ids",
                )
            self._set("allowed_token_ids", allowed)

    def _checked_sequences(self) -> tuple[tuple[int, ...], ...]:
        """Each bad word may have two: with a leading space and without."""
        return checks.sequences("bad_words_token_ids", self.bad_words_token_ids, most=2 * MAX_BAD_WORDS)

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)
