"""The double over HTTP: on TCP and on a Unix socket, with its version's authentication, forms and faults."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from aiohttp import web
from tests.dstack_double.behaviour import behaviour
from tests.dstack_double.faults import Fault, Faults
from tests.dstack_double.host import Host
from tests.dstack_double.messages import Refused
from tests.dstack_double.rpc import Rpc

Call = partial[Any]
"""A method by its name, that its message is still to be given to."""
IMAGE = "dstack-0.5.5"
_MAX_BODY = 10 * 1024 * 1024
_CHALLENGE = {"WWW-Authenticate": 'Basic realm="dstack-vmm API"'}


class DstackDouble:
    """A VMM of one version.

    Args:
        version: `0.5.2` to `0.5.11`, or `0.6.0` for the head.
        token: With it authentication is enabled.
        clock: Seconds.
        bare_empty: Empty answers have no body at all, as older servers' may; else `null`.

    Attributes:
        host: Its VMs.
        rpc: Its methods.
        faults: What goes wrong.
        calls: Methods in the order in which they came, with their messages.
    """

    def __init__(
        self,
        version: str = "0.6.0",
        *,
        token: str | None = None,
        clock: Callable[[], float] = time.monotonic,
        bare_empty: bool = False,
    ) -> None:
        self.host = Host(behaviour(version), clock, (IMAGE,))
        self.rpc = Rpc(self.host)
        self.faults = Faults()
        self.calls: list[tuple[str, Any]] = []
        self._token = token
        self._bare_empty = bare_empty
        self._late: set[asyncio.Task[None]] = set()

    @contextlib.asynccontextmanager
    async def listening(self, where: Path | int = 0) -> AsyncIterator[str]:
        """Serve on a Unix socket, or on a TCP port (0: any). Left and entered again, it was restarted.

        Yields:
            Its URL.
        """
        app = web.Application(client_max_size=2 * _MAX_BODY)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        try:
            if isinstance(where, Path):
                where.unlink(missing_ok=True)
                await web.UnixSite(runner, str(where)).start()
                yield f"unix:{where}"
            else:
                await web.TCPSite(runner, "127.0.0.1", where).start()
                yield f"http://127.0.0.1:{runner.addresses[0][1]}"
        finally:
            await runner.cleanup()
            for task in self._late:
                task.cancel()
            self.host.restarted()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        headers = {
            "X-App-Version": f"v{self.host.behaviour.version} (git:0123456789abcdef)",
            "X-Accel-Buffering": "no",
        }
        prefix, _, method = request.path.lstrip("/").partition("/")
        if not self._allowed(request, logs=request.path == "/logs"):
            return web.Response(status=401, headers=headers | _CHALLENGE)
        if request.path == "/logs":
            return self._logs(request, headers)
        if prefix == "api" and self.host.behaviour.host_api:
            return self._refused(Refused("Failed to handle request", "only from a guest"), headers)
        if prefix not in ("prpc", "guest") or not method or "/" in method:
            return web.Response(status=404, text='{"error":{"code":404}}', headers=headers)
        call = self.rpc.call if prefix == "prpc" else self.rpc.call_guest
        return await self._call(request, partial(call, method.removeprefix("Teepod.")), headers)

    async def _call(self, request: web.Request, call: Call, headers: dict[str, str]) -> web.StreamResponse:
        [method] = call.args
        if request.content_length and request.content_length > _MAX_BODY:
            return self._refused(Refused("Failed to read request", "payload too large"), headers)
        asked = request.method == "GET" or "json" in request.query
        if not asked and request.content_type != "application/json":
            # Raw protobuf: nothing here speaks it, and a client that forgets to ask for JSON must notice.
            return web.Response(status=400, body=b"\x0a\x07protobuf", content_type="application/octet-stream")
        query = {key: value for key, value in request.query.items() if key not in ("token", "json")}
        body: bytes | dict[str, Any] = query if request.method == "GET" else await request.read()
        self.calls.append((method, body))
        fault = self.faults.take(method)
        if fault is not None:
            return await self._wrong(request, fault, partial(call, body), headers)
        return self._answered(partial(call, body), headers)

    def _answered(self, act: Callable[[], Any], headers: dict[str, str]) -> web.Response:
        try:
            found = act()
        except Refused as error:
            return self._refused(error, headers)
        text = "" if found is None and self._bare_empty else json.dumps(found)
        return web.Response(text=text, content_type="application/json", headers=headers)

    async def _wrong(
        self,
        request: web.Request,
        fault: Fault,
        do: Callable[[], Any],
        headers: dict[str, str],
    ) -> web.StreamResponse:
        def act() -> None:
            for _ in range(fault.effects):
                with contextlib.suppress(Refused):
                    do()

        async def act_late() -> None:
            await asyncio.sleep(fault.after)
            act()

        if fault.after:
            task = asyncio.get_running_loop().create_task(act_late())
            self._late.add(task)
            task.add_done_callback(self._late.discard)
        else:
            act()
        if fault.error is not None:
            return self._refused(Refused("Failed to handle request", fault.error), headers)
        if fault.silent:
            await asyncio.Event().wait()
        if fault.cut and request.transport is not None:
            request.transport.abort()
        status = fault.status or 200
        return web.Response(status=status, text=fault.body, content_type="application/json", headers=headers)

    def _refused(self, error: Refused, headers: dict[str, str]) -> web.Response:
        text = (
            f"{error.context}\n\nCaused by:\n    0: {error.cause}"
            if self.host.behaviour.debug_errors
            else str(error)
        )
        shown = json.dumps({"error": text}, indent=2)
        return web.Response(status=400, text=shown, content_type="application/json", headers=headers)

    def _allowed(self, request: web.Request, *, logs: bool) -> bool:
        if self._token is None:
            return True
        given = request.headers.get("Authorization", "")
        if not self.host.behaviour.guards_all:
            return not logs or given in (self._token, f"Bearer {self._token}", _basic(self._token))
        offered = [request.headers.get("X-Admin-Token", ""), given.removeprefix("Bearer ")]
        if given.startswith("Basic "):
            with contextlib.suppress(ValueError):
                user, _, password = base64.b64decode(given[6:]).decode().partition(":")
                offered += [password, "" if password else user]
        if request.method == "GET":
            offered.append(request.query.get("token", ""))
        return self._token in offered

    def _logs(self, request: web.Request, headers: dict[str, str]) -> web.Response:
        self.host.advance()
        machine = self.host.machines.get(request.query.get("id", ""))
        newer = self.host.behaviour.logs_not_found
        channel = request.query.get("ch", "serial")
        if channel not in ("serial", "stdout", "stderr"):
            return web.Response(
                status=400 if newer else 200, text=f"Unknown channel {channel}", headers=headers
            )
        if machine is None:
            text = "VM not found" if newer else "No such file or directory (os error 2)"
            return web.Response(status=404 if newer else 200, text=text, headers=headers)
        lines = [f"[    0.{at:06}] line {at}" for at in range(machine.boots * 30)]
        shown = machine.stderr.splitlines() if channel == "stderr" else [] if channel == "stdout" else lines
        text = "".join(f"{line}\n" for line in shown[-int(request.query.get("lines", "10000")) :])
        return web.Response(text=text, headers=headers)


def _basic(token: str) -> str:
    return "Basic " + base64.b64encode(f"{token}:".encode()).decode()


class Running:
    """A double that serves from a thread of its own, for as many tests as like. `url` is where."""

    def __init__(self, double: DstackDouble, where: Path | int = 0) -> None:
        self.double = double
        self.url = ""
        self._where = where
        self._ready = threading.Event()
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()

    @contextlib.contextmanager
    def serving(self) -> Iterator[Running]:
        """Until left."""
        thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),), daemon=True)
        thread.start()
        try:
            assert self._ready.wait(30), "the double does not listen"
            yield self
        finally:
            self._loop.call_soon_threadsafe(self._end.set)
            thread.join(30)
            self._loop.close()

    async def _serve(self) -> None:
        async with self.double.listening(self._where) as self.url:
            self._ready.set()
            await self._end.wait()
