"""The operator's API, read by the command line over the Unix socket and by tools over its own listener."""

from __future__ import annotations

import hmac
from urllib.parse import urlsplit

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from platform_validator.web.commands import command_routes, refused
from platform_validator.web.control import Control
from platform_validator.web.env import env_route
from platform_validator.web.values import value_route
from platform_validator.web.views import Views

_MAX_JOBS = 10_000
_SAFE = ("GET", "HEAD", "OPTIONS")


def operators_app(views: Views, control: Control) -> Starlette:
    """`/api/v1`: whoever reaches it may read everything, and control the daemon.

    GET `/status` `/jobs` `/cvms` `/challenges` `/challenges/{id or name}`;
    POST `/drain` `/jobs/{id}/cancel` `/cvms/reclaim` `/attestation/pin` `/values` `/env` `/reload`.
    """

    async def status(_: Request) -> Response:
        return JSONResponse(views.status())

    async def jobs(request: Request) -> Response:
        asked = request.query_params.get("limit", "100")
        limit = min(int(asked), _MAX_JOBS) if asked.isdigit() else 100
        return JSONResponse(await views.jobs(limit))

    async def cvms(_: Request) -> Response:
        return JSONResponse(views.cvms())

    async def hosts(_: Request) -> Response:
        return JSONResponse(views.hosts())

    async def challenges(_: Request) -> Response:
        return JSONResponse(views.challenges())

    async def challenge(request: Request) -> Response:
        named = request.path_params["named"]
        found = await views.challenge(named)
        if found is None:
            return refused(404, "unknown_challenge", f"no challenge has the id or name {named[:80]!r}")
        return JSONResponse(found)

    return Starlette(
        routes=[
            Route("/api/v1/status", status),
            Route("/api/v1/jobs", jobs),
            Route("/api/v1/cvms", cvms),
            Route("/api/v1/hosts", hosts),
            Route("/api/v1/challenges", challenges),
            Route("/api/v1/challenges/{named}", challenge),
            *command_routes(control),
            value_route(control),
            env_route(control),
        ]
    )


class TokenGuard:
    """In front of the operator's API on TCP: a token, and a Host that is ours (against DNS rebinding).

    A browser sends no token by itself; what a page elsewhere sends is refused whatever it brings.
    """

    def __init__(self, app: ASGIApp, token: str, hosts: frozenset[str]) -> None:
        self._app = app
        self._token = token.encode()
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            refusal = self._refusal(Request(scope))
            if refusal is not None:
                await refusal(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _refusal(self, request: Request) -> Response | None:
        if (request.url.hostname or "") not in self._hosts:
            return refused(421, "wrong_host", "this Host is not ours")
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), self._token):
            return refused(401, "no_token", "expected Authorization: Bearer <admin.token>")
        if request.method not in _SAFE and not self._from_here(request):
            return refused(403, "cross_site", "a page of another site may not ask this")
        return None

    def _from_here(self, request: Request) -> bool:
        """Whether no browser sent it, or a page of this very listener (RFC 6454: Origin)."""
        origin = request.headers.get("origin")
        if request.headers.get("sec-fetch-site", "same-origin") not in ("same-origin", "none"):
            return False
        return origin is None or urlsplit(origin).netloc == request.url.netloc
