"""A challenge as they are deployed, with version 1 of the session: written from the page, no code of ours.

It runs in a thread with an event loop of its own, so that a handler that blocks blocks it as it blocks them.
Key derivation is RFC 5869 by hand; nothing of `platform_protocol` is imported.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import hmac
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

Json = dict[str, Any]
Handler = Callable[[Json], Any]
_INFO = b"platform-api-sdk-v1"


def hkdf(shared: bytes, salt: bytes) -> bytes:
    """RFC 5869 with SHA-256, one block."""
    extracted = hmac.new(salt, shared, hashlib.sha256).digest()
    return hmac.new(extracted, _INFO + b"\x01", hashlib.sha256).digest()


def development_quote(nonce: bytes, offset: int) -> bytes:
    """Random bytes, with the hash of the nonce where a reader may look for it."""
    quote = bytearray(os.urandom(1024))
    quote[offset : offset + 32] = hashlib.sha256(nonce).digest()
    return bytes(quote)


class HangUp(Exception):
    """A handler raises it: the connection ends in the middle of the job."""


@dataclass
class DeployedChallenge:
    """One of them, and what it saw.

    Args:
        event_log, rtmrs: As it shows them.
        hash_at: Where its development quote has the hash of the nonce.
        rejects: Why it rejects every validator; None: it does not.
        handlers: By job name; "" is the default one. One returns the result, or raises the error.
        reports: The `job_result` of a handler's end, before `message_id` is put to it; None: theirs.
        says: Frames, of either kind, that it sends after the handshake as they are.
        asks: Messages that it seals and sends once it is told `orm_ready`.
    """

    event_log: Any = "[]"
    rtmrs: Any = field(default_factory=dict)
    hash_at: int = 568
    rejects: str | None = None
    handlers: dict[str, Handler] = field(default_factory=lambda: {"": lambda _payload: {"score": 0.25}})
    reports: Callable[[str, Any], Json] | None = None
    says: list[str | bytes] = field(default_factory=list)
    asks: list[Json] = field(default_factory=list)
    begins: list[Json] = field(default_factory=list)
    accepts: list[Json] = field(default_factory=list)
    heard: list[Json] = field(default_factory=list)
    ended: list[str] = field(default_factory=list)
    port: int = 0
    _number: int = 0

    @contextlib.contextmanager
    def served(self) -> Iterator[None]:
        """Serve until the block ends, or a handler ends the server."""
        up, loop = threading.Event(), asyncio.new_event_loop()
        loop.set_exception_handler(lambda _loop, _what: None)  # what a handler ends is noted, not told

        def run() -> None:
            try:
                loop.run_until_complete(self._serve(up))
            except SystemExit:
                self.ended.append("server")
            except asyncio.CancelledError:
                pass
            finally:
                for task in asyncio.all_tasks(loop):
                    task.cancel()
                loop.run_until_complete(asyncio.sleep(0))
                loop.close()

        thread = threading.Thread(target=run)
        thread.start()
        up.wait(30)
        try:
            yield
        finally:
            with contextlib.suppress(RuntimeError):  # it ended by itself
                loop.call_soon_threadsafe(self._stop.set)
            thread.join(30)

    async def _serve(self, up: threading.Event) -> None:
        self._stop = asyncio.Event()
        async with serve(self._connected, "127.0.0.1", 0, max_size=None, ping_interval=None) as server:
            self.port = next(iter(server.sockets)).getsockname()[1]
            up.set()
            await self._stop.wait()

    async def _connected(self, connection: ServerConnection) -> None:
        try:
            await self._converse(connection)
        except HangUp:
            connection.transport.abort()
        except ConnectionClosed as closed:
            self.ended.append(f"connection {closed.rcvd.code if closed.rcvd else None}")

    async def _converse(self, connection: ServerConnection) -> None:
        begin = json.loads(await connection.recv())
        self.begins.append(begin)
        if self.rejects is not None:
            await connection.send(json.dumps({"type": "attestation_reject", "reason": self.rejects}))
            return
        key = X25519PrivateKey.generate()
        quote = development_quote(bytes.fromhex(begin["nonce"]), self.hash_at)
        answer = {
            "type": "attestation_response",
            "quote": base64.b64encode(quote).decode(),
            "event_log": self.event_log,
            "rtmrs": self.rtmrs,
            "chal_x25519_pub": base64.b64encode(key.public_key().public_bytes_raw()).decode(),
        }
        await connection.send(json.dumps(answer))
        accepted = json.loads(await connection.recv())
        self.accepts.append(accepted)
        if accepted.get("type") != "attestation_ok":
            return
        peer = X25519PublicKey.from_public_bytes(base64.b64decode(begin["val_x25519_pub"]))
        cipher = ChaCha20Poly1305(hkdf(key.exchange(peer), base64.b64decode(accepted["hkdf_salt"])))
        for frame in self.says:
            await connection.send(frame)
        async for frame in connection:
            message = _opened(cipher, frame)
            if message is None:
                continue
            self.heard.append(message)
            if message["type"] == "orm_ready":
                for question in self.asks:
                    await connection.send(self._sealed(cipher, question))
            elif message["type"] == "job_execute":
                result = self._execute(message)
                if result is not None:
                    await connection.send(self._sealed(cipher, result))

    def _execute(self, job: Json) -> Json | None:
        """As they do: in the event loop, with the default handler for a name that nobody registered."""
        handler = self.handlers.get(str(job["job_name"]), self.handlers[""])
        try:
            outcome: Any = handler(job["payload"])
            told = {"result": outcome}
        except HangUp:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a handler raises is told
            outcome, told = error, {"error": str(error)}
        if self.reports is not None:
            told = self.reports(job["job_id"], outcome)
        self._number += 1
        return {"type": "job_result", "job_id": job["job_id"], "message_id": f"msg_{self._number}"} | told

    def _sealed(self, cipher: ChaCha20Poly1305, message: Json) -> str:
        nonce = os.urandom(12)
        sealed = cipher.encrypt(nonce, json.dumps(message).encode(), None)
        envelope = {
            "enc": "chacha20poly1305",
            "nonce": base64.b64encode(nonce).decode(),
            "ciphertext": base64.b64encode(sealed).decode(),
        }
        return json.dumps(envelope)


def _opened(cipher: ChaCha20Poly1305, frame: str | bytes) -> Json | None:
    """What an envelope holds; anything else is passed over."""
    try:
        envelope = json.loads(frame)
        nonce = base64.b64decode(envelope["nonce"])
        message: Json = json.loads(cipher.decrypt(nonce, base64.b64decode(envelope["ciphertext"]), None))
    except (ValueError, KeyError, TypeError, InvalidTag):
        return None
    return message
