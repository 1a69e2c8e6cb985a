"""From a checked conversation to a job for the engine: what chat completions and responses have in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from aios_model.errors import InvalidRequestError
from aios_serve.answers.plan import AnswerPlan, plan_answer
from aios_serve.generation import GenerationJob
from aios_serve.prompts import encode_chat, fit_prompt
from aios_serve.request_deadline import deadline_of
from aios_serve.request_identity import default_seed
from aios_serve.sampling_request import chat_params, with_default_max_tokens
from aios_serve.serving import new_id
from aios_serve.session_key import session_of
from aios_serve.structured_request import check_structured_outputs
from aios_serve.tenants.visit import visit_of

if TYPE_CHECKING:
    from starlette.requests import Request

    from aios_model.sampling.params import SamplingParams
    from aios_serve.async_engine import AsyncEngine
    from aios_serve.openai_types import ChatCompletionRequest
    from aios_serve.serving import Serving


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatJob:
    """A job that the engine will take, and how its answers are to be read.

    Attributes:
        model: The name to answer with.
        job: For the engine; checked.
        plan: What answers may hold besides text.
    """

    model: str
    job: GenerationJob
    plan: AnswerPlan

    @classmethod
    async def prepare(
        cls, request: Request, serving: Serving, body: ChatCompletionRequest, *, id_prefix: str, separator: str = "-"
    ) -> ChatJob:
        """Encode the conversation and check everything.

        Raises:
            AiosError, ApiError: what is wrong with the request, or why it cannot be taken now.
        """
        engine, visit = serving.ready_engine(), visit_of(request.scope)
        model = serving.served_name(body.model, visit)
        params = chat_params(body, engine.generation_defaults)
        plan, params = plan_answer(body, params, engine.tokenizer, serving.config)
        limit = visit.context(engine.max_model_len)
        token_ids = await encode_chat(engine.tokenizer, body, most_tokens=body.most_prompt_tokens(engine.max_model_len))
        prompt = fit_prompt(
            token_ids, body, params.max_tokens, max_model_len=limit, param="messages", whose=visit.whose_context
        )
        default = engine.generation_defaults.max_new_tokens
        room = visit.room(limit - len(prompt), num_prompt_tokens=len(prompt), num_choices=params.n)
        job = GenerationJob(
            request_id=new_id(id_prefix, request, separator=separator),
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
        await _check_form(engine, job.params, body, plan)
        return cls(model=model, job=job, plan=plan.for_prompt(prompt, engine.tokenizer))


async def _check_form(
    engine: AsyncEngine, params: SamplingParams, body: ChatCompletionRequest, plan: AnswerPlan
) -> None:
    """Have the form that answers are held to compiled; where that is calls, what is wrong is a tool's schema."""
    try:
        await check_structured_outputs(engine, params, body)
    except InvalidRequestError as error:
        if not plan.is_forced:
            raise
        message = str(error).replace("structured_outputs.json", "the parameters of the tools")
        raise InvalidRequestError(message, param="tools") from None
