"""The answer to a chat completion, whole or as chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from msgspec import UNSET

from aios_serve.answers.choice_parser import ChoiceParser
from aios_serve.answers.messages import ChatDeltas, message_of
from aios_serve.logprobs import chat_logprobs
from aios_serve.openai_responses import (
    ChatChoice,
    ChatChunkChoice,
    ChatCompletion,
    ChatCompletionChunk,
    ChatDelta,
    ChatLogprobs,
    CompletionTokensDetails,
    Usage,
)
from aios_serve.tool_calls.registry import new_call_id

if TYPE_CHECKING:
    from aios_model.sampling.rows import TokenLogprobs
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_serve.answers.plan import AnswerPlan
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
    plan: AnswerPlan
    _unsent_logprobs: dict[int, list[TokenLogprobs]] = field(default_factory=dict)
    _parsers: list[ChoiceParser] = field(init=False)
    _deltas: ChatDeltas = field(init=False)

    def __post_init__(self) -> None:
        self._parsers = [ChoiceParser(self.plan, self.tokenizer) for _ in range(self.num_choices)]
        self._deltas = ChatDeltas(self._new_call_id)

    def whole(self, choices: Sequence[Choice]) -> ChatCompletion:
        """The answer in one piece."""
        return ChatCompletion(
            id=self.id,
            created=self.created,
            model=self.model,
            choices=[self._whole_choice(choice) for choice in choices],
            usage=self._usage(),
        )

    def begin(self) -> list[ChatCompletionChunk]:
        """One chunk per choice that says who speaks."""
        role = ChatDelta(role="assistant", content="")
        return [self._chunk([ChatChunkChoice(index=index, delta=role)]) for index in range(self.num_choices)]

    def chunk(self, delta: ChoiceDelta) -> ChatCompletionChunk | None:
        """The chunk of one delta. Text that is still held back makes none; its logprobs wait for the text."""
        self.counter.add(delta)
        gained, parser = delta.gained, self._parsers[delta.index]
        pieces = parser.push(gained.text, gained.token_ids)
        if gained.finish_reason is not None:
            pieces += parser.finish()
        waiting = self._unsent_logprobs.pop(delta.index, []) + (gained.logprobs or [])
        if not pieces and gained.finish_reason is None:
            self._unsent_logprobs[delta.index] = waiting
            return None
        choice = ChatChunkChoice(
            index=delta.index,
            delta=self._deltas.delta(pieces),
            logprobs=self._logprobs(waiting),
            finish_reason=parser.finish_reason(gained.finish_reason),
            stop_reason=gained.stop_reason if gained.finish_reason else UNSET,
        )
        return self._chunk([choice])

    def end(self) -> list[ChatCompletionChunk]:
        """The usage, if it was asked for."""
        if not self.request.wants_usage:
            return []
        chunk = self._chunk([])
        chunk.usage = self._usage()
        return [chunk]

    def _whole_choice(self, choice: Choice) -> ChatChoice:
        parser = self._parsers[choice.index]
        pieces = [*parser.push(choice.text, choice.token_ids), *parser.finish()]
        return ChatChoice(
            index=choice.index,
            message=message_of(pieces, self._new_call_id, was_cut=choice.finish_reason == "length"),
            logprobs=self._logprobs(choice.logprobs),
            finish_reason=parser.finish_reason(choice.finish_reason),
            stop_reason=choice.stop_reason,
        )

    def _chunk(self, choices: list[ChatChunkChoice]) -> ChatCompletionChunk:
        usage = self._usage() if self.request.wants_continuous_usage else UNSET
        return ChatCompletionChunk(id=self.id, created=self.created, model=self.model, choices=choices, usage=usage)

    def _usage(self) -> Usage:
        usage = self.counter.usage()
        if self.plan.reasoning is not None:
            tokens = sum(parser.num_reasoning_tokens for parser in self._parsers)
            usage.completion_tokens_details = CompletionTokensDetails(reasoning_tokens=tokens)
        return usage

    def _new_call_id(self) -> str:
        return new_call_id(self.plan.tool_call_parser)

    def _logprobs(self, entries: Sequence[TokenLogprobs]) -> ChatLogprobs | None:
        return chat_logprobs(entries, self.tokenizer) if self.request.logprobs else None
