"""The VMM over HTTP: pRPC, logs and collateral, all behind one token."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import json
import os
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from platform_vmm.errors import VmmError, VmNotFound
from platform_vmm.machines import Machines
from platform_vmm.prpc import REVISION, VERSION, Prpc
from platform_vmm.sandbox.console import boots
from platform_vmm.simulation.pki import FMSPC, Pki
from platform_vmm.simulation.quote import qe_identity, tcb_info

_MAX_BODY = 10 * 1024 * 1024
_MAX_LINES = 10_000
_HEARTBEAT = 60.0
_POLL = 0.5
_ANSI = re.compile(rb"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)|[@-Z\\-_])")


def make_app(prpc: Prpc, machines: Machines, pki: Pki, token: str) -> ASGIApp:
    """The whole application. Without the token every path is 401."""
    app = Starlette(
        routes=[
            Route("/prpc/{method}", _Calls(prpc).answer, methods=["GET", "POST"]),
            Route("/guest/{method}", _Calls(prpc).answer_guest, methods=["GET", "POST"]),
            Route("/logs", _Logs(machines).answer),
            *_Collateral(pki).routes(),
        ]
    )
    return _Guard(app, token)


class _Guard:
    """X-Admin-Token, Bearer, or Basic with the token as the password."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app = app
        self._token = token.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._allowed(Request(scope)):
            challenge = {"WWW-Authenticate": 'Basic realm="dstack-vmm API"'}
            await Response(status_code=401, headers=challenge)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _allowed(self, request: Request) -> bool:
        offered = [request.headers.get("x-admin-token", "")]
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            offered.append(value.strip())
        elif scheme.lower() == "basic":
            try:
                user, _, password = base64.b64decode(value, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                return False
            offered += [password, user if not password else ""]
        if request.method == "GET":
            offered.append(request.query_params.get("token", ""))
        return any(hmac.compare_digest(one.encode(), self._token) for one in offered)


class _Calls:
    def __init__(self, prpc: Prpc) -> None:
        self._prpc = prpc

    async def answer(self, request: Request) -> Response:
        headers = {"X-App-Version": f"v{VERSION} ({REVISION})"}
        try:
            body = await _body(request)
            method = request.path_params["method"]
            arguments = {} if self._prpc.takes_nothing(method) else _arguments(request, body)
            value = self._prpc.call(method, arguments)
        except VmmError as error:
            return JSONResponse({"error": str(error)}, status_code=400, headers=headers)
        return JSONResponse(value, headers=headers)

    async def answer_guest(self, request: Request) -> Response:
        try:
            arguments = _arguments(request, await _body(request))
            value = self._prpc.call_guest(request.path_params["method"], arguments)
        except VmmError as error:
            return JSONResponse({"error": str(error)}, status_code=400)
        return JSONResponse(value)


async def _body(request: Request) -> bytes:
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY:
            raise VmmError("payload too large")
    return bytes(body)


def _arguments(request: Request, body: bytes) -> dict[str, object]:
    if request.method == "GET":
        query = request.query_params
        found: dict[str, object] = {key: query[key] for key in query if key not in ("token", "ids[]")}
        return found | ({"ids": query.getlist("ids[]")} if "ids[]" in query else {})
    try:
        value = json.loads(body or b"{}")
    except (ValueError, RecursionError) as error:
        raise VmmError("Failed to decode request: not JSON") from error
    if not isinstance(value, dict):
        raise VmmError("Failed to decode request: expected an object")
    return value


class _Logs:
    def __init__(self, machines: Machines) -> None:
        self._machines = machines

    async def answer(self, request: Request) -> Response:
        query = request.query_params
        try:
            console = self._machines.get(query.get("id", "")).console
        except VmNotFound as error:
            return PlainTextResponse(str(error), status_code=404)
        if query.get("ch", "serial") not in ("serial", "stdout", "stderr"):
            return PlainTextResponse(f"Unknown channel {query['ch'][:32]}", status_code=400)
        lines = query.get("lines", str(_MAX_LINES))
        wanted = min(int(lines), _MAX_LINES) if lines.isdecimal() else _MAX_LINES
        plain = query.get("ansi") != "true"
        if query.get("ch", "serial") != "serial":
            return PlainTextResponse(b"")
        tail = await asyncio.to_thread(_tail, console, wanted)
        if query.get("follow") != "true":
            return PlainTextResponse(_strip(tail.text) if plain else tail.text)
        return StreamingResponse(_follow(console, tail, plain=plain), media_type="text/plain")


class _Tail(NamedTuple):
    """The last lines of all boots kept; `inode` and `size` of the newest boot's file when it was read."""

    text: bytes
    inode: int
    size: int


def _tail(path: Path, lines: int) -> _Tail:
    text, inode, size = b"", 0, 0
    for one in boots(path):
        with contextlib.suppress(FileNotFoundError), one.open("rb") as file:
            part = file.read()
            text += part
            if one == path:
                inode, size = os.fstat(file.fileno()).st_ino, len(part)
    return _Tail(b"".join(text.splitlines(keepends=True)[-lines:]) if lines else b"", inode, size)


async def _follow(path: Path, tail: _Tail, *, plain: bool) -> AsyncIterator[bytes]:
    yield _strip(tail.text) if plain else tail.text
    inode, offset, silent = tail.inode, tail.size, 0.0
    while path.parent.exists():
        await asyncio.sleep(_POLL)
        silent += _POLL
        with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_ino != inode:
                inode, offset = status.st_ino, 0
            if status.st_size > offset:
                file.seek(offset)
                fresh = file.read()
                offset, silent = offset + len(fresh), 0.0
                yield _strip(fresh) if plain else fresh
        if silent >= _HEARTBEAT:
            yield b"[vmm heartbeat]\n"
            silent = 0.0


def _strip(text: bytes) -> bytes:
    return _ANSI.sub(b"", text)


class _Collateral:
    """Shaped like Intel's PCS, version 4, under /pccs: what verifies this VMM's simulated quotes."""

    def __init__(self, pki: Pki) -> None:
        self._pki = pki

    def routes(self) -> list[Route]:
        sgx, tdx = "/pccs/sgx/certification/v4", "/pccs/tdx/certification/v4"
        return [
            Route(f"{sgx}/pckcrl", self._pck_crl),
            Route(f"{sgx}/rootcacrl", self._root_crl),
            Route(f"{tdx}/tcb", self._tcb),
            Route(f"{tdx}/qe/identity", self._identity),
        ]

    async def _pck_crl(self, _: Request) -> Response:
        chain = quote(self._pki.pck_crl_chain.decode())
        return Response(
            self._pki.pck_crl(datetime.now(UTC)),
            media_type="application/pkix-crl",
            headers={"SGX-PCK-CRL-Issuer-Chain": chain},
        )

    async def _root_crl(self, _: Request) -> Response:
        return PlainTextResponse(self._pki.root_crl(datetime.now(UTC)).hex())

    async def _tcb(self, request: Request) -> Response:
        if request.query_params.get("fmspc", "").lower() != FMSPC.hex():
            return PlainTextResponse("no TCB info for this FMSPC: this VMM has only its own", status_code=404)
        text, signature = tcb_info(self._pki, datetime.now(UTC))
        chain = quote(self._pki.signer_chain.decode())
        body = f'{{"tcbInfo":{text},"signature":"{signature}"}}'
        return Response(body, media_type="application/json", headers={"TCB-Info-Issuer-Chain": chain})

    async def _identity(self, _: Request) -> Response:
        text, signature = qe_identity(self._pki, datetime.now(UTC))
        chain = quote(self._pki.signer_chain.decode())
        body = f'{{"enclaveIdentity":{text},"signature":"{signature}"}}'
        headers = {"SGX-Enclave-Identity-Issuer-Chain": chain}
        return Response(body, media_type="application/json", headers=headers)
