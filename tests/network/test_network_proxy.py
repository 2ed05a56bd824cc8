"""Each toxic does to real sockets what it says."""

from __future__ import annotations

import errno
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from tests.network.__main__ import BadOrder, parse
from tests.network.proxy import TcpProxy
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
)
from waiting import wait_until

UP, DOWN = [Direction.UPSTREAM], [Direction.DOWNSTREAM]


class Echo:
    """A server that sends back what it gets, and remembers it."""

    def __init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address: tuple[str, int] = self._listener.getsockname()[:2]
        self.got = bytearray()
        self.pieces: list[int] = []
        self.ends: list[str] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client:
                while data := client.recv(65536):
                    self.got += data
                    self.pieces.append(len(data))
                    client.sendall(data)
            self.ends.append("closed")
        except ConnectionError as error:
            self.ends.append(errno.errorcode[error.errno or 0])

    def close(self) -> None:
        with suppress(OSError):  # closed before
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@pytest.fixture
def echo() -> Iterator[Echo]:
    made = Echo()
    yield made
    made.close()


@pytest.fixture
def proxy(echo: Echo) -> Iterator[TcpProxy]:
    with TcpProxy(echo.address, rng=random.Random(7)) as made:
        yield made


def dial(proxy: TcpProxy) -> socket.socket:
    made = socket.create_connection(proxy.address, timeout=20)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return made


def received(client: socket.socket, count: int) -> bytes:
    data = b""
    while len(data) < count and (more := client.recv(65536)):
        data += more
    return data


def test_without_a_toxic_bytes_and_the_end_pass_both_ways(proxy: TcpProxy, echo: Echo) -> None:
    """Also more than any buffer holds; half-closed is passed on."""
    sent = random.Random(1).randbytes(3_000_000)
    with dial(proxy) as client:

        def send() -> None:
            client.sendall(sent)
            client.shutdown(socket.SHUT_WR)

        threading.Thread(target=send).start()
        assert received(client, len(sent) + 1) == sent
    wait_until("closed", lambda: proxy.open == 0 and echo.ends == ["closed"])
    assert (proxy.accepted, proxy.passed[Direction.UPSTREAM]) == (1, len(sent))


def test_latency_delays_each_direction_it_is_set_for(proxy: TcpProxy) -> None:
    def round_trip(client: socket.socket) -> float:
        began = time.monotonic()
        client.sendall(b"ping")
        assert received(client, 4) == b"ping"
        return time.monotonic() - began

    with dial(proxy) as client:
        round_trip(client)
        proxy.set(Latency(0.1), directions=UP)
        assert round_trip(client) >= 0.1
        proxy.set(Latency(0.1))
        assert round_trip(client) >= 0.2


def test_latency_with_jitter_varies_and_keeps_the_order(proxy: TcpProxy) -> None:
    proxy.set(Latency(0.02, jitter=0.02), directions=UP)
    delays = {round(proxy.latency(Direction.UPSTREAM), 4) for _ in range(20)}
    assert len(delays) > 10
    assert all(0 <= each <= 0.04 for each in delays)
    sent = b"".join(b"%04d" % number for number in range(40))
    with dial(proxy) as client:
        for at in range(0, len(sent), 4):
            client.sendall(sent[at : at + 4])
            time.sleep(0.001)  # apart, or several would be read and delayed as one
        assert received(client, len(sent)) == sent


def test_what_a_latency_holds_passes_when_it_ends(proxy: TcpProxy) -> None:
    proxy.set(Latency(3600), directions=DOWN)
    with dial(proxy) as client:
        client.sendall(b"ping")
        wait_until("answered", lambda: proxy.passed[Direction.UPSTREAM] == 4)
        proxy.set()
        assert received(client, 4) == b"ping"


def test_down_refuses_and_closes_and_comes_back_at_the_same_address(proxy: TcpProxy) -> None:
    with dial(proxy) as client:
        client.sendall(b"ping")
        received(client, 4)
        proxy.set(Down())
        assert client.recv(10) == b""
        for _ in range(3):
            with pytest.raises(ConnectionRefusedError):
                dial(proxy)
        proxy.set()
        with dial(proxy) as again:
            again.sendall(b"ping")
            assert received(again, 4) == b"ping"


def test_a_black_hole_accepts_and_swallows_and_ends_with_a_reset(proxy: TcpProxy, echo: Echo) -> None:
    """The server neither gets the bytes nor hears that its client has gone."""
    with dial(proxy) as spared, dial(proxy) as client:
        client.sendall(b"ping")
        received(client, 4)
        proxy.set(BlackHole())
        with dial(proxy) as late:
            late.sendall(b"lost too")
            client.sendall(b"lost")
            wait_until("swallowed", lambda: proxy.swallowed[Direction.UPSTREAM] == 12)
            client.settimeout(0.05)
            with pytest.raises(TimeoutError):
                client.recv(10)
            gone = dial(proxy)
            wait_until("accepted", lambda: proxy.accepted == 4)
            gone.close()
            wait_until("four open", lambda: proxy.open == 4)
            assert (bytes(echo.got), echo.ends) == (b"ping", [])
            client.settimeout(20)
            proxy.set()
            for one in (client, late):
                with pytest.raises(ConnectionResetError):
                    one.recv(10)
        spared.sendall(b"pong")
        assert received(spared, 4) == b"pong"


def test_a_black_hole_of_one_direction_loses_the_answer_only(proxy: TcpProxy, echo: Echo) -> None:
    """The server has done it; the client never hears."""
    proxy.set(BlackHole(), directions=DOWN)
    with dial(proxy) as client:
        client.sendall(b"commit")
        wait_until("answer lost", lambda: proxy.swallowed[Direction.DOWNSTREAM] == 6)
        assert bytes(echo.got) == b"commit"


def test_a_reset_strikes_both_ends_of_what_stands_and_of_what_comes(proxy: TcpProxy, echo: Echo) -> None:
    with dial(proxy) as client:
        client.sendall(b"ping")
        received(client, 4)
        proxy.set(Reset())
        with pytest.raises(ConnectionResetError):
            client.recv(10)
        wait_until("the server's end", lambda: echo.ends == ["ECONNRESET"])
        with pytest.raises(ConnectionResetError), dial(proxy) as late:
            late.recv(10)


def test_a_reset_in_mid_body_passes_exactly_so_many_bytes(proxy: TcpProxy, echo: Echo) -> None:
    proxy.set(Reset(after_bytes=1000), directions=UP)
    with dial(proxy) as client:
        client.sendall(bytes(5000))
        wait_until("reset", lambda: echo.ends == ["ECONNRESET"])
        assert len(echo.got) <= 1000
        assert proxy.passed[Direction.UPSTREAM] == 1000


def test_a_slicer_sends_single_bytes(proxy: TcpProxy, echo: Echo) -> None:
    proxy.set(Slicer(size=1, delay=0.002), directions=UP)
    with dial(proxy) as client:
        client.sendall(bytes(range(100)))
        assert received(client, 100) == bytes(range(100))
    assert bytes(echo.got) == bytes(range(100))
    assert echo.pieces.count(1) >= 10, echo.pieces


def test_a_bandwidth_is_not_exceeded(proxy: TcpProxy) -> None:
    proxy.set(Bandwidth(200_000), directions=DOWN)
    with dial(proxy) as client:
        began = time.monotonic()
        client.sendall(bytes(100_000))
        assert len(received(client, 100_000)) == 100_000
        assert time.monotonic() - began >= 0.45


def test_a_limit_passes_exactly_so_many_bytes_and_closes_in_good_order(proxy: TcpProxy) -> None:
    proxy.set(Limit(after_bytes=1000), directions=DOWN)
    with dial(proxy) as client:
        client.sendall(bytes(600))
        assert len(received(client, 600)) == 600
        client.sendall(bytes(600))
        assert len(received(client, 600)) == 400
        assert client.recv(1) == b""
        wait_until("closed", lambda: proxy.open == 0)


def test_nobody_behind_it_is_a_reset(echo: Echo) -> None:
    """Connected, then dropped: as a load balancer without a server does."""
    echo.close()
    with (
        TcpProxy(echo.address) as proxy,
        pytest.raises(ConnectionResetError),
        dial(proxy) as client,
    ):
        client.recv(10)


def test_toxics_combine(proxy: TcpProxy) -> None:
    proxy.set(Latency(0.05), Slicer(size=10), Limit(after_bytes=35), directions=DOWN)
    with dial(proxy) as client:
        began = time.monotonic()
        client.sendall(bytes(100))
        assert len(received(client, 100)) == 35
        assert time.monotonic() - began >= 0.05


def test_orders_are_read_or_refused() -> None:
    assert parse("latency seconds=0.5 jitter=0.1 + slicer size=1") == (
        (Latency(0.5, 0.1), Slicer(1)),
        BOTH,
    )
    assert parse("downstream: black_hole") == ((BlackHole(),), (Direction.DOWNSTREAM,))
    assert parse("clear") == ((), BOTH)
    for wrong in ("", "lag", "latency", "latency seconds=x", "limit bytes=3", "sideways: down"):
        with pytest.raises(BadOrder):
            parse(wrong)


@pytest.mark.slow(reason="starts a process")
def test_as_a_program_it_obeys_its_input(echo: Echo) -> None:
    command = [sys.executable, "-m", "tests.network", "--upstream", f"127.0.0.1:{echo.address[1]}"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2]
    ) as program:
        orders, answers = program.stdin, program.stdout
        assert orders is not None
        assert answers is not None

        def told(order: str) -> str:
            print(order, file=orders, flush=True)
            return answers.readline().strip()

        port = int(answers.readline().rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port), timeout=20) as client:
            client.sendall(b"ping")
            assert received(client, 4) == b"ping"
        assert told("nonsense").startswith("not done: expected clear or one of latency,")
        assert told("down") == "done"
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=20)
        orders.close()
        assert program.wait(20) == 0
