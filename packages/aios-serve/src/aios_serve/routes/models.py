"""`GET /v1/models`: what is served, under which names."""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from aios_serve.json_response import json_response
from aios_serve.openai_responses import ModelCard, ModelList
from aios_serve.serving import Serving, ServingDep

router = APIRouter(tags=["models"])


@router.get("/v1/models")
async def list_models(serving: ServingDep) -> Response:
    """Every name that requests may use as `model`."""
    names = serving.ready_engine().model_names
    return json_response(ModelList(data=[_card(serving, name) for name in names]))


@router.get("/v1/models/{model:path}")
async def retrieve_model(model: str, serving: ServingDep) -> Response:
    """One of them. Names may contain slashes, as hub ids do."""
    serving.ready_engine()
    return json_response(_card(serving, serving.served_name(model)))


def _card(serving: Serving, name: str) -> ModelCard:
    engine = serving.engine
    return ModelCard(
        id=name, created=serving.started_at, root=engine.model_names[0], max_model_len=engine.max_model_len
    )
