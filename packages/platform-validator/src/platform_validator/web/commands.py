"""The operator's API, the part that changes something: POST alone, answered as soon as it is begun."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from dataclasses import asdict
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from platform_protocol.ids import JobId, VmName
from platform_validator.attestation.os_image import Shape
from platform_validator.cvm.hosts import UnknownHost
from platform_validator.cvm.vmm import VmmError
from platform_validator.host_name import HostName
from platform_validator.store.port import StoreUnavailable
from platform_validator.web.control import Cancelling, Control, HostDraining, NotStarted, PinBusy

_MAX_BODY = 65_536
_MAX_ID = 200
_CANCELLED = {
    Cancelling.UNKNOWN: (404, "no job of that id was ever granted here: validator jobs list"),
    Cancelling.CLAIMING: (409, "its claim has not been answered yet: ask again"),
    Cancelling.STORED: (409, "its result is stored and is being submitted"),
    Cancelling.ENDED: (409, "it has ended"),
}


def command_routes(control: Control) -> list[Route]:
    """Routes below `/api/v1`: drain, a job's cancel, reclaim of strays, drain of hosts, pinning, reload.

    A refusal is `{"error", "code"}`.
    """
    commands = _Commands(control)
    return [
        Route("/api/v1/drain", commands.drain, methods=["POST"]),
        Route("/api/v1/jobs/{job_id:path}/cancel", commands.cancel, methods=["POST"]),
        Route("/api/v1/cvms/reclaim", commands.reclaim, methods=["POST"]),
        Route("/api/v1/attestation/pin", commands.pinning),
        Route("/api/v1/attestation/pin", commands.pin, methods=["POST"]),
        Route("/api/v1/hosts/{name}/drain", commands.drain_host, methods=["POST"]),
        Route("/api/v1/hosts/{name}/undrain", commands.undrain_host, methods=["POST"]),
        Route("/api/v1/reload", commands.reload, methods=["POST"]),
    ]


class _Commands:
    def __init__(self, control: Control) -> None:
        self._control = control

    async def drain(self, request: Request) -> Response:
        asked = await _asked(request)
        if asked is None or not isinstance(hurry := asked.get("hurry", False), bool):
            return refused(400, "bad_body", 'expected no body, or {"hurry": true}')
        return JSONResponse(asdict(self._control.drain("operator", hurry=hurry)), status_code=202)

    async def cancel(self, request: Request) -> Response:
        job_id = JobId(request.path_params["job_id"][:_MAX_ID])
        try:
            answer = await self._control.cancel_job(job_id)
        except NotStarted as error:
            return refused(409, "not_started", str(error))
        except StoreUnavailable as error:
            return refused(503, "journal_unreadable", str(error))
        if answer in _CANCELLED:
            code, why = _CANCELLED[answer]
            return refused(code, answer.value, f"job {job_id}: {why}")
        return JSONResponse({"job_id": job_id, "cancelled": True}, status_code=202)

    async def reclaim(self, request: Request) -> Response:
        asked = await _asked(request)
        names = asked.get("names") if asked is not None else None
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            return refused(400, "bad_body", 'expected {"names": [...]}: names of strays')
        try:
            begun = await self._control.reclaim([VmName(name) for name in names])
        except NotStarted as error:
            return refused(409, "not_started", str(error))
        except VmmError as error:
            return refused(503, "vmm_unavailable", str(error))
        return JSONResponse({"reclaiming": begun}, status_code=202)

    async def pinning(self, _: Request) -> Response:
        try:
            return JSONResponse(self._control.pinning())
        except NotStarted as error:
            return refused(409, "not_started", str(error))

    async def pin(self, request: Request) -> Response:
        asked = await _asked(request) or {}
        image, shape = asked.get("image"), _shape(asked)
        if not isinstance(image, str) or not image or shape is None:
            return refused(400, "bad_body", 'expected {"image", "cpu", "memory_mb", "gpus"}')
        try:
            return JSONResponse(self._control.pin(image[:_MAX_ID], shape), status_code=202)
        except NotStarted as error:
            return refused(409, "not_started", str(error))
        except PinBusy as error:
            return refused(409, "busy", str(error))

    async def drain_host(self, request: Request) -> Response:
        return await self._of_host(request, self._control.drain_host)

    async def undrain_host(self, request: Request) -> Response:
        return await self._of_host(request, self._control.undrain_host)

    async def _of_host(self, request: Request, do: Callable[[HostName], Awaitable[HostDraining]]) -> Response:
        try:
            done = await do(HostName(request.path_params["name"][:_MAX_ID]))
        except NotStarted as error:
            return refused(409, "not_started", str(error))
        except UnknownHost as error:
            return refused(404, "unknown_host", str(error))
        except StoreUnavailable as error:
            return refused(503, "journal_unwritable", str(error))
        return JSONResponse(asdict(done))

    async def reload(self, _: Request) -> Response:
        try:
            done = self._control.reload()
        except NotStarted as error:
            return refused(409, "not_started", str(error))
        if done.faults:
            why = "the configuration is invalid: nothing was changed"
            return JSONResponse({"error": why, "code": "invalid", "faults": done.faults}, status_code=422)
        return JSONResponse({"applied": done.applied, "restart": done.restart})


def _shape(asked: dict[str, Any]) -> Shape | None:
    cpu, memory, gpus = asked.get("cpu"), asked.get("memory_mb"), asked.get("gpus", 0)
    for number, least in ((cpu, 1), (memory, 1), (gpus, 0)):
        if not isinstance(number, int) or isinstance(number, bool) or number < least:
            return None
    return Shape(int(cpu or 0), int(memory or 0), int(gpus))


async def _asked(request: Request) -> dict[str, Any] | None:
    """A small JSON object, or nothing at all; None for anything else."""
    body = b""
    async for part in request.stream():
        body += part
        if len(body) > _MAX_BODY:
            return None
    try:
        found = json.loads(body or b"{}")
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def refused(status: int, code: str, error: str) -> Response:
    """A refusal; `code` is a stable word."""
    return JSONResponse({"error": error, "code": code}, status_code=status)
