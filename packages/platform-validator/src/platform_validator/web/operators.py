"""The operator's API, read by the command line over the Unix socket and by tools over its own listener."""

from __future__ import annotations

import hmac

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from platform_validator.web.views import Views

_MAX_JOBS = 10_000


def operators_app(views: Views) -> Starlette:
    """`/api/v1/{status,jobs,cvms,challenges}`; whoever reaches it may read everything."""

    async def status(_: Request) -> Response:
        return JSONResponse(views.status())

    async def jobs(request: Request) -> Response:
        asked = request.query_params.get("limit", "100")
        limit = min(int(asked), _MAX_JOBS) if asked.isdigit() else 100
        return JSONResponse(await views.jobs(limit))

    async def cvms(_: Request) -> Response:
        return JSONResponse(views.cvms())

    async def challenges(_: Request) -> Response:
        return JSONResponse(views.challenges())

    return Starlette(
        routes=[
            Route("/api/v1/status", status),
            Route("/api/v1/jobs", jobs),
            Route("/api/v1/cvms", cvms),
            Route("/api/v1/challenges", challenges),
        ]
    )


class TokenGuard:
    """In front of the operator's API on TCP: a token, and a Host that is ours (against DNS rebinding)."""

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            request = Request(scope)
            scheme, _, token = request.headers.get("authorization", "").partition(" ")
            if (request.url.hostname or "") not in self._hosts:
                await JSONResponse({"error": "this Host is not ours"}, status_code=421)(scope, receive, send)
                return
            if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token):
                answer = JSONResponse(
                    {"error": "expected Authorization: Bearer <admin.token>"}, status_code=401
                )
                await answer(scope, receive, send)
                return
        await self._app(scope, receive, send)
