"""Refusals as RFC 9457 problem details, whatever raised them."""

from __future__ import annotations

from collections.abc import Mapping

import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError
from starlette.exceptions import HTTPException

from platform_api.errors import ApiError, faults_of

_UNAUTHORIZED, _UNAVAILABLE = 401, 503
_CODES = {404: "not_found", 405: "method_not_allowed"}

log = structlog.get_logger(__name__)


def problem(error: ApiError, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """The answer `application/problem+json`."""
    body = {
        "type": "about:blank",
        "title": error.code.replace("_", " "),
        "status": error.status,
        "detail": error.detail,
        "code": error.code,
        **error.extra,
    }
    sent = dict(headers or {})
    if error.status == _UNAVAILABLE:
        sent["Retry-After"] = "1"
    if error.status == _UNAUTHORIZED:
        sent["WWW-Authenticate"] = "Bearer" if error.code.endswith("_token") else "Signature"
    return JSONResponse(body, status_code=error.status, media_type="application/problem+json", headers=sent)


def database_error(error: SQLAlchemyError) -> ApiError:
    """A database that does not answer; the log says why, without the statement's parameters."""
    log.error("database_unavailable", reason=str(error)[:500])
    return ApiError(_UNAVAILABLE, "database_unavailable", "the database does not answer")


def add_handlers(app: FastAPI) -> None:
    """Make every refusal of `app` a problem."""

    @app.exception_handler(ApiError)
    async def refused(request: Request, error: ApiError) -> JSONResponse:
        request.app.state.services.metrics.refused(error.status, error.code)
        return problem(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return await refused(request, ApiError(422, "invalid_request", faults_of(error)))

    @app.exception_handler(HTTPException)
    async def plain(request: Request, error: HTTPException) -> JSONResponse:
        code = _CODES.get(error.status_code, "http_error")
        request.app.state.services.metrics.refused(error.status_code, code)
        return problem(ApiError(error.status_code, code, str(error.detail)), error.headers)

    @app.exception_handler(SQLAlchemyError)
    async def unavailable(request: Request, error: SQLAlchemyError) -> JSONResponse:
        return await refused(request, database_error(error))

    @app.exception_handler(Exception)
    async def failed(request: Request, error: Exception) -> JSONResponse:
        log.error("request_failed", method=request.method, error=type(error).__name__)
        return await refused(request, ApiError(500, "internal_error", "the request failed inside the API"))
