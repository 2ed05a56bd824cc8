"""Handshakes that go wrong, over real WebSockets: against the served SDK, and against the validator's dial.

The dialler (or the guest) is honest but for one step of each example. Whatever that is, the connection ends
with a code that docs/api-reference.md names, no session comes of it, and the next honest one succeeds.
"""

from __future__ import annotations

import asyncio
import gc
import json
import re
import socket
import threading
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

import pytest
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st
from waiting import until
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed, WebSocketException

from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.challenge import Challenge
from platform_challenge_sdk.health import Health
from platform_challenge_sdk.serve import ChallengeServer
from platform_protocol.ids import Hotkey, VmName
from platform_protocol.session.channel import SealedChannel
from platform_protocol.session.ends import ChallengeSession, ValidatorSession
from platform_protocol.session.errors import SessionError
from platform_protocol.session.messages import GuestState, Ping, Pong
from platform_protocol.session.v2 import (
    MAX_BEGIN,
    MAX_RESPONSE,
    ChallengeHandshake,
    Offer,
    ValidatorHandshake,
)
from platform_protocol.user_config import UserConfig
from platform_validator.cvm.connection import Callee, SessionPace, abandon, dial
from platform_validator.cvm.errors import AttestationRefused, SessionRefused
from platform_validator.cvm.session_link import SessionLink

ROOT = Path(__file__).resolve().parents[3]
SECRET = b"L" * 32
VM = VmName("pv-0123456789-1")
SESSION = "00000000-0000-4000-8000-000000000001"
FUZZ = settings(deadline=None, max_examples=60, phases=[Phase.explicit, Phase.generate])
PACE = SessionPace(dial=20, handshake=20, send=20, retry=0.01, retry_most=0.01)
T = TypeVar("T")

values: st.SearchStrategy[Any] = st.sampled_from(
    [None, "", 0, 1, 2, True, [], {}, "00", "AAAA", "é", "\ud800", "x" * 1000]
)
fields = st.sampled_from(
    [
        "type",
        "versions",
        "version",
        "nonce",
        "val_x25519_pub",
        "validator",
        "session_id",
        "auth",
        "chal_x25519_pub",
        "vm",
        "quote",
        "event_log",
        "vm_config",
    ]
)
changes = st.one_of(
    st.tuples(st.just("set"), fields, values),
    st.tuples(st.just("out"), fields, st.none()),
    st.tuples(st.just("cut"), st.floats(0, 0.99), st.none()),
    st.tuples(st.just("space"), st.none(), st.none()),
    st.tuples(st.just("binary"), st.none(), st.none()),
    st.tuples(st.just("text"), st.text(max_size=40), st.none()),
    st.tuples(st.just("again"), st.none(), st.none()),
    st.tuples(st.just("large"), st.none(), st.none()),
    st.tuples(st.just("gone"), st.none(), st.none()),
)
Change = tuple[str, Any, Any]


def documented() -> set[int]:
    """The codes of the page."""
    page = (ROOT / "docs" / "api-reference.md").read_text()
    section = page[page.index("### How a session's connection ends") :]
    return {int(code) for code in re.findall(r"^\| (\d{4}) \|", section, re.MULTILINE)}


def changed(frame: str, earlier: str, change: Change, most: int) -> str | bytes | None:
    """A handshake frame after a change; None: hang up instead."""
    how, where, value = change
    if how == "set":
        return json.dumps(json.loads(frame) | {where: value})
    if how == "out":
        return json.dumps({key: one for key, one in json.loads(frame).items() if key != where})
    if how == "cut":
        return frame[: int(len(frame) * where)]
    made: dict[str, str | bytes | None] = {
        "space": frame + " ",
        "binary": frame.encode(),
        "text": where,
        "again": earlier,
        "large": frame[:-1] + " " * most + "}",
        "gone": None,
    }
    return made[how]


class Background:
    """An event loop in a thread, for servers that outlive one example."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever)
        self._thread.start()

    def do(self, work: Coroutine[Any, Any, T]) -> T:
        """Its result."""
        return asyncio.run_coroutine_threadsafe(asyncio.wait_for(work, 40), self.loop).result(50)

    def end(self) -> None:
        """Stop."""
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


@pytest.fixture(scope="module")
def background() -> Iterator[Background]:
    """One for all."""
    made = Background()
    yield made
    made.end()


class ServedSdk:
    """The SDK's own server, as a CVM runs it."""

    def __init__(self, background: Background, folder: Path) -> None:
        self._background = background
        self._folder = folder

    async def start(self) -> None:
        """Serve."""
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        config = UserConfig(
            vm=VM,
            launch_secret=UserConfig.encode_secret(SECRET),
            validator_base_url="http://127.0.0.1:1",
            proxy_url=None,
            max_lifetime_s=600,
            hard_lifetime_s=600,
        )
        self.server = ChallengeServer(
            Challenge(), config, Health("ready"), agent=Agent(()), scratch=self._folder, handshake=20
        )
        self.stop = asyncio.Event()
        self._serving = asyncio.ensure_future(self.server.serve("127.0.0.1", self.port, self.stop))
        while True:
            try:
                await self.shake_hands()
            except OSError:
                await asyncio.sleep(0.01)
            else:
                return

    async def end(self) -> None:
        """End it."""
        self.stop.set()
        await self._serving

    async def free(self) -> None:
        """Wait until no handshake is pending: one that was cut off is noticed a moment later."""
        await until(lambda: not self.server._handshaking)

    def _connect(self) -> connect:
        return connect(
            f"ws://127.0.0.1:{self.port}/sdk/ws", ping_interval=None, compression=None, max_size=None
        )

    async def shake_hands(self, at: int = -1, change: Change = ("none", None, None)) -> int | None:
        """Dial, with a change at one of our three frames; the close code, None: the session answers."""
        async with self._connect() as socket:
            handshake = ValidatorHandshake(
                launch_secret=SECRET, vm=VM, validator=Hotkey("5abc"), session_id=SESSION, resume=False
            )
            try:
                return await self._shake(socket, handshake, at, change)
            except ConnectionClosed:
                await socket.wait_closed()
                return socket.close_code
            except SessionError:
                # The frames that the two ends hashed differ: the SDK's hello does not open here.
                return 1006
            finally:
                await abandon(socket)

    async def _shake(
        self, socket: ClientConnection, handshake: ValidatorHandshake, at: int, change: Change
    ) -> int | None:
        begin = handshake.begin()
        sent = begin if at != 0 else changed(begin, begin, change, MAX_BEGIN)
        if sent is None:
            return 1006
        await socket.send(sent)
        handshake.receive(str(await socket.recv()))
        accepted, channel = handshake.accept()
        assert isinstance(channel, SealedChannel)
        sent = accepted if at != 1 else changed(accepted, begin, change, MAX_BEGIN)
        if sent is None:
            return 1006
        await socket.send(sent)
        end = ValidatorSession(SESSION)
        end.connected(channel)
        hello = await socket.recv()
        assert isinstance(hello, bytes)
        end.receive(hello)
        mine: str | bytes | None = end.hello()
        if at == 2:
            flipped = bytes([end.hello()[0] ^ 1])
            how = change[0]
            mine = None if how == "gone" else "text" if how == "text" else flipped + bytes(40)
        if mine is None:
            return 1006
        await socket.send(mine)
        await socket.send(end.send(Ping(n=7)))
        answer = await socket.recv()
        assert isinstance(answer, bytes)
        assert end.receive(answer) == Pong(n=7)
        return None


@pytest.fixture(scope="module")
def sdk(background: Background, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServedSdk]:
    """One server for all examples: what they leave behind shows."""
    served = ServedSdk(background, tmp_path_factory.mktemp("sdk"))
    background.do(served.start())
    yield served
    background.do(served.end())


@pytest.mark.slow(reason="sixty handshakes that fail, each followed by one that succeeds")
def test_no_handshake_with_the_served_sdk_but_the_exact_one_makes_a_session(
    background: Background, sdk: ServedSdk
) -> None:
    """Each ends with a code of the page; the place is free again; nothing is left or remembered of it."""
    codes = documented()
    begins = [len(sdk.server._seen)]
    ended: dict[int | None, int] = {}

    @FUZZ
    @example(at=0, change=("cut", 0.5, None))
    @example(at=0, change=("set", "auth", ""))
    @example(at=0, change=("large", None, None))
    @given(at=st.integers(0, 2), change=changes)
    def one(at: int, change: Change) -> None:
        code = background.do(sdk.shake_hands(at, change))
        # As it was; or the verdict with what nobody reads of it: its text is no part of the transcript.
        harmless = (at == 0 and change[0] == "again") or (
            at == 1
            and (
                change[0] == "space"
                or change == ("set", "version", 2)
                or (change[0] in {"set", "out"} and change[1] not in {"type", "version"})
            )
        )
        assert (code is None) if harmless else (code in codes), (at, change, code)
        ended[code] = ended.get(code, 0) + 1
        background.do(sdk.free())
        assert background.do(sdk.shake_hands()) is None
        begins.append(len(sdk.server._seen))
        # At most the two dials of this example.
        assert begins[-1] - begins[-2] <= 2

    one()
    assert set(ended) >= {4400, 4403, 1009}
    gc.collect()
    held = [each for each in gc.get_objects() if isinstance(each, ServerConnection)]
    assert len(held) <= 10


class LyingGuest:
    """A guest that is honest but for its answer, or its hello."""

    def __init__(self) -> None:
        self.at = -1
        self.change: Change = ("none", None, None)

    async def serve(self, connection: ServerConnection) -> None:
        """One connection."""
        handshake = ChallengeHandshake(launch_secret=SECRET, vm=VM, seen_nonces=set())
        try:
            begin = handshake.receive_begin(str(await connection.recv()))
            answer = handshake.respond(begin.report_data, "[]", "{}")
            sent = answer if self.at != 0 else changed(answer, answer, self.change, MAX_RESPONSE)
            if sent is None:
                return
            await connection.send(sent)
            channel = handshake.receive_verdict(str(await connection.recv()))
            honest = ChallengeSession(SESSION).greet(channel, known=False, state=GuestState())
            hello: str | bytes = honest
            if self.at == 1:
                how = self.change[0]
                hello = "text" if how == "text" else honest[:-1] if how == "again" else bytes(64)
            await connection.send(hello)
            await connection.wait_closed()
        except (SessionError, ConnectionClosed):
            pass


@pytest.mark.slow(reason="sixty dials that fail, each followed by one that succeeds")
def test_no_answer_but_the_exact_one_makes_a_session_with_the_validator(background: Background) -> None:
    """The dial ends with an error that its caller knows, and never with a channel."""
    guest = LyingGuest()

    async def judge(offer: Offer) -> None:
        if offer.quote != offer.report_data:
            raise AttestationRefused("report_data", "the quote binds another handshake")

    async def listen() -> tuple[Any, int]:
        server = await serve(guest.serve, "127.0.0.1", 0, max_size=None, ping_interval=None)
        return server, next(iter(server.sockets)).getsockname()[1]

    server, port = background.do(listen())
    callee = Callee(("127.0.0.1", port), VM, SECRET, SESSION, Hotkey("5abc"))

    async def dialled() -> str:
        try:
            socket, channel = await dial(callee, resume=False, judge=judge, pace=PACE)
            assert isinstance(channel, SealedChannel)
            await SessionLink(SESSION, VM, PACE).greet(socket, channel)
        except (SessionRefused, AttestationRefused, SessionError, WebSocketException) as error:
            return type(error).__name__
        await abandon(socket)
        return "session"

    ended: dict[str, int] = {}

    @FUZZ
    @example(at=0, change=("cut", 0.5, None))
    @example(at=0, change=("out", "version", None))
    @example(at=0, change=("set", "quote", "AAAA"))
    @given(at=st.integers(0, 1), change=changes)
    def one(at: int, change: Change) -> None:
        guest.at, guest.change = at, change
        found = background.do(dialled())
        # As it was: its own version named again, or what is said beside it, which the policy judges.
        same = at == 0 and (
            change == ("set", "version", 2)
            or change[0] in {"space", "again"}
            or (change[0] in {"set", "out"} and change[1] in {"nonce", "versions", "val_x25519_pub"})
            or (change[0] in {"set", "out"} and change[1] in {"validator", "session_id", "auth"})
            or (change[0] == "set" and change[1] in {"event_log", "vm_config"} and isinstance(change[2], str))
        )
        if not same:
            assert found != "session", (at, change)
        ended[found] = ended.get(found, 0) + 1
        guest.at = -1
        assert background.do(dialled()) == "session"

    one()
    assert {"SessionRefused", "AttestationRefused"} <= set(ended)

    async def end() -> None:
        server.close()
        await server.wait_closed()

    background.do(end())
