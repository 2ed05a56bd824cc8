"""The operator's API, dynamic values: POST alone, also to read, so that no page elsewhere can ask for one."""

from __future__ import annotations

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from platform_protocol.values import ValueInvalid
from platform_validator.store.port import StoreUnavailable
from platform_validator.values.commands import ValueCommand
from platform_validator.values.errors import ValueKeysUnusable, ValueRefused, ValueUnreadable
from platform_validator.web.commands import refused
from platform_validator.web.control import Control, NotStarted

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
        body = b""
        async for part in request.stream():
            body += part
            if len(body) > MAX_BODY:
                return refused(413, "too_large", f"expected at most {MAX_BODY} bytes")
        try:
            command = _COMMAND.validate_json(body)
        except ValidationError as error:
            return refused(400, "bad_body", f"expected a command: {error.errors()[0]['msg']}")
        try:
            return JSONResponse(await control.values(command))
        except (ValueRefused, ValueInvalid) as error:
            return refused(404 if error.code == "not_found" else 422, error.code, str(error))
        except tuple(_FAULTS) as error:
            return refused(*_FAULTS[type(error)], str(error))

    return Route("/api/v1/values", values, methods=["POST"])
