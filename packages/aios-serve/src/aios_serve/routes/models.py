"""`GET /v1/models`: what is served, under which names."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from aios_serve.json_response import json_response
from aios_serve.openai_responses import ModelCard, ModelList
from aios_serve.serving import Serving, ServingDep
from aios_serve.tenants.visit import visit_of

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(request: Request, serving: ServingDep) -> Response:
    """Every name that requests of this tenant may use as `model`."""
    names = visit_of(request.scope).allowed(serving.ready_engine().model_names)
    return json_response(ModelList(data=[_card(serving, name) for name in names]))


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, request: Request, serving: ServingDep) -> Response:
    """One of them. Names may contain slashes, as hub ids do."""
    serving.ready_engine()
    return json_response(_card(serving, serving.served_name(model, visit_of(request.scope))))


def _card(serving: Serving, name: str) -> ModelCard:
    engine = serving.engine
    return ModelCard(
        id=name, created=serving.started_at, root=engine.model_names[0], max_model_len=engine.max_model_len
    )
