"""The listener for CVMs and probes: health, metrics, and bundles for CVMs that are booting."""

from __future__ import annotations

import re

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from platform_validator.web.views import Views

_SHA256 = re.compile(r"[0-9a-f]{64}")


def guests_app(views: Views) -> Starlette:
    """The application. It tells guests status words and component names, never reasons."""

    async def health(_: Request) -> Response:
        found = views.health()
        return JSONResponse({"status": found.status, "components": found.components}, status_code=found.code)

    async def live(_: Request) -> Response:
        return JSONResponse({"status": "live"})

    async def metrics(_: Request) -> Response:
        found = views.metrics()
        if found is None:
            return PlainTextResponse("metrics are off\n", status_code=404)
        return Response(found[0], media_type=found[1])

    async def bundle(request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        authorization = request.headers.get("authorization", "")
        path = views.bundle(sha256, authorization) if _SHA256.fullmatch(sha256) else None
        if path is None:
            return PlainTextResponse("not found\n", status_code=404)
        return FileResponse(path, media_type="application/x-tar")

    return Starlette(
        routes=[
            Route("/health", health),
            Route("/health/live", live),
            Route("/metrics", metrics),
            Route("/bundles/{sha256}", bundle),
        ]
    )
