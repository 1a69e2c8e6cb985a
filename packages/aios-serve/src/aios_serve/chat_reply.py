"""The answer to a chat completion, whole or as chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET

from aios_serve.logprobs import chat_logprobs
from aios_serve.openai_responses import (
    AssistantMessage,
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
)

if TYPE_CHECKING:
    from aios_model.sampling.rows import TokenLogprobs
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_serve.generation import Choice, ChoiceDelta, UsageCounter
    from aios_serve.openai_types import ChatCompletionRequest


@dataclass(slots=True, kw_only=True)
class ChatReply:
    """One answer of `/v1/chat/completions`; id, time and model are the same in all its chunks."""

    id: str
    created: int
    model: str
    request: ChatCompletionRequest
    num_choices: int
    tokenizer: Tokenizer
    counter: UsageCounter
    _unsent_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)

    def whole(self, choices: Sequence[Choice]) -> ChatCompletion:
        """The answer in one piece."""
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[
                ChatChoice(
                    index=choice.index,
                    message=AssistantMessage(content=choice.text),
                    logprobs=self._logprobs(choice.logprobs),
                    finish_reason=choice.finish_reason,
                    stop_reason=choice.stop_reason,
                )
                for choice in choices
            ],
            usage=self.counter.usage(),
        )

    def begin(self) -> list[ChatCompletionChunk]:
        """One chunk per choice that says who speaks."""
        role = ChatDelta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index=index, delta=role)]) for index in range(self.num_choices)]

    def chunk(self, delta: ChoiceDelta) -> ChatCompletionChunk | None:
        """The chunk of one delta. Text that is still held back makes none; its logprobs wait for the text."""
        self.counter.add(delta)
        gained = delta.gained
        waiting = self._unsent_logprobs.pop(delta.index, []) + (gained.logprobs or [])
        if not gained.text and gained.finish_reason is None:
            self._unsent_logprobs[delta.index] = waiting
            return None
        choice = ChatChunkChoice(
            index=delta.index,
            delta=ChatDelta(content=gained.text),
            logprobs=self._logprobs(waiting),
            finish_reason=gained.finish_reason,
            stop_reason=gained.stop_reason if gained.finish_reason else UNSET,
        )
        return self._chunk([choice])

    def end(self) -> list[ChatCompletionChunk]:
        """The usage, if it was asked for."""
        if not self.request.wants_usage:
            return []
        chunk = self._chunk([])
        chunk.usage = self.counter.usage()
        return [chunk]

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        usage = self.counter.usage() if self.request.wants_continuous_usage else UNSET
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(entries, self.tokenizer) if self.request.logprobs else None
