"""`POST /v1/responses`: OpenAI's newer API over the same engine, without memory between requests."""

from __future__ import annotations

from fastapi import APIRouter, Request
from pydantic import ValidationError
from starlette.responses import Response

from aios_model.errors import ChatTemplateError, InvalidRequestError
from aios_serve.chat_job import ChatJob
from aios_serve.error_responses import ApiError, to_api_error
from aios_serve.generation import UsageCounter, collect, unless_disconnected
from aios_serve.json_response import json_response
from aios_serve.request_body import parse_body
from aios_serve.responses_api.reply import ResponsesReply
from aios_serve.responses_api.request import RESPONSES, ResponsesRequest
from aios_serve.responses_api.to_chat import to_chat
from aios_serve.routes.openapi import json_body
from aios_serve.serving import Serving, ServingDep
from aios_serve.streaming import EventStreamResponse, first_delta

router = APIRouter(tags=["generation"])

_NAMES = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}
"""Fields of chat completions, and what they are called here."""


@router.post("/v1/responses", openapi_extra=json_body(ResponsesRequest))
async def create_response(request: Request, serving: ServingDep) -> Response:
    """Answer an input, text or items: JSON at the end, or a stream of typed events as tokens come."""
    engine = serving.ready_engine()
    body = await parse_body(request, ResponsesRequest, RESPONSES)
    chat = await _prepare(request, serving, body)
    counter = UsageCounter(chat.job.num_prompt_tokens)
    reply = ResponsesReply(request=body, chat=chat, tokenizer=engine.tokenizer, counter=counter)
    deltas = chat.job.run(engine)
    if body.stream:
        events = reply.events(await first_delta(request, deltas), deltas)
        return EventStreamResponse(events, keep_alive_interval=serving.config.keep_alive_interval)
    [choice] = await unless_disconnected(request, collect(deltas, 1, counter))
    return json_response(reply.whole(choice))


async def _prepare(request: Request, serving: Serving, body: ResponsesRequest) -> ChatJob:
    """The job; what is wrong is said by the names that fields have here."""
    try:
        return await ChatJob.prepare(request, serving, to_chat(body), id_prefix="resp", separator="_")
    except (ApiError, InvalidRequestError, ChatTemplateError, ValidationError) as exception:
        error = to_api_error(exception)
        if error.param is not None:
            field = error.param.partition(".")[0]
            error.param = _NAMES.get(field, error.param)
        raise error from exception
