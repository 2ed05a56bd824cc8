"""About the service itself, unsigned: health, version, metrics."""

from __future__ import annotations

from importlib.metadata import version

import prometheus_client
import sqlalchemy as sa
from fastapi import APIRouter, Response

from platform_api.services import Api
from platform_api.tables import jobs

router = APIRouter(tags=["service"])


@router.get("/health")
async def health(api: Api) -> dict[str, str]:
    """Whether the API and its database answer."""
    async with api.database.read() as connection:
        await connection.execute(sa.text("SELECT 1"))
    return {"status": "ok"}


@router.get("/version")
async def api_version() -> dict[str, str]:
    """The API's version."""
    return {"version": version("platform-api")}


@router.get("/metrics")
async def metrics(api: Api) -> Response:
    """Prometheus metrics."""
    async with api.database.read() as connection:
        query = sa.select(jobs.c.status, sa.func.count()).group_by(jobs.c.status)
        counted = {str(status): int(number) for status, number in await connection.execute(query)}
    return Response(api.metrics.page(counted), media_type=prometheus_client.CONTENT_TYPE_LATEST)
