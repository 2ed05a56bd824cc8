"""The guest agent of one VM: dstack's JSON calls over a Unix socket that only this VM sees."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h11

from platform_vmm.simulation.quote import Measurements

_MAX_BODY = 64 * 1024
_REPORT_DATA = 64
_MOST_CONNECTIONS = 16
_IDLE = 30.0
_PACE = 0.005
"""Between two answers: a guest that asks without end costs the VMM little."""
VERSION = "0.6.0-local"


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """What the agent tells its guest. `quote` None: this VM makes no quotes."""

    app_id: str
    app_name: str
    instance_id: str
    compose_hash: str
    event_log: str
    vm_config: str
    measured: Measurements
    quote: Callable[[bytes], bytes] | None


class AgentRefused(Exception):
    """The call cannot be answered; told to the guest as 400."""


class GuestAgent:
    """Serves one VM. At most 16 connections at once, each idle for at most 30 s."""

    def __init__(self, facts: AgentFacts) -> None:
        self._facts = facts
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.StreamWriter] = set()
        self._turn = asyncio.Lock()

    async def start(self, path: Path) -> None:
        """Listen at `path`, connectable by the guest's uid.

        Bound through a descriptor of its folder: a socket's path has at most 107 bytes, a folder's may
        have more.

        Raises:
            OSError: It cannot be made there.
        """
        path.unlink(missing_ok=True)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            listener.bind(f"/proc/self/fd/{folder}/{path.name}")
            path.chmod(0o666)
            self._server = await asyncio.start_unix_server(
                self._connected, sock=listener, limit=2 * _MAX_BODY, start_serving=False
            )
        except BaseException:
            listener.close()
            raise
        finally:
            os.close(folder)
        await self._server.start_serving()  # may be cancelled: by now `close` knows it

    async def close(self) -> None:
        """Stop and drop connections."""
        if self._server is not None:
            self._server.close()
        for writer in list(self._connections):
            writer.transport.abort()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._connections) >= _MOST_CONNECTIONS:
            writer.transport.abort()
            return
        self._connections.add(writer)
        try:
            await self._serve(reader, writer)
        except (TimeoutError, OSError, h11.ProtocolError):
            return
        finally:
            self._connections.discard(writer)
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=16 * 1024)
        while True:
            async with asyncio.timeout(_IDLE):
                request, body = await _read_request(connection, reader)
            if request is None:
                return
            async with self._turn:
                status, answer = self._answer(request.target.decode("latin-1"), body)
                await asyncio.sleep(_PACE)
            data = json.dumps(answer).encode()
            head = h11.Response(
                status_code=status,
                headers=[("content-type", "application/json"), ("content-length", str(len(data)))],
            )
            for event in (head, h11.Data(data=data), h11.EndOfMessage()):
                writer.write(connection.send(event) or b"")
            async with asyncio.timeout(_IDLE):
                await writer.drain()
            if connection.our_state is not h11.DONE or connection.their_state is not h11.DONE:
                writer.close()
                async with asyncio.timeout(_IDLE):
                    await writer.wait_closed()
                return
            connection.start_next_cycle()

    def _answer(self, target: str, body: bytes) -> tuple[int, dict[str, Any]]:
        method = target.partition("?")[0].rsplit("/", 1)[-1].removeprefix("Tappd.")
        try:
            arguments = json.loads(body) if body.strip() else {}
            if not isinstance(arguments, dict):
                raise AgentRefused("expected a JSON object")
            return 200, self._call(method, arguments)
        except AgentRefused as error:
            return 400, {"error": str(error)}
        except (ValueError, RecursionError):
            return 400, {"error": "expected a JSON object"}

    def _call(self, method: str, arguments: dict[str, Any]) -> dict[str, Any]:
        facts = self._facts
        if method == "Version":
            return {"version": VERSION, "rev": ""}
        if method == "Info":
            return {
                "app_id": facts.app_id,
                "instance_id": facts.instance_id,
                "app_name": facts.app_name,
                "compose_hash": facts.compose_hash,
                "vm_config": facts.vm_config,
                "app_cert": "",
                "tcb_info": json.dumps(self._tcb_info()),
                "device_id": "",
                "key_provider_info": json.dumps({"name": "none", "id": ""}),
                "cloud_vendor": "platform-vmm",
                "cloud_product": "simulated: not a TEE",
            }
        if method in ("GetQuote", "RawQuote"):
            return self._get_quote(arguments)
        raise AgentRefused(f"the simulated agent has no method {method[:64]!r}")

    def _tcb_info(self) -> dict[str, Any]:
        measured = self._facts.measured
        registers = {f"rtmr{number}": value.hex() for number, value in enumerate(measured.rtmrs)}
        return {
            "mrtd": measured.mrtd.hex(),
            **registers,
            "compose_hash": self._facts.compose_hash,
            "event_log": json.loads(self._facts.event_log),
            "simulated": True,
        }

    def _get_quote(self, arguments: dict[str, Any]) -> dict[str, Any]:
        if self._facts.quote is None:
            raise AgentRefused("this VM makes no quotes: it was created without simulated_tee")
        text = arguments.get("report_data")
        try:
            data = bytes.fromhex(str(text).removeprefix("0x"))
        except ValueError as error:
            raise AgentRefused("report_data: expected hex") from error
        if not isinstance(text, str) or len(data) > _REPORT_DATA:
            raise AgentRefused(f"report_data: expected hex of at most {_REPORT_DATA} bytes")
        return {
            "quote": self._facts.quote(data).hex(),
            "event_log": self._facts.event_log,
            "report_data": data.hex(),
            "vm_config": self._facts.vm_config,
        }


async def _read_request(
    connection: h11.Connection, reader: asyncio.StreamReader
) -> tuple[h11.Request | None, bytes]:
    request: h11.Request | None = None
    body = b""
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            connection.receive_data(await reader.read(_MAX_BODY))
        elif isinstance(event, h11.Request):
            request = event
        elif isinstance(event, h11.Data):
            body += bytes(event.data)
            if len(body) > _MAX_BODY:
                raise h11.RemoteProtocolError("body too large")
        elif isinstance(event, h11.EndOfMessage):
            return request, body
        else:
            with contextlib.suppress(h11.ProtocolError):
                connection.send(h11.ConnectionClosed())
            return None, b""
