"""A TCP proxy that breaks connections on purpose, switched while they stand.

It runs in a thread of its own, so that synchronous and asynchronous tests use it alike, and a blocked
event loop on either side does not stop it.
"""

from __future__ import annotations

import asyncio
import functools
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Self

from tests.network.toxics import (
    BOTH,
    Bandwidth,
    BlackHole,
    Direction,
    Down,
    Latency,
    Limit,
    Reset,
    Slicer,
    Toxic,
)

_CHUNK = 65536
_AHEAD = 64
"""Pieces read ahead of the slowest reader: what latency can hold in flight."""
_PATIENCE_S = 10.0
_TICKS = 20
"""A bandwidth is portioned so many times a second."""


class TcpProxy:
    """`with TcpProxy(("127.0.0.1", 8080)) as proxy:`, then connect to `proxy.address`.

    `proxy.set(Latency(0.5), Slicer())` replaces what was set, for both directions or those named;
    `proxy.set()` lets everything pass again.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        listen: tuple[str, int] = ("127.0.0.1", 0),
        rng: random.Random | None = None,
    ) -> None:
        """Bind `listen` at once; port 0 takes a free one. `rng` draws the jitter."""
        self._upstream = upstream
        self._rng = rng or random.Random()
        # Bound and never listening: nobody else is given the port while the proxy is down.
        self._keep = _bound(listen)
        self.address: tuple[str, int] = self._keep.getsockname()[:2]
        self._toxics: dict[Direction, tuple[Toxic, ...]] = dict.fromkeys(BOTH, ())
        self._generation = 0
        self._connections: set[_Connection] = set()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._stop = asyncio.Event()
        self._changed = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="tcp-proxy", daemon=True)
        self._up = threading.Event()
        self._failed: BaseException | None = None
        self.accepted = 0
        """Connections until now."""
        self.passed: Counter[Direction] = Counter()
        """Bytes delivered until now."""
        self.swallowed: Counter[Direction] = Counter()
        """Bytes that a black hole took."""

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._up.wait(_PATIENCE_S), "the proxy's thread did not start"
        return self

    def __exit__(self, *_: object) -> None:
        if self._loop is not None and self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(_PATIENCE_S)
        self._keep.close()
        if self._failed is not None:
            raise self._failed

    @property
    def url(self) -> str:
        """As the base of an HTTP service."""
        return f"http://{self.address[0]}:{self.address[1]}"

    @property
    def open(self) -> int:
        """Connections that stand."""
        return len(self._connections)

    def set(self, *toxics: Toxic, directions: Sequence[Direction] = BOTH) -> None:
        """Replace what is done in these directions; in force when this returns.

        `Down` concerns the listener, thus both directions.
        """
        self._call(lambda: self._set(toxics, directions))

    def toxics(self, direction: Direction) -> tuple[Toxic, ...]:
        """What is done now."""
        return self._toxics[direction]

    @property
    def generation(self) -> int:
        """Counts the calls of `set`; toxics that count bytes begin anew with each."""
        return self._generation

    async def held(self, direction: Direction, due: float) -> None:
        """Wait until `due` (the loop's clock), or until there is no latency in force."""
        loop = asyncio.get_running_loop()
        while due > loop.time() and any(isinstance(each, Latency) for each in self._toxics[direction]):
            with suppress(TimeoutError):
                async with asyncio.timeout_at(due):
                    await self._changed.wait()

    def latency(self, direction: Direction) -> float:
        """Seconds that a piece read now is held back."""
        delays = [
            each.seconds + self._rng.uniform(-each.jitter, each.jitter)
            for each in self._toxics[direction]
            if isinstance(each, Latency)
        ]
        return max(0.0, sum(delays))

    def _set(self, toxics: tuple[Toxic, ...], directions: Sequence[Direction]) -> None:
        hole = self._has(BlackHole())
        for direction in directions:
            self._toxics[direction] = toxics
        self._generation += 1
        self._changed.set()
        self._changed = asyncio.Event()
        down = self._has(Down())
        if down != (self._listener is None):
            self._close() if down else self._listen()
        for connection in list(self._connections):
            if self._has(Reset(0)) or (hole and connection.holed and not self._has(BlackHole())):
                connection.end(reset=True)
            elif down:
                connection.end(reset=False)

    def _has(self, toxic: Toxic) -> bool:
        return any(toxic in each for each in self._toxics.values())

    def _call(self, act: Callable[[], None]) -> None:
        async def called() -> None:
            act()

        assert self._loop is not None, "set() inside `with`"
        asyncio.run_coroutine_threadsafe(called(), self._loop).result(_PATIENCE_S)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that leaves `with`
            self._failed = error
            self._up.set()

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as self._group:
            self._listen()
            self._up.set()
            await self._stop.wait()
            self._close()
            for connection in list(self._connections):
                connection.end(reset=False)

    def _listen(self) -> None:
        self._listener = _bound(self.address)
        self._listener.listen(512)
        self._accepting = self._group.create_task(self._accept(self._listener))

    def _close(self) -> None:
        if self._listener is not None and self._accepting is not None:
            self._accepting.cancel()
            self._listener.close()
            self._listener = None

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            client, _ = await loop.sock_accept(listener)
            client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.accepted += 1
            connection = _Connection(self, client)
            if self._has(Reset(0)):
                connection.end(reset=True)
                continue
            self._connections.add(connection)
            connection.task = self._group.create_task(connection.run(self._upstream))
            connection.task.add_done_callback(functools.partial(self._ended, connection))

    def _ended(self, connection: _Connection, _: asyncio.Task[None]) -> None:
        self._connections.discard(connection)
        connection.close()


class _Connection:
    """A client's connection and ours to the server."""

    def __init__(self, proxy: TcpProxy, client: socket.socket) -> None:
        self._proxy = proxy
        self._client = client
        self._server: socket.socket | None = None
        self.task: asyncio.Task[None] | None = None
        self.holed = False

    async def run(self, upstream: tuple[str, int]) -> None:
        """Connect and pass bytes both ways until both are done, or one breaks."""
        try:
            self._server = server = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
            server.setblocking(False)
            server.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            async with asyncio.timeout(_PATIENCE_S):
                await asyncio.get_running_loop().sock_connect(server, upstream)
            async with asyncio.TaskGroup() as group:
                for direction, source, sink in (
                    (Direction.UPSTREAM, self._client, server),
                    (Direction.DOWNSTREAM, server, self._client),
                ):
                    _Pump(self._proxy, self, direction, source, sink).start(group)
        except* OSError:
            self._mark_reset()

    def end(self, *, reset: bool) -> None:
        """Break it off: an RST to both, or closed in good order."""
        if reset:
            self._mark_reset()
        if self.task is None:
            self.close()
        else:
            self.task.cancel()

    def close(self) -> None:
        """Close both sockets."""
        for end in self._ends():
            end.close()

    def _mark_reset(self) -> None:
        for end in self._ends():
            with suppress(OSError):
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    def _ends(self) -> list[socket.socket]:
        return [self._client] if self._server is None else [self._client, self._server]


class _Pump:
    """One direction of one connection."""

    def __init__(
        self,
        proxy: TcpProxy,
        connection: _Connection,
        direction: Direction,
        source: socket.socket,
        sink: socket.socket,
    ) -> None:
        self._proxy = proxy
        self._connection = connection
        self._direction = direction
        self._source = source
        self._sink = sink
        self._queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_AHEAD)
        self._passed = 0
        self._generation = proxy.generation

    def start(self, group: asyncio.TaskGroup) -> None:
        group.create_task(self._take())
        group.create_task(self._give())

    async def _take(self) -> None:
        loop, due = asyncio.get_running_loop(), 0.0
        while True:
            try:
                data = await loop.sock_recv(self._source, _CHUNK)
            except OSError:
                if not self._holed():
                    raise
                data = b""  # that one end is gone is lost like everything else
            due = max(due, loop.time() + self._proxy.latency(self._direction))
            await self._queue.put((due, data))
            if not data:
                return

    async def _give(self) -> None:
        while True:
            due, data = await self._queue.get()
            await self._proxy.held(self._direction, due)
            if not data:
                if self._holed():
                    await asyncio.Event().wait()
                self._sink.shutdown(socket.SHUT_WR)
                return
            await self._deliver(data)

    def _holed(self) -> bool:
        """A black hole is in force; something is lost in it now."""
        holed = BlackHole() in self._proxy.toxics(self._direction)
        self._connection.holed |= holed
        return holed

    async def _deliver(self, data: bytes) -> None:
        loop = asyncio.get_running_loop()
        while data:
            if self._proxy.generation != self._generation:
                self._generation, self._passed = self._proxy.generation, 0
            toxics = self._proxy.toxics(self._direction)
            if self._holed():
                self._proxy.swallowed[self._direction] += len(data)
                return
            size, pause = _portion(toxics, len(data), self._passed)
            piece, data = data[:size], data[size:]
            await loop.sock_sendall(self._sink, piece)
            self._passed += size
            self._proxy.passed[self._direction] += size
            for toxic in toxics:
                if isinstance(toxic, Reset | Limit) and self._passed >= toxic.after_bytes:
                    self._connection.end(reset=isinstance(toxic, Reset))
                    await asyncio.Event().wait()
            await asyncio.sleep(pause)


def _portion(toxics: Sequence[Toxic], length: int, passed: int) -> tuple[int, float]:
    """How many bytes may go now, and the pause after them in seconds."""
    size, pause = length, 0.0
    for toxic in toxics:
        match toxic:
            case Slicer():
                size = min(size, toxic.size)
                pause = max(pause, toxic.delay)
            case Bandwidth():
                size = min(size, max(1, toxic.bytes_per_second // _TICKS))
            case Reset() | Limit():
                size = min(size, max(0, toxic.after_bytes - passed))
            case _:
                pass
    for toxic in toxics:
        if isinstance(toxic, Bandwidth):
            pause = max(pause, size / toxic.bytes_per_second)
    return size, pause


def _bound(address: tuple[str, int]) -> socket.socket:
    made = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    made.setblocking(False)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    made.bind(address)
    return made
