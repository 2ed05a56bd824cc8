"""Serves the connections of CVMs: who is it, what does it want, may it; then carries it there.

One connection is one tunnel (CONNECT) or one request (`GET http://…`). Nothing is resolved or connected to
before the CVM is known and the name is on its list, and what is connected to is the address that was
looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence

import h11

from platform_validator.egress import dialing
from platform_validator.egress.accounts import Account, Accounts
from platform_validator.egress.addresses import Network, dialable
from platform_validator.egress.client_hello import HelloReader
from platform_validator.egress.dialing import LIMIT, Stream
from platform_validator.egress.exchange import exchange, read_request
from platform_validator.egress.flow import Flow
from platform_validator.egress.http_forward import MAX_HEAD, answer, credentials, onward, values_of
from platform_validator.egress.policy import check_hello, check_host_header, check_target
from platform_validator.egress.refusals import OF_THE_OTHER_SIDE, Reason, Refused
from platform_validator.egress.resolver import Resolver
from platform_validator.egress.target import Target, absolute_url, authority

HELLO_WITHIN = 10.0
"""Seconds for a ClientHello after the tunnel stands."""
_UNKNOWN_AT_ONCE = 128
_HTTP_PORT = 80
_LINGER, _LINGER_BYTES = 1.0, 1024 * 1024
_CHUNK = 16 * 1024
_TLS_HANDSHAKE = b"\x16"
_ESTABLISHED = b"HTTP/1.1 200 Connection established\r\n\r\n"
_ACCESS_DENIED = bytes((21, 3, 3, 0, 2, 2, 49))
"""A fatal TLS alert (RFC 8446 6.2): a TLS client then says so, and not that the connection broke."""
_STATUS = {
    Reason.UNAUTHENTICATED: 407,
    Reason.BAD_REQUEST: 400,
    Reason.BAD_TARGET: 400,
    Reason.SLOW: 408,
    Reason.TOO_MANY_CONNECTIONS: 429,
} | dict.fromkeys(OF_THE_OTHER_SIDE, 502)
_FORBIDDEN = 403

Tell = Callable[[str, Reason, str], None]


class EgressServer:
    """The connections of all CVMs.

    Args:
        accounts: Who may reach what.
        resolver: Asked for the names that may be reached.
        denied: The operator's networks that nothing is connected to.
        tell: Told of each refusal: the CVM ("" unknown), why, and what it wanted, as it wrote it.
    """

    def __init__(
        self, accounts: Accounts, *, resolver: Resolver, denied: Sequence[Network], tell: Tell
    ) -> None:
        self._accounts = accounts
        self._resolver = resolver
        self._denied = tuple(denied)
        self._tell = tell
        self._unknown: dict[asyncio.Task[None], None] = {}

    async def listen(self, host: str, port: int) -> asyncio.Server:
        """Begin to serve. Raises OSError where the address is taken."""
        return await asyncio.start_server(self._connected, host, port, limit=LIMIT, backlog=128)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Whatever ends a connection ends it alone. One that never says who it is makes room for the next."""
        task: asyncio.Task[None] | None = asyncio.current_task()
        if task is None or len(self._unknown) >= 2 * _UNKNOWN_AT_ONCE:
            writer.transport.abort()
            return
        self._unknown[task] = None
        if len(self._unknown) > _UNKNOWN_AT_ONCE:
            next(iter(self._unknown)).cancel()
        try:
            await self._serve((reader, writer), task)
        except asyncio.CancelledError:
            # Cut because its CVM is gone, or another needs the room; nobody waits for this task.
            writer.transport.abort()
        except (OSError, TimeoutError, ExceptionGroup):
            writer.transport.abort()
        finally:
            self._unknown.pop(task, None)
            writer.close()

    async def _serve(self, guest: Stream, task: asyncio.Task[None]) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        account: Account | None = None
        wanted = ""
        try:
            request = await read_request(connection, guest)
            if request is None:
                return
            named = credentials(request.headers)
            account = self._accounts.authenticate(named.vm, named.password) if named else None
            if account is None:
                raise Refused(Reason.UNAUTHENTICATED, "expected a Proxy-Authorization")
            wanted = request.target.decode("latin-1")
            self._accounts.check_room(account)
            account.enter()
            account.tasks.add(task)
            # Those that are refused for their number stay among the unknown, which are few.
            self._unknown.pop(task, None)
            flow = Flow(account)
            async with flow.timeout:
                if request.method == b"CONNECT":
                    await self._tunnel(connection, request, guest, account, flow)
                else:
                    await self._request(connection, request, guest, flow, account)
        except Refused as error:
            self._note(account, error, wanted)
            if connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                await _refuse(guest, answer(_STATUS.get(error.reason, _FORBIDDEN), error.reason, str(error)))
        finally:
            if account is not None:
                account.tasks.discard(task)

    async def _request(
        self, connection: h11.Connection, request: h11.Request, guest: Stream, flow: Flow, account: Account
    ) -> None:
        target, path = absolute_url(request.target.decode("latin-1"))
        check_target(target, account.grant)
        check_host_header(values_of(request.headers, b"host"), target)
        onwards = onward(request, path=path, host=_host_value(target))
        async with self._dialled(target) as host:
            await exchange(connection, onwards, guest=guest, host=host, flow=flow)

    async def _tunnel(
        self, connection: h11.Connection, request: h11.Request, guest: Stream, account: Account, flow: Flow
    ) -> None:
        target = authority(request.target.decode("latin-1"))
        check_target(target, account.grant)
        if values_of(request.headers, b"content-length") or values_of(request.headers, b"transfer-encoding"):
            raise Refused(Reason.BAD_REQUEST, "expected CONNECT without a body")
        async with self._dialled(target) as host:
            connection.next_event()  # the end of the request, which has no body
            early, _ = connection.trailing_data
            connection.send(h11.Response(status_code=200, headers=[]))
            guest[1].write(_ESTABLISHED)
            await guest[1].drain()
            try:
                await self._inside(guest, target, bytes(early), host=host, flow=flow)
            except Refused as error:
                self._note(account, error, str(target))

    async def _inside(self, guest: Stream, target: Target, early: bytes, *, host: Stream, flow: Flow) -> None:
        """What the tunnel carries: TLS for the name; on port 80 also one plain request for it."""
        try:
            async with asyncio.timeout(HELLO_WITHIN):
                early = early or await guest[0].read(_CHUNK)
                if target.port != _HTTP_PORT or early.startswith(_TLS_HANDSHAKE):
                    early = await _checked_hello(guest, target, early)
                    plain = False
                else:
                    plain = True
        except TimeoutError as error:
            await _refuse(guest, _ACCESS_DENIED)
            raise Refused(Reason.SLOW, f"expected a ClientHello within {HELLO_WITHIN:g} s") from error
        except Refused:
            await _refuse(guest, _ACCESS_DENIED)
            raise
        if not early:
            return
        if plain:
            await self._plain(guest, target, early, host=host, flow=flow)
        else:
            await flow.send(host, early)
            await flow.relay(guest, host)

    async def _plain(self, guest: Stream, target: Target, early: bytes, *, host: Stream, flow: Flow) -> None:
        connection = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        connection.receive_data(early)
        try:
            request = await read_request(connection, guest)
            if request is None:
                return
            path = request.target.decode("latin-1")
            if not path.startswith("/"):
                raise Refused(Reason.BAD_TARGET, "expected a path in a request through a tunnel")
            check_host_header(values_of(request.headers, b"host"), target)
            onwards = onward(request, path=path, host=_host_value(target))
            await exchange(connection, onwards, guest=guest, host=host, flow=flow)
        except Refused as error:
            if connection.our_state in {h11.IDLE, h11.SEND_RESPONSE}:
                await _refuse(guest, answer(_STATUS.get(error.reason, _FORBIDDEN), error.reason, str(error)))
            raise

    @contextlib.asynccontextmanager
    async def _dialled(self, target: Target) -> AsyncIterator[Stream]:
        """A connection to an address that the name has now: looked at, and then exactly that one dialled."""
        found = await self._resolver.resolve(target.host)
        addresses = dialable(found, is_own=dialing.is_own, denied=self._denied).addresses
        host = await dialing.dial(addresses, target.port)
        try:
            yield host
        finally:
            host[1].close()

    def _note(self, account: Account | None, error: Refused, wanted: str) -> None:
        if account is not None:
            account.refused[error.reason.value] += 1
        self._tell("" if account is None else account.vm, error.reason, wanted)


async def _checked_hello(guest: Stream, target: Target, early: bytes) -> bytes:
    """All bytes up to the whole ClientHello, which asks for the target; b"" when the guest ended first."""
    reader, seen, data = HelloReader(), bytearray(), early
    while data:
        seen += data
        hello = reader.feed(data)
        if hello is not None:
            check_hello(hello, target)
            return bytes(seen)
        data = await guest[0].read(_CHUNK)
    return b""


async def _refuse(guest: Stream, told: bytes) -> None:
    """Say it, and read on for a moment: a connection that is closed on unread bytes loses what was said."""
    with contextlib.suppress(OSError, TimeoutError):
        async with asyncio.timeout(_LINGER):
            guest[1].write(told)
            guest[1].write_eof()
            read = 0
            while read < _LINGER_BYTES and (data := await guest[0].read(_CHUNK)):
                read += len(data)


def _host_value(target: Target) -> str:
    return target.host if target.port == _HTTP_PORT else str(target)
