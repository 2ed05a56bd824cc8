"""The only way out of a run with `network=True`: from its own loopback to the egress proxy, and nowhere else.

The listening socket lives in the run's network namespace; this end, in the SDK's, adds the credentials,
which the submission never sees.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading

from platform_challenge_sdk.means import Egress
from platform_challenge_sdk.proxy_head import MAX_HEAD, HeadRefused, own_answer, rewrite_head

ADDRESS, PORT = "127.0.0.1", 3128
MAX_CONNECTIONS = 32
MAX_BYTES = 1024 * 1024 * 1024
"""Both ways together, of one run."""
_HEAD_WITHIN = _CONNECT_WITHIN = 10.0
_CHUNK = 64 * 1024
_END_OF_HEAD = b"\r\n\r\n"


def proxy_environment() -> dict[str, str]:
    """Where programs look for a proxy; without credentials."""
    url, near = f"http://{ADDRESS}:{PORT}", "localhost,127.0.0.1"
    found = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": near}
    return found | {name.lower(): value for name, value in found.items()}


class Relay:
    """Serves one listening socket in a thread of its own, until `close`."""

    def __init__(self, listener: socket.socket, egress: Egress) -> None:
        self._listener = listener
        self._egress = egress
        self._left = MAX_BYTES
        self._open: set[asyncio.StreamWriter] = set()
        self._connections = 0
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="relay")
        self._thread.start()

    def close(self) -> None:
        """Drop every connection and stop listening; waits until that is done."""
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()
            self._listener.close()

    async def _serve(self) -> None:
        server = await asyncio.start_server(self._carry, sock=self._listener, limit=MAX_HEAD)
        await self._stop.wait()
        server.close()
        for writer in list(self._open):
            writer.transport.abort()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        if others:
            await asyncio.wait(others)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections += 1
        self._open.add(writer)
        try:
            try:
                await self._join(reader, writer)
            except HeadRefused as refused:
                writer.write(own_answer(refused))
            except (OSError, asyncio.IncompleteReadError):
                return
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CONNECT_WITHIN):
                    writer.close()
                    await writer.wait_closed()
        finally:
            self._connections -= 1
            self._open.discard(writer)
            writer.transport.abort()

    async def _join(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._connections > MAX_CONNECTIONS:
            raise HeadRefused(503, f"expected at most {MAX_CONNECTIONS} connections at once")
        try:
            async with asyncio.timeout(_HEAD_WITHIN):
                head = await reader.readuntil(_END_OF_HEAD)
        except TimeoutError as error:
            raise HeadRefused(408, f"expected a request's head within {_HEAD_WITHIN:g} s") from error
        except asyncio.LimitOverrunError as error:
            raise HeadRefused(431, f"expected a head of at most {MAX_HEAD} bytes") from error
        written = rewrite_head(head, self._egress)
        try:
            async with asyncio.timeout(_CONNECT_WITHIN):
                far_reader, far = await asyncio.open_connection(
                    self._egress.host, self._egress.port, limit=_CHUNK
                )
        except (OSError, TimeoutError) as error:
            raise HeadRefused(502, "the egress proxy does not answer") from error
        self._open.add(far)
        try:
            far.write(written)
            async with asyncio.TaskGroup() as both:
                forth = both.create_task(self._copy(reader, far))
                await self._copy(far_reader, writer)
                forth.cancel()  # the proxy has ended: nobody reads what is still sent
        except* OSError:
            pass
        finally:
            self._open.discard(far)
            far.transport.abort()

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while chunk := await reader.read(_CHUNK):
            self._left -= len(chunk)
            if self._left < 0:
                raise ConnectionAbortedError(f"more than {MAX_BYTES} bytes of one run")
            writer.write(chunk)
            await writer.drain()
        if writer.can_write_eof():
            writer.write_eof()
