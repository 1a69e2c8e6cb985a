"""The last check of a request before it reaches the engine: what only the loaded model can decide. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_model.errors import InvalidRequestError
from aios_sched.errors import QueueFullError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.sampling.params import SamplingParams
    from aios_serve.model_info import EngineInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class AdmissionLimits:
    """What the model and the configuration allow a single request.

    Attributes:
        vocab_size: Width of the output layer.
        max_model_len: Longest prompt plus output, in tokens.
        max_logprobs: Most alternatives per token.
    """

    vocab_size: int
    max_model_len: int
    max_logprobs: int

    @classmethod
    def of(cls, info: EngineInfo, *, max_logprobs: int) -> AdmissionLimits:
        """The limits of an engine as built."""
        return cls(vocab_size=info.vocab_size, max_model_len=info.max_model_len, max_logprobs=max_logprobs)

    def check(self, prompt_token_ids: Sequence[int], params: SamplingParams) -> None:
        """Check a request.

        Raises:
            InvalidRequestError: naming the value, the limit, and the field to blame.
        """
        self._check_prompt(prompt_token_ids)
        params.validate_for(vocab_size=self.vocab_size, max_logprobs=self.max_logprobs)
        self._check_room(len(prompt_token_ids), params)

    def _check_prompt(self, prompt_token_ids: Sequence[int]) -> None:
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        length = len(prompt_token_ids)
        if length >= self.max_model_len:
            raise InvalidRequestError(
                f"the prompt has {length} tokens, and with one token to generate that exceeds the context of "
                f"{self.max_model_len}; shorten it by {length + 1 - self.max_model_len} tokens",
                param="prompt",
            )
        if set(map(type, prompt_token_ids)) != {int}:
            raise InvalidRequestError("the prompt must be a list of integers", param="prompt")
        for extreme in (min(prompt_token_ids), max(prompt_token_ids)):
            if not 0 <= extreme < self.vocab_size:
                raise InvalidRequestError(
                    f"token id {extreme} in the prompt is outside the model's vocabulary of {self.vocab_size}",
                    param="prompt",
                )

    def _check_room(self, prompt_len: int, params: SamplingParams) -> None:
        """max_tokens=None means the room there is, whatever it is; a number must fit."""
        room = self.max_model_len - prompt_len
        for name, value in (("max_tokens", params.max_tokens), ("min_tokens", params.min_tokens)):
            if value is not None and value > room:
                raise InvalidRequestError(
                    f"{name}={value} and a prompt of {prompt_len} tokens exceed the context of {self.max_model_len}; "
                    f"ask for at most {room} tokens",
                    param=name,
                )


def check_room(num_choices: int, *, num_open: int, room: int, num_engines: int) -> None:
    """Tell a flood that the queue is full, without asking the engines, which bound theirs by themselves.

    Args:
        num_choices: Sequences that want to run.
        num_open: Sequences that run or wait already, over all engines.
        room: How many can run or wait in one engine.
        num_engines: Engines that take requests.

    Raises:
        InvalidRequestError: more than one engine could ever take.
        QueueFullError: too many at the moment.
    """
    if num_choices > room:
        raise InvalidRequestError(
            f"n={num_choices} choices exceed the {room} that can run or wait (max_num_seqs plus "
            "max_num_queued_reqs); ask for fewer",
            param="n",
        )
    if num_open + num_choices > room * num_engines:
        most = room * num_engines
        raise QueueFullError(f"{num_open} sequences run or wait already, of at most {most}; try again later")
