"""Request bodies, read once and with a cap."""

from __future__ import annotations

import json
from typing import Any, TypeVar, overload

from fastapi import Request
from pydantic import BaseModel, ValidationError

from platform_api.errors import ApiError

M = TypeVar("M", bound=BaseModel)
_MAX_DEPTH = 64


async def read_body(request: Request, most: int) -> bytes:
    """The body's bytes; read once, kept on the request.

    Raises:
        ApiError: 413 `too_large`.
    """
    kept: bytes | None = getattr(request.state, "body", None)
    if kept is not None:
        return kept
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


@overload
async def read_json(request: Request, model: type[M], most: int, empty: Any = None) -> M: ...
@overload
async def read_json(request: Request, model: None, most: int, empty: Any = None) -> Any: ...
async def read_json(request: Request, model: type[M] | None, most: int, empty: Any = None) -> Any:
    """The body as JSON, checked against a model where one is given.

    Raises:
        ApiError: 413 `too_large`; 400 `not_json`; 422 `invalid_request`.
    """
    body = await read_body(request, most)
    try:
        value = (
            empty if not body and empty is not None else json.loads(body, object_pairs_hook=_no_duplicates)
        )
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "not_json", f"expected JSON: {str(error)[:200] or 'nested too deep'}") from error
    _check_depth(value)
    if model is None:
        return value
    try:
        return model.model_validate(value)
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, f['loc']))}: {f['msg']}" for f in error.errors()[:10])
        raise ApiError(422, "invalid_request", faults) from error


def _too_large(most: int) -> ApiError:
    return ApiError(413, "too_large", f"expected a body of at most {most} bytes")


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is there twice")
    return found


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
    raise ApiError(400, "not_json", f"nested over {_MAX_DEPTH} deep")
