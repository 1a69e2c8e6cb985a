"""`POST /v1/completions`: text goes on where the prompt ends, for one prompt or many."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request
from starlette.responses import Response

from aios_serve.completion_reply import CompletionReply
from aios_serve.generation import GenerationJob, UsageCounter, collect, unless_disconnected
from aios_serve.json_response import json_response
from aios_serve.openai_types import CompletionRequest
from aios_serve.prompts import echoed_prompts, encode_prompts, fit_prompt
from aios_serve.refusals import COMPLETION, UnsupportedFieldError
from aios_serve.request_body import parse_body
from aios_serve.request_deadline import deadline_of
from aios_serve.request_identity import default_seed
from aios_serve.routes.openapi import json_body
from aios_serve.sampling_request import COMPLETION_MAX_TOKENS, completion_params, with_default_max_tokens
from aios_serve.serving import ServingDep, new_id
from aios_serve.session_key import session_of
from aios_serve.streaming import stream_response
from aios_serve.structured_request import check_structured_outputs
from aios_serve.tenants.visit import visit_of

router = APIRouter(tags=["generation"])


@router.post("/v1/completions", openapi_extra=json_body(CompletionRequest))
async def create_completion(request: Request, serving: ServingDep) -> Response:
    """Continue one or several prompts: JSON at the end, or a stream of chunks as tokens come."""
    engine, visit = serving.ready_engine(), visit_of(request.scope)
    body = await parse_body(request, CompletionRequest, COMPLETION)
    if body.echo and body.logprobs is not None:
        raise UnsupportedFieldError(
            "echo with logprobs cannot be honoured: log-probabilities of prompt tokens are not supported yet",
            param="echo",
        )
    model = serving.served_name(body.model, visit)
    params = completion_params(body, engine.generation_defaults)
    limit = visit.context(engine.max_model_len)
    encoded = await encode_prompts(
        engine.tokenizer,
        body.prompts,
        add_special_tokens=body.add_special_tokens is not False,
        most_tokens=body.most_prompt_tokens(engine.max_model_len),
    )
    prompts = [
        fit_prompt(ids, body, params.max_tokens, max_model_len=limit, param="prompt", whose=visit.whose_context)
        for ids in encoded
    ]
    room = visit.room(
        limit - max(map(len, prompts)),
        num_prompt_tokens=sum(map(len, prompts)),
        num_choices=params.n * len(prompts),
    )
    job = GenerationJob(
        request_id=new_id("cmpl", request),
        prompts=prompts,
        params=with_default_max_tokens(params, COMPLETION_MAX_TOKENS, room=room),
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
    reply = CompletionReply(
        id=job.request_id,
        created=int(time.time()),
        model=model,
        request=body,
        echoes=await echoed_prompts(engine.tokenizer, body, prompts),
        tokenizer=engine.tokenizer,
        counter=UsageCounter(job.num_prompt_tokens),
    )
    deltas = job.run(engine)
    if body.stream:
        return await stream_response(request, deltas, reply, keep_alive_interval=serving.config.keep_alive_interval)
    choices = await unless_disconnected(request, collect(deltas, job.num_choices, reply.counter))
    return json_response(reply.whole(choices))
