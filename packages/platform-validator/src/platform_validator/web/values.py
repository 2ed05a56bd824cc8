"""The operator's API, dynamic values: POST alone, also to read, so that no page elsewhere can ask for one."""

from __future__ import annotations

from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from platform_protocol.values import ValueInvalid
from platform_validator.store.port import StoreUnavailable
from platform_validator.values.commands import ValueCommand
from platform_validator.values.errors import ValueKeysUnusable, ValueRefused, ValueUnreadable
from platform_validator.web.commands import refused
from platform_validator.web.control import Control, NotStarted
from platform_validator.web.posted import posted

MAX_BODY = 96 * 1024 * 1024
_FAULTS: dict[type[Exception], tuple[int, str]] = {
    NotStarted: (409, "not_started"),
    ValueUnreadable: (500, "value_unreadable"),
    ValueKeysUnusable: (503, "keys_unusable"),
    StoreUnavailable: (503, "journal_unavailable"),
}
_COMMAND: TypeAdapter[ValueCommand] = TypeAdapter(ValueCommand)


def value_route(control: Control) -> Route:
    """`POST /api/v1/values` with a command (`values.commands`); a refusal is `{"error", "code"}`."""

    async def values(request: Request) -> Response:
        command = await posted(request, _COMMAND, max_body=MAX_BODY)
        if isinstance(command, Response):
            return command
        try:
            return JSONResponse(await control.values(command))
        except (ValueRefused, ValueInvalid) as error:
            return refused(404 if error.code == "not_found" else 422, error.code, str(error))
        except tuple(_FAULTS) as error:
            return refused(*_FAULTS[type(error)], str(error))

    return Route("/api/v1/values", values, methods=["POST"])
