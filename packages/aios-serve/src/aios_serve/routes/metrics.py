"""`GET /metrics`: everything Prometheus scrapes."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from aios_serve.serving import ServingDep
from aios_serve.tenants.visit import visit_of

router = APIRouter(tags=["operations"])


@router.get("/metrics")
async def scrape(request: Request, serving: ServingDep) -> Response:
    """Metrics in the Prometheus text format, or OpenMetrics if the scraper asks for it. Tenants see only their own."""
    tenant = visit_of(request.scope).tenant
    only = None if tenant.is_operator else tenant.name
    text, content_type = serving.metrics.exposition(request.headers.get("accept", ""), only_tenant=only)
    return Response(text, headers={"Content-Type": content_type})
