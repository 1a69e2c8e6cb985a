"""`POST /v1/chat/completions`: step 1 in the life of a request."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from aios_serve.chat_job import ChatJob
from aios_serve.chat_reply import ChatReply
from aios_serve.generation import UsageCounter, collect, unless_disconnected
from aios_serve.json_response import json_response
from aios_serve.openai_types import ChatCompletionRequest
from aios_serve.refusals import CHAT
from aios_serve.request_body import parse_body
from aios_serve.routes.openapi import json_body
from aios_serve.serving import ServingDep
from aios_serve.streaming import stream_response

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest))
async def create_chat_completion(request: Request, serving: ServingDep) -> Response:
    """Answer a conversation: JSON at the end, or a stream of chunks as tokens come."""
    engine = serving.ready_engine()
    body = await parse_body(request, ChatCompletionRequest, CHAT)
    chat = await ChatJob.prepare(request, serving, body, id_prefix="chatcmpl")
    job = chat.job
    reply = ChatReply(
        id=job.request_id,
        created=int(time.time()),
        model=chat.model,
        request=body,
        num_choices=job.num_choices,
        tokenizer=engine.tokenizer,
        counter=UsageCounter(job.num_prompt_tokens),
        plan=chat.plan,
    )
    deltas = job.run(engine)
    if body.stream:
        return await stream_response(request, deltas, reply, keep_alive_interval=serving.config.keep_alive_interval)
    choices = await unless_disconnected(request, collect(deltas, job.num_choices, reply.counter))
    return json_response(reply.whole(choices))
