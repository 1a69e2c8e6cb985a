"""The answer to a completion, whole or as chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET

from aios_serve.logprobs import completion_logprobs
from aios_serve.openai_responses import Completion, CompletionChoice, CompletionLogprobs

if TYPE_CHECKING:
    from aios_model.sampling.rows import TokenLogprobs
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_serve.generation import Choice, ChoiceDelta, UsageCounter
    from aios_serve.openai_types import CompletionRequest


@dataclass(slots=True, kw_only=True)
class CompletionReply:
    """One answer of `/v1/completions`; id, time and model are the same in all its chunks.

    `echoes` holds the text to put before each prompt's choices: the prompt if `echo` was asked for, else nothing.
    """

    id: str
    created: int
    model: str
    request: CompletionRequest
    echoes: Sequence[str]
    tokenizer: Tokenizer
    counter: UsageCounter
    _unsent_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    _text_offsets: dict[int, int] = field(default_factory=dict)

    def whole(self, choices: Sequence[Choice]) -> Completion:
        """The answer in one piece."""
        answer = [
            CompletionChoice(
                index=choice.index,
                text=self._echo(choice.index) + choice.text,
                logprobs=self._logprobs(choice.index, choice.logprobs),
                finish_reason=choice.finish_reason,
                stop_reason=choice.stop_reason,
            )
            for choice in choices
        ]
        completion = self._completion(answer)
        completion.usage = self.counter.usage()
        return completion

    def begin(self) -> list[Completion]:
        """The prompts, where they are to be echoed."""
        num_choices = len(self.echoes) * (self.request.n or 1)
        texts = [(index, self._echo(index)) for index in range(num_choices)]
        return [self._completion([CompletionChoice(index=index, text=text)]) for index, text in texts if text]

    def chunk(self, delta: ChoiceDelta) -> Completion | None:
        """The chunk of one delta. Text that is still held back makes none; its logprobs wait for the text."""
        self.counter.add(delta)
        gained = delta.gained
        waiting = self._unsent_logprobs.pop(delta.index, []) + (gained.logprobs or [])
        if not gained.text and gained.finish_reason is None:
            self._unsent_logprobs[delta.index] = waiting
            return None
        choice = CompletionChoice(
            index=delta.index,
            text=gained.text,
            logprobs=self._logprobs(delta.index, waiting),
            finish_reason=gained.finish_reason,
            stop_reason=gained.stop_reason,
        )
        return self._completion([choice])

    def end(self) -> list[Completion]:
        """The usage, if it was asked for."""
        if not self.request.wants_usage:
            return []
        chunk = self._completion([])
        chunk.usage = self.counter.usage()
        return [chunk]

    def _completion(self, choices: list[CompletionChoice]) -> Completion:
        usage = self.counter.usage() if self.request.wants_continuous_usage else UNSET
        return Completion(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _echo(self, index: int) -> str:
        return self.echoes[index // (self.request.n or 1)]

    def _logprobs(self, index: int, entries: Sequence[TokenLogprobs]) -> CompletionLogprobs | None:
        """Offsets go on where the choice's last chunk ended."""
        if self.request.logprobs is None:
            return None
        offset = self._text_offsets.get(index, len(self._echo(index)))
        logprobs = completion_logprobs(entries, self.tokenizer, text_offset=offset)
        self._text_offsets[index] = offset + sum(len(token) for token in logprobs.tokens)
        return logprobs
