"""`POST /v1/chat/completions`: step 1 in the life of a request."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from aios_serve.chat_reply import ChatReply
from aios_serve.generation import GenerationJob, UsageCounter, collect, unless_disconnected
from aios_serve.json_response import json_response
from aios_serve.openai_types import ChatCompletionRequest
from aios_serve.prompts import encode_chat, fit_prompt
from aios_serve.refusals import CHAT
from aios_serve.request_body import parse_body
from aios_serve.request_deadline import deadline_of
from aios_serve.request_identity import default_seed
from aios_serve.routes.openapi import json_body
from aios_serve.sampling_request import chat_params, with_default_max_tokens
from aios_serve.serving import ServingDep, new_id
from aios_serve.session_key import session_of
from aios_serve.streaming import stream_response
from aios_serve.structured_request import check_structured_outputs
from aios_serve.tenants.visit import visit_of

router = APIRouter(tags=["generation"])


@router.post("/v1/chat/completions", openapi_extra=json_body(ChatCompletionRequest))
async def create_chat_completion(request: Request, serving: ServingDep) -> Response:
    """Answer a conversation: JSON at the end, or a stream of chunks as tokens come."""
    engine, visit = serving.ready_engine(), visit_of(request.scope)
    body = await parse_body(request, ChatCompletionRequest, CHAT)
    model = serving.served_name(body.model, visit)
    params = chat_params(body, engine.generation_defaults)
    limit = visit.context(engine.max_model_len)
    token_ids = await encode_chat(engine.tokenizer, body, most_tokens=body.most_prompt_tokens(engine.max_model_len))
    prompt = fit_prompt(
        token_ids, body, params.max_tokens, max_model_len=limit, param="messages", whose=visit.whose_context
    )
    default = engine.generation_defaults.max_new_tokens
    room = visit.room(limit - len(prompt), num_prompt_tokens=len(prompt), num_choices=params.n)
    job = GenerationJob(
        request_id=new_id("chatcmpl", request),
        prompts=[prompt],
        params=with_default_max_tokens(params, default, room=room),
        priority=visit.priority(body.priority),
        cache_salt=visit.salt(body.cache_salt),
        session=session_of(request, body),
        tenant=visit.tenant.name,
        tenant_weight=visit.weight,
        meter=visit,
        deadline=deadline_of(body),
        default_seed=default_seed(request.scope),
    )
    job.check(engine)
    job.reserve()
    await check_structured_outputs(engine, params, body)
    reply = ChatReply(
        id=job.request_id,
        created=int(time.time()),
        model=model,
        request=body,
        num_choices=job.num_choices,
        tokenizer=engine.tokenizer,
        counter=UsageCounter(job.num_prompt_tokens),
    )
    deltas = job.run(engine)
    if body.stream:
        return await stream_response(request, deltas, reply, keep_alive_interval=serving.config.keep_alive_interval)
    choices = await unless_disconnected(request, collect(deltas, job.num_choices, reply.counter))
    return json_response(reply.whole(choices))
