"""`POST /tokenize` and `POST /detokenize`: what the model reads, without running it."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from aios_serve.json_response import json_response
from aios_serve.openai_responses import Detokenized, Tokenized
from aios_serve.openai_types import DetokenizeRequest, TokenizeChatRequest, TokenizeCompletionRequest
from aios_serve.prompts import decode, encode_chat, encode_prompts
from aios_serve.refusals import TOKENIZE, refuse_unsupported
from aios_serve.request_body import parse_body, read_json_object
from aios_serve.routes.openapi import json_body
from aios_serve.serving import ServingDep
from aios_serve.tenants.visit import visit_of

router = APIRouter(tags=["tokenizer"])


@router.post("/tokenize", openapi_extra=json_body(TokenizeCompletionRequest, TokenizeChatRequest))
async def tokenize(request: Request, serving: ServingDep) -> Response:
    """Token ids of a text (`prompt`) or of a conversation (`messages`), exactly as generation would see them."""
    engine = serving.ready_engine()
    fields = await read_json_object(request)
    refuse_unsupported(fields, TOKENIZE)
    if "messages" in fields:
        body = TokenizeChatRequest.model_validate(fields)
        serving.served_name(body.model, visit_of(request.scope))
        tokens = await encode_chat(engine.tokenizer, body)
    else:
        body = TokenizeCompletionRequest.model_validate(fields)
        serving.served_name(body.model, visit_of(request.scope))
        add_special_tokens = body.add_special_tokens is not False
        [tokens] = await encode_prompts(engine.tokenizer, [body.prompt], add_special_tokens=add_special_tokens)
    texts = [engine.tokenizer.token_text(token) for token in tokens] if body.return_token_strs else None
    return json_response(
        Tokenized(count=len(tokens), max_model_len=engine.max_model_len, tokens=tokens, token_strs=texts)
    )


@router.post("/detokenize", openapi_extra=json_body(DetokenizeRequest))
async def detokenize(request: Request, serving: ServingDep) -> Response:
    """The text of token ids, special tokens included."""
    engine = serving.ready_engine()
    body = await parse_body(request, DetokenizeRequest)
    serving.served_name(body.model, visit_of(request.scope))
    return json_response(Detokenized(prompt=await decode(engine.tokenizer, body.tokens, engine.vocab_size)))
