"""Request bodies: read once, capped while they stream, and strict JSON."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ValidationError

from platform_api.errors import ApiError, faults_of
from platform_protocol.canonical import NotCanonical, canonical_json

M = TypeVar("M", bound=BaseModel)
MAX_SUBMISSION = 64 * 1024 * 1024
MAX_RESULT = 32 * 1024 * 1024
"""A result of 16 MiB, once more inside its receipt's R, and 256 KiB of logs."""
MAX_LINES = 4 * 1024 * 1024
MAX_JSON = 256 * 1024
LARGE = 1024 * 1024
"""Bodies above this are hashed and parsed in a thread: the event loop keeps answering renewals."""
_MAX_DEPTH = 64
_LIMITS = (
    (re.compile(r"/challenges/[^/]+/submissions"), MAX_SUBMISSION),
    (re.compile(r"/jobs/[^/]+/results"), MAX_RESULT),
    (re.compile(r"/jobs/[^/]+/logs"), MAX_LINES),
)


async def read_body(request: Request) -> bytes:
    """The body's bytes, at most what its path allows; kept on the request.

    Raises:
        ApiError: 413 `too_large`, before anything above the limit is read.
    """
    kept: bytes | None = getattr(request.state, "body", None)
    if kept is not None:
        return kept
    path = request.url.path
    most = next((limit for form, limit in _LIMITS if form.fullmatch(path)), MAX_JSON)
    declared = request.headers.get("content-length", "")
    if declared.isdigit() and int(declared) > most:
        raise _too_large(most)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > most:
            raise _too_large(most)
    request.state.body = bytes(body)
    return bytes(body)


async def read_value(request: Request, empty: Any = None) -> Any:
    """The body as strict JSON; `empty` stands for no body at all where it is given.

    Raises:
        ApiError: 413 `too_large`; 400 `not_json`: malformed, a key twice, NaN, or nested over 64 deep.
    """
    body = await read_body(request)
    if not body and empty is not None:
        return empty
    return await asyncio.to_thread(_parse, body) if len(body) > LARGE else _parse(body)


def json_body(model: type[M], *, optional: bool = False) -> Callable[[Request], Awaitable[M]]:
    """A dependency that reads the body as `model`. `optional`: no body means the model's defaults.

    Raises:
        ApiError: From the dependency: as `read_value`, and 422 `invalid_request`.
    """

    async def read(request: Request) -> M:
        value = await read_value(request, {} if optional else None)
        try:
            return model.model_validate(value)
        except ValidationError as error:
            raise ApiError(422, "invalid_request", faults_of(error)) from error

    return read


def i_json(value: dict[str, Any]) -> dict[str, Any]:
    """A pydantic validator: payloads are I-JSON, so that everyone computes the same digest of them."""
    try:
        canonical_json(value)
    except NotCanonical as error:
        raise ValueError(str(error)) from error
    return value


def _parse(body: bytes) -> Any:
    try:
        value = json.loads(body, object_pairs_hook=_no_duplicates, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else str(error)[:200]
        raise ApiError(400, "not_json", f"expected JSON: {reason}") from error
    _check_depth(value)
    return value


def _too_large(most: int) -> ApiError:
    return ApiError(413, "too_large", f"expected a body of at most {most} bytes")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _check_depth(value: Any) -> None:
    level = [value]
    for _ in range(_MAX_DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, (dict, list))
            for item in (one.values() if isinstance(one, dict) else one)
        ]
        if not level:
            return
    raise ApiError(400, "not_json", f"expected JSON: nested over {_MAX_DEPTH} deep")
