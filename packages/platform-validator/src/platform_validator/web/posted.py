"""A command in the body of a POST, read within its limit."""

from __future__ import annotations

from typing import TypeVar

from pydantic import TypeAdapter, ValidationError
from starlette.requests import Request
from starlette.responses import Response

from platform_validator.web.commands import refused

_C = TypeVar("_C")


async def posted(request: Request, form: TypeAdapter[_C], *, max_body: int) -> _C | Response:
    """The command, or the answer that refuses it: over `max_body` bytes, or not of that form."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > max_body:
            return refused(413, "too_large", f"expected at most {max_body} bytes")
    try:
        return form.validate_json(body)
    except ValidationError as error:
        return refused(400, "bad_body", f"expected a command: {error.errors()[0]['msg']}")
