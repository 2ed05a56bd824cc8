"""The operator's API, environment of challenges: POST alone; a value goes in and never comes out."""

from __future__ import annotations

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from platform_validator.challenges.environment import EnvCommand, EnvRefused
from platform_validator.store.port import StoreUnavailable
from platform_validator.web.commands import refused
from platform_validator.web.control import Control, NotStarted
from platform_validator.web.posted import posted

MAX_BODY = 512 * 1024
_COMMAND: TypeAdapter[EnvCommand] = TypeAdapter(EnvCommand)


def env_route(control: Control) -> Route:
    """`POST /api/v1/env` with a command (`challenges.environment`); a refusal is `{"error", "code"}`."""

    async def env(request: Request) -> Response:
        command = await posted(request, _COMMAND, max_body=MAX_BODY)
        if isinstance(command, Response):
            return command
        try:
            return JSONResponse(await control.env(command))
        except EnvRefused as error:
            return refused(404 if error.code == "not_found" else 422, error.code, str(error))
        except NotStarted as error:
            return refused(409, "not_started", str(error))
        except StoreUnavailable as error:
            return refused(503, "journal_unavailable", str(error))

    return Route("/api/v1/env", env, methods=["POST"])
