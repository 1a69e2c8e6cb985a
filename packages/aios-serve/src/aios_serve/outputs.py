"""What a caller gets back: whole outputs (shaped as vLLM's) and the deltas of a stream."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from aios_model.sampling.rows import TokenLogprobs


@dataclass(slots=True, kw_only=True)
class CompletionOutput:
    """One choice of a request, as far as it has been generated.

    Attributes:
        index: Which of the `n` choices this is, from 0.
        text: Decoded text, without stop strings unless the request asked for them.
        token_ids: Every generated token, the end-of-sequence or stop token included.
        logprobs: One entry per token of `token_ids` if the request asked for logprobs, else None.
        cumulative_logprob: Sum of the chosen tokens' log-probabilities, or None without logprobs.
        finish_reason: "stop", "length", "abort", "error" or "timeout"; None while it is being generated.
        stop_reason: The stop string or the stop token id that ended it; None for end-of-sequence and the rest.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    cumulative_logprob: float | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def add(self, delta: CompletionDelta) -> None:
        """Append what `delta` brings."""
        self.text += delta.text
        self.token_ids += delta.token_ids
        if delta.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += delta.logprobs
            self.cumulative_logprob = (self.cumulative_logprob or 0.0) + sum(each.logprob for each in delta.logprobs)
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """A request with all its choices.

    Attributes:
        request_id: The caller's id, or the one it was given.
        prompt: The prompt as text where it was given as text.
        prompt_token_ids: The prompt as the model saw it.
        outputs: One entry per choice, ordered by index.
        finished: Whether every choice has a finish reason.
        num_cached_tokens: Prompt tokens whose keys and values came from the prefix cache.
        error: What went wrong, where a choice has finish reason "error".
    """

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool
    num_cached_tokens: int = 0
    error: str | None = None

    @classmethod
    def empty(
        cls, *, request_id: str, prompt_token_ids: list[int], num_choices: int = 1, prompt: str | None = None
    ) -> RequestOutput:
        """An output to which deltas are added."""
        return cls(
            request_id=request_id,
            prompt=prompt,
            prompt_token_ids=prompt_token_ids,
            outputs=[CompletionOutput(index=index) for index in range(num_choices)],
            finished=False,
        )

    def add(self, delta: RequestDelta) -> None:
        """Append what `delta` brings."""
        for part in delta.deltas:
            self.outputs[part.index].add(part)
        self.num_cached_tokens = delta.num_cached_tokens
        self.finished = delta.finished

    def fail(self, message: str) -> None:
        """End every choice that has not ended, with reason "error"."""
        self.error = message
        for output in self.outputs:
            output.finish_reason = output.finish_reason or "error"
        self.finished = True


@dataclass(slots=True, kw_only=True)
class CompletionDelta:
    """What one choice gained since the last delta.

    `text` can be empty while `token_ids` is not: half a UTF-8 character and the beginning of a stop string are held
    back. `logprobs` goes with `token_ids`. `finish_reason` is set exactly once per choice, in its last delta.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    def extend(self, later: CompletionDelta) -> None:
        """Take in the next delta of the same choice."""
        self.text += later.text
        self.token_ids += later.token_ids
        if later.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs += later.logprobs
        self.finish_reason = later.finish_reason
        self.stop_reason = later.stop_reason


@dataclass(slots=True, kw_only=True)
class RequestDelta:
    """What a request gained since the last delta: at most one entry per choice.

    `finished` is True in the last delta of the request, when every choice has its finish reason.
    """

    request_id: str
    deltas: list[CompletionDelta]
    num_cached_tokens: int
    finished: bool

    def extend(self, later: RequestDelta) -> None:
        """Take in the next delta of the same request, for a consumer that did not look in between."""
        mine = {delta.index: delta for delta in self.deltas}
        for delta in later.deltas:
            if delta.index in mine:
                mine[delta.index].extend(delta)
            else:
                self.deltas.append(delta)
        self.num_cached_tokens = later.num_cached_tokens
        self.finished = later.finished


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """How long a finished request took, in seconds, as its engine-side caller saw it.

    Attributes:
        request_id: The caller's id, or the one it was given.
        finish_reason: Of the last choice to finish: "stop", "length", "abort", "error" or "timeout".
        num_prompt_tokens: Length of the prompt.
        num_cached_tokens: How much of it came from the prefix cache.
        num_generation_tokens: Tokens generated, over all choices.
        queue_seconds: From arrival until the scheduler first picked it; None if it never did.
        prefill_seconds: From there to the first token; None without a token.
        decode_seconds: From the first to the last token; None without a token.
        first_token_seconds: From arrival to the first token; None without a token.
        total_seconds: From arrival to the end.
        replica: Number of the engine that had it last.
    """

    request_id: str
    finish_reason: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_generation_tokens: int
    queue_seconds: float | None
    prefill_seconds: float | None
    decode_seconds: float | None
    first_token_seconds: float | None
    total_seconds: float
    replica: int = 0

    @property
    def seconds_per_output_token(self) -> float | None:
        """Mean time between tokens after the first; None with fewer than two tokens."""
        if self.decode_seconds is None or self.num_generation_tokens < 2:
            return None
        return self.decode_seconds / (self.num_generation_tokens - 1)
