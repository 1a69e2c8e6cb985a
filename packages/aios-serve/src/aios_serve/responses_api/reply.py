"""The answer to a request for a response, whole or as typed events."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from aios_serve.answers.choice_parser import ChoiceParser
from aios_serve.answers.messages import settled
from aios_serve.error_responses import to_api_error
from aios_serve.logprobs import chat_logprobs
from aios_serve.responses_api.output import EventWriter, ResponseOutput
from aios_serve.responses_api.structs import (
    IncompleteDetails,
    InputDetails,
    OutputDetails,
    Response,
    ResponseError,
    ResponseUsage,
)
from aios_serve.tool_calls.pieces import Text
from aios_serve.tool_calls.registry import new_call_id

if TYPE_CHECKING:
    from collections.abc import Sequence

    from aios_model.sampling.rows import TokenLogprobs
    from aios_model.tokenizer.tokenizer import Tokenizer
    from aios_serve.chat_job import ChatJob
    from aios_serve.generation import Choice, ChoiceDelta, UsageCounter
    from aios_serve.openai_responses import TokenLogprob
    from aios_serve.responses_api.request import ResponsesRequest
    from aios_serve.tool_calls.pieces import Piece


@dataclass(slots=True, kw_only=True)
class ResponsesReply:
    """One answer of `/v1/responses`."""

    request: ResponsesRequest
    chat: ChatJob
    tokenizer: Tokenizer
    counter: UsageCounter
    created: int = field(default_factory=lambda: int(time.time()))
    _events: EventWriter = field(init=False, default_factory=EventWriter)
    _parser: ChoiceParser = field(init=False)
    _output: ResponseOutput = field(init=False)
    _unsent_logprobs: list[TokenLogprobs] = field(init=False, default_factory=list)
    _finish_reason: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self._parser = ChoiceParser(self.chat.plan, self.tokenizer)
        self._output = ResponseOutput(self._events, lambda: new_call_id(self.chat.plan.tool_call_parser))

    def whole(self, choice: Choice) -> Response:
        """The answer in one piece."""
        pieces = [*self._parser.push(choice.text, choice.token_ids), *self._parser.finish()]
        pieces = settled(pieces, was_cut=choice.finish_reason == "length")
        self._output.add(pieces, self._logprobs(pieces, choice.logprobs))
        self._finish_reason = choice.finish_reason
        return self._ended()

    async def events(self, first: ChoiceDelta, deltas: AsyncGenerator[ChoiceDelta]) -> AsyncGenerator[bytes]:
        """The whole stream as bytes. What goes wrong on the way ends it with `response.failed`."""
        try:
            async with aclosing(deltas):
                yield self._events.write("response.created", response=self._response("in_progress"))
                yield self._events.write("response.in_progress", response=self._response("in_progress"))
                for event in self._grown(first):
                    yield event
                async for delta in deltas:
                    for event in self._grown(delta):
                        yield event
            ended = self._ended_events()
        except Exception as error:
            ended = self._failed_events(to_api_error(error).message)
        for event in ended:
            yield event

    def _grown(self, delta: ChoiceDelta) -> list[bytes]:
        """The events of one delta."""
        self.counter.add(delta)
        gained = delta.gained
        pieces = self._parser.push(gained.text, gained.token_ids)
        if gained.finish_reason is not None:
            self._finish_reason = gained.finish_reason
            pieces += self._parser.finish()
        return self._output.add(pieces, self._logprobs(pieces, gained.logprobs or []))

    def _logprobs(self, pieces: Sequence[Piece], gained: Sequence[TokenLogprobs]) -> list[TokenLogprob]:
        """Of the tokens of text: those of thoughts and calls have no place to be in."""
        if not self.request.wants_logprobs:
            return []
        waiting = [*self._unsent_logprobs, *gained]
        is_text = all(isinstance(piece, Text) for piece in pieces)
        self._unsent_logprobs = waiting if is_text and not pieces else []
        return chat_logprobs(waiting, self.tokenizer).content if is_text and pieces else []

    def _ended(self) -> Response:
        """The response as it ends, its last item closed."""
        reason = self._finish_reason
        was_cut = reason == "length"
        self._output.close(status="incomplete" if was_cut else "completed")
        if reason in ("stop", "length"):
            response = self._response("incomplete" if was_cut else "completed")
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens") if was_cut else None
        else:
            response = self._response("failed")
            response.error = ResponseError(code="server_error", message=f"The request ended early: {reason}.")
        response.completed_at = int(time.time()) if response.status == "completed" else None
        response.usage = self._usage()
        return response

    def _ended_events(self) -> list[bytes]:
        written = self._output.close(status="incomplete" if self._finish_reason == "length" else "completed")
        response = self._ended()
        return [*written, self._events.write(f"response.{response.status}", response=response)]

    def _failed_events(self, message: str) -> list[bytes]:
        written = self._output.close(status="incomplete")
        response = self._response("failed")
        response.error = ResponseError(code="server_error", message=message)
        return [*written, self._events.write("response.failed", response=response)]

    def _response(self, status: str) -> Response:
        body, params = self.request, self.chat.job.params
        return Response(
            id=self.chat.job.request_id,
            created_at=self.created,
            status=status,
            model=self.chat.model,
            output=self._output.items,
            instructions=body.instructions,
            metadata=body.metadata or {},
            parallel_tool_calls=body.parallel_tool_calls is not False,
            temperature=params.temperature,
            top_p=params.top_p,
            max_output_tokens=body.max_output_tokens,
            tool_choice=body.tool_choice or "auto",
            tools=body.tools or [],
            text={"format": (body.text.format if body.text else None) or {"type": "text"}},
            reasoning={"effort": None, "summary": None},
            user=body.user,
        )

    def _usage(self) -> ResponseUsage:
        usage = self.counter.usage()
        return ResponseUsage(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=InputDetails(cached_tokens=usage.prompt_tokens_details.cached_tokens),
            output_tokens=usage.completion_tokens,
            output_tokens_details=OutputDetails(reasoning_tokens=self._parser.num_reasoning_tokens),
            total_tokens=usage.total_tokens,
        )
