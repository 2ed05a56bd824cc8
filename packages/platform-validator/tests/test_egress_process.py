"""The egress proxy as its own process, with real sockets: what a CVM reaches, and what it is refused."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import ssl
from pathlib import Path

import pytest
from egress_world import PUBLIC, SECRET, VM, World, authorization, world
from waiting import until

from platform_protocol.ids import VmName
from platform_protocol.spec import NetworkSpec
from platform_protocol.tokens import proxy_password
from platform_validator.clock import SystemClock
from platform_validator.egress import supervisor as supervisor_module
from platform_validator.egress.accounts import EgressLimits
from platform_validator.egress.supervisor import EgressSettings, EgressSupervisor
from platform_validator.network_policy import NetworkPolicy

NAMES = {"api.test.example": [[PUBLIC]], "other.example": [[PUBLIC]], "a.wild.example": [[PUBLIC]]}
pytestmark = pytest.mark.slow(reason="starts the proxy's process")


def refusal(answer: bytes) -> tuple[int, str]:
    """Status and reason word of the proxy's own answer."""
    head = answer.split(b"\r\n\r\n")[0].decode()
    word = next(line for line in head.splitlines() if line.startswith("X-Egress-Refused: "))
    return int(head.split(" ")[1]), word.removeprefix("X-Egress-Refused: ")


async def echoed(made: World, to: str, *, server_name: str | None = None) -> bytes:
    """What a TLS server behind a tunnel echoes; `server_name`: what is asked for instead of the tunnel's."""
    reader, writer = await made.tunnel(to)
    try:
        async with asyncio.timeout(30):
            await writer.start_tls(made.trust, server_hostname=server_name or to.partition(":")[0])
            writer.write(b"hello")
            return await reader.readexactly(5)
    finally:
        writer.transport.abort()


async def test_an_allowed_host_is_reached_by_connect_and_by_plain_http(tmp_path: Path) -> None:
    """TLS goes through end to end, for exact names and those of a pattern; plain HTTP through the proxy."""
    async with world(tmp_path, NAMES) as made:
        assert await echoed(made, "api.test.example:443") == b"hello"
        assert await echoed(made, "API.Test.Example:443") == b"hello"
        assert await echoed(made, "a.wild.example:443") == b"hello"
        answer = await made.ask("GET http://api.test.example/path?q=1 HTTP/1.1\nHost: api.test.example")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert made.requests[0].startswith(b"GET /path?q=1 HTTP/1.1\r\nHost: api.test.example\r\n")
        assert made.dialled() == [f"{PUBLIC}:443"] * 3 + [f"{PUBLIC}:80"]


@pytest.mark.robustness(23, "outside-policy")
async def test_what_is_not_on_the_list_is_refused_and_never_resolved(tmp_path: Path) -> None:
    """A name off the list costs no DNS query: none carries data out."""
    async with world(tmp_path, NAMES) as made:
        for wanted, reason in (
            ("other.example:443", "host_not_allowed"),
            ("wild.example:443", "host_not_allowed"),
            ("secret-data.other.example:443", "host_not_allowed"),
            ("api.test.example.other.example:443", "host_not_allowed"),
            ("api.test.example:22", "port_not_allowed"),
            ("api.test.example.:443", "bad_target"),
            ("user@api.test.example:443", "bad_target"),
            ("169.254.169.254:80", "raw_address"),
            ("2130706433:80", "raw_address"),
            ("0x7f.1:80", "raw_address"),
            ("0177.0.0.1:80", "raw_address"),
            ("[::1]:80", "raw_address"),
            ("[::ffff:127.0.0.1]:80", "raw_address"),
            ("127.0.0.1.:80", "raw_address"),
            ("localhost:80", "bad_target"),
        ):
            status, word = refusal(await made.ask(f"CONNECT {wanted} HTTP/1.1"))
            assert (word, status) == (reason, 400 if reason == "bad_target" else 403), wanted
            address = f"http://{wanted}/"
            assert refusal(await made.ask(f"GET {address} HTTP/1.1\nHost: x"))[1] == reason, wanted
        assert made.dns.asked == []
        assert made.dialled() == []
        await made.until(lambda: sum(made.use().refused.values()) == 30)


async def test_who_does_not_say_who_it_is_is_told_nothing(tmp_path: Path) -> None:
    """No credentials, another CVM's, those of a CVM that is gone, or two: 407 each, in the same words."""
    async with world(tmp_path, NAMES) as made:
        request = "CONNECT api.test.example:443 HTTP/1.1"
        answers = {
            await made.ask(request, authorize=False),
            await made.ask(f"{request}\nProxy-Authorization: {authorization()}"),
            await made.ask(f"{request}\nProxy-Authorization: Basic !!!", authorize=False),
            await made.ask(f"{request}\nProxy-Authorization: Bearer x", authorize=False),
            await made.ask(
                f"{request}\nProxy-Authorization: {authorization(secret=bytes(32))}", authorize=False
            ),
            await made.ask(f"{request}\nProxy-Authorization: {authorization('pv-none')}", authorize=False),
        }
        assert [refusal(answer) for answer in answers] == [(407, "unauthenticated")]
        made.supervisor.forget(VM)
        await made.until(lambda: made.use().open == 0)
        assert refusal(await made.ask(request)) == (407, "unauthenticated")


@pytest.mark.robustness(23, "private-address")
async def test_a_name_that_resolves_to_no_public_address_is_refused(tmp_path: Path) -> None:
    """Loopback, private, link-local, metadata, and what hides one: nothing is dialled."""
    inside = ["127.0.0.1", "10.0.0.1", "169.254.169.254", "100.100.100.200", "168.63.129.16", "0.0.0.0"]
    inside += ["::1", "fe80::1", "fd00:ec2::254", "64:ff9b::a9fe:a9fe", "2002:7f00:1::", "::ffff:10.0.0.1"]
    names = {f"n{number}.wild.example": [[address]] for number, address in enumerate(inside)}
    async with world(tmp_path, names) as made:
        for name in names:
            told = refusal(await made.ask(f"CONNECT {name}:443 HTTP/1.1"))
            assert told == (403, "private_address"), name
        assert made.dialled() == []


async def test_of_mixed_answers_only_the_public_ones_are_dialled(tmp_path: Path) -> None:
    """A private address among them neither spoils the answer nor is it tried."""
    names = {"api.test.example": [["10.0.0.1", PUBLIC, "::1"]]}
    async with world(tmp_path, names) as made:
        assert await echoed(made, "api.test.example:443") == b"hello"
        assert made.dialled() == [f"{PUBLIC}:443"]


async def test_rebinding_reaches_nothing_private(tmp_path: Path) -> None:
    """What is dialled is the answer that was looked at: the next answer counts for the next connection."""
    async with world(tmp_path, {"api.test.example": [[PUBLIC], ["127.0.0.1"]]}) as made:
        assert await echoed(made, "api.test.example:443") == b"hello"
        assert refusal(await made.ask("CONNECT api.test.example:443 HTTP/1.1")) == (403, "private_address")
        assert made.dialled() == [f"{PUBLIC}:443"]


async def test_names_that_do_not_resolve_and_hosts_that_do_not_answer_are_told_apart(tmp_path: Path) -> None:
    """502, with another word each."""
    names: dict[str, list[list[str]]] = {"b.wild.example": [["198.41.0.4"]], "c.wild.example": [[]]}
    async with world(tmp_path, names) as made:
        told = [
            refusal(await made.ask(f"CONNECT {name}.wild.example:443 HTTP/1.1")) for name in ("a", "b", "c")
        ]
        assert told == [(502, "name_unknown"), (502, "unreachable"), (502, "name_unknown")]


async def test_a_tunnel_to_443_carries_tls_or_nothing(tmp_path: Path) -> None:
    """Whatever is no ClientHello ends the tunnel; nothing of it reaches the host."""
    async with world(tmp_path, NAMES) as made:
        for first in (
            b"GET / HTTP/1.1\r\nHost: api.test.example\r\n\r\n",
            b"SSH-2.0-x\r\n",
            b"\x16\x03\x01\x00\x05\x02\x00\x00\x01\x00",
        ):
            reader, writer = await made.tunnel("api.test.example:443")
            writer.write(first)
            async with asyncio.timeout(30):
                assert (await reader.read(-1))[:1] == b"\x15", first
            writer.close()
        use = made.supervisor.use(VM)
        assert use is not None
        await made.until(lambda: use.refused == {"not_tls": 2, "bad_hello": 1})
        assert use.sent_bytes == 0


async def test_the_server_name_must_be_the_tunnels(tmp_path: Path) -> None:
    """Another name, or none, ends the tunnel with a TLS alert that says access denied."""
    async with world(tmp_path, NAMES) as made:
        with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
            await echoed(made, "api.test.example:443", server_name="other.example")
        made.trust.check_hostname = False
        made.trust.verify_mode = ssl.CERT_NONE
        with pytest.raises(ssl.SSLError, match="ACCESS_DENIED"):
            await echoed(made, "api.test.example:443", server_name="127.0.0.1")
        await made.until(lambda: made.use().refused == {"sni_mismatch": 1, "no_sni": 1})


async def test_a_hello_in_the_smallest_pieces_goes_through(tmp_path: Path) -> None:
    """However TCP cuts it."""
    async with world(tmp_path, NAMES) as made:
        reader, writer = await made.tunnel("api.test.example:443")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        client = made.trust.wrap_bio(incoming, outgoing, server_hostname="api.test.example")
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        for byte in outgoing.read():
            writer.write(bytes((byte,)))
            await writer.drain()
        async with asyncio.timeout(30):
            incoming.write(await reader.read(65536))
        with contextlib.suppress(ssl.SSLWantReadError):
            client.do_handshake()
        assert client.cipher() is not None
        writer.close()


async def test_plain_http_through_a_tunnel_to_80_is_looked_at_as_well(tmp_path: Path) -> None:
    """The Host must be the tunnel's; TLS on 80 is looked at as TLS."""
    async with world(tmp_path, NAMES) as made:
        for request, expected in (
            (b"GET /x HTTP/1.1\r\nHost: api.test.example\r\n\r\n", b"HTTP/1.1 200 OK"),
            (b"GET /x HTTP/1.1\r\nHost: other.example\r\n\r\n", b"HTTP/1.1 403 Forbidden"),
            (b"GET http://other.example/ HTTP/1.1\r\nHost: api.test.example\r\n\r\n", b"HTTP/1.1 400"),
        ):
            reader, writer = await made.tunnel("api.test.example:80")
            writer.write(request)
            async with asyncio.timeout(30):
                assert (await reader.read(-1)).startswith(expected)
            writer.close()
        assert len(made.requests) == 1


async def test_every_request_names_its_own_target_and_a_connection_carries_one(tmp_path: Path) -> None:
    """A second request behind an allowed one is never served: not pipelined, not smuggled in a body."""
    async with world(tmp_path, NAMES) as made:
        get = "GET http://api.test.example/ HTTP/1.1\nHost: api.test.example"
        two = f"{get}\nX: y\n\n" + "GET http://other.example/ HTTP/1.1\r\nHost: other.example\r\n\r\n"
        answer = await made.ask(two)
        assert answer.count(b"HTTP/1.1 200 OK") == 1
        assert b"Connection: close" in answer
        assert refusal(await made.ask("GET http://api.test.example/ HTTP/1.1\nHost: other.example")) == (
            403,
            "host_mismatch",
        )
        both = "POST http://api.test.example/ HTTP/1.1\nHost: api.test.example\nContent-Length: 4\n"
        smuggled = await made.ask(both + "Transfer-Encoding: chunked\n\n0\r\n\r\n")
        assert refusal(smuggled) == (400, "bad_request")
        for head in (
            "Host: api.test.example\nHost: api.test.example",
            "Host: a b",
            "Content-Length: 1\nContent-Length: 2",
        ):
            told = await made.ask(f"POST http://api.test.example/ HTTP/1.1\n{head}")
            assert refusal(told)[1] in {"bad_request", "host_mismatch", "unauthenticated"}, head
        assert len(made.requests) == 1
        assert all(b"other.example" not in request for request in made.requests)


async def test_what_belongs_to_the_hop_is_taken_off(tmp_path: Path) -> None:
    """Credentials and hop-by-hop headers, those that Connection names with them, both ways; bodies go on."""
    async with world(tmp_path, NAMES) as made:
        await made.ask(
            "POST http://api.test.example/ HTTP/1.1\nHost: api.test.example\nConnection: X-Mine, keep-alive\n"
            "X-Mine: 1\nX-Theirs: 2\nTE: trailers\nUpgrade: h2c\nProxy-Connection: keep-alive\n"
            "Transfer-Encoding: chunked\n\n3\r\nabc\r\n0\r\n\r\n"
        )
        got = made.requests[0].lower()
        assert b"x-theirs: 2" in got
        assert b"\r\n\r\n3\r\nabc\r\n0\r\n\r\n" in got
        for gone in (b"x-mine", b"proxy-", b"upgrade", b"te:", b"basic", b"keep-alive"):
            assert gone not in got.replace(b"host: api.test.example", b""), gone
        back = await made.ask("GET http://api.test.example/hop HTTP/1.1\nHost: api.test.example")
        assert b"X-Hop" not in back
        assert back.endswith(b"\r\n\r\nok") or b"2\r\nok\r\n" in back


@pytest.mark.robustness(23, "redirect")
async def test_a_redirect_out_of_the_list_is_refused_by_the_next_request(tmp_path: Path) -> None:
    """The proxy follows nothing; who does asks for the other host, which is not allowed."""
    async with world(tmp_path, NAMES) as made:
        answer = await made.ask("GET http://api.test.example/redirect HTTP/1.1\nHost: api.test.example")
        assert b"302 Found" in answer
        assert b"http://other.example/" in answer
        told = await made.ask("GET http://other.example/ HTTP/1.1\nHost: other.example")
        assert refusal(told) == (403, "host_not_allowed")


async def test_an_answer_that_is_no_http_is_the_hosts_fault(tmp_path: Path) -> None:
    """502, and the guest gets nothing of it."""
    async with world(tmp_path, NAMES) as made:
        told = await made.ask("GET http://api.test.example/broken HTTP/1.1\nHost: api.test.example")
        assert refusal(told) == (502, "bad_answer")


async def test_requests_of_every_shape_come_back_whole(tmp_path: Path) -> None:
    """A body that waits to be asked for, an answer without one, HTTP/1.0; a body that breaks off does not."""
    async with world(tmp_path, NAMES) as made:
        to = "http://api.test.example/ HTTP/1.1\nHost: api.test.example"
        waited = await made.ask(f"POST {to}\nContent-Length: 3\nExpect: 100-continue\n\nabc")
        assert waited.startswith(b"HTTP/1.1 100 ")
        assert b"\r\n\r\nabc" in waited
        assert b"expect" not in made.requests[0].lower()
        head = await made.ask(f"HEAD {to}")
        assert head.startswith(b"HTTP/1.1 200 ")
        assert head.endswith(b"\r\n\r\n")
        old = await made.ask("GET http://api.test.example/ HTTP/1.0")
        assert old.startswith(b"HTTP/1.1 200 ")
        assert b"Host: api.test.example\r\n" in made.requests[2]
        reader, writer = await made.connect()
        broken = f"POST {to}\nContent-Length: 9\nProxy-Authorization: {authorization()}\n\nabc"
        writer.write(broken.replace("\n", "\r\n").encode())
        writer.write_eof()
        async with asyncio.timeout(30):
            assert refusal(await reader.read(-1)) == (400, "bad_request")
        writer.close()
        assert len(made.requests) == 3


async def test_connections_and_bytes_of_a_cvm_are_limited_and_counted(tmp_path: Path) -> None:
    """The third connection at once is refused; over its bytes a CVM is cut, and refused from then on."""
    limits = EgressLimits(connections=2, bytes=600_000, rate=0, all_connections=64)
    async with world(tmp_path, NAMES, limits=limits) as made:
        first, second = await made.tunnel("api.test.example:443"), await made.tunnel("api.test.example:443")
        told = refusal(await made.ask("CONNECT api.test.example:443 HTTP/1.1"))
        assert told == (429, "too_many_connections")
        first[1].close()
        second[1].close()
        use = made.supervisor.use(VM)
        assert use is not None
        await made.until(lambda: use.open == 0)
        big = await made.ask("GET http://api.test.example/big HTTP/1.1\nHost: api.test.example")
        assert 0 < len(big) < 700_000
        told = refusal(await made.ask("CONNECT api.test.example:443 HTTP/1.1"))
        assert told == (403, "bytes_spent")
        await made.until(lambda: use.refused == {"too_many_connections": 1, "bytes_spent": 2})
        assert use.connections == 3
        assert 600_000 < use.received_bytes < 700_000


async def test_who_never_says_who_it_is_keeps_nobody_out(tmp_path: Path) -> None:
    """Of connections that say nothing, the oldest makes room for the next."""
    async with world(tmp_path, NAMES) as made:
        silent = [await made.connect() for _ in range(160)]
        assert await echoed(made, "api.test.example:443") == b"hello"
        async with asyncio.timeout(30):
            with contextlib.suppress(ConnectionResetError):
                assert await silent[0][0].read(-1) == b""
        for _, writer in silent:
            writer.transport.abort()


async def test_a_proxy_that_stands_still_is_ended_and_started_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It says something every second; one that does not is no way out."""
    monkeypatch.setattr(supervisor_module, "_SILENT", 4.0)
    monkeypatch.setattr(supervisor_module, "_ENDS_WITHIN", 0.5)
    async with world(tmp_path, NAMES) as made:
        pid = made.supervisor.pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        await made.until(lambda: made.supervisor.restarts == 1)
        assert not Path(f"/proc/{pid}").exists()
        await made.until(lambda: made.supervisor.listen is not None)
        assert await echoed(made, "api.test.example:443") == b"hello"


async def test_a_cvm_that_is_forgotten_is_cut_off(tmp_path: Path) -> None:
    """Its open tunnel, which would go on for minutes, ends at once."""
    async with world(tmp_path, NAMES) as made:
        reader, writer = await made.tunnel("api.test.example:443")
        async with asyncio.timeout(30):
            await writer.start_tls(made.trust, server_hostname="api.test.example")
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            made.supervisor.forget(VM)
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read(-1) == b""
        writer.transport.abort()


async def test_a_proxy_that_is_killed_comes_back_and_knows_its_cvms(tmp_path: Path) -> None:
    """Until then nobody gets out; counted, and what was used before counts on."""
    async with world(tmp_path, NAMES) as made:
        supervisor = made.supervisor
        assert await echoed(made, "api.test.example:443") == b"hello"
        await made.until(lambda: made.use().connections == 1)
        assert supervisor.pid is not None
        os.kill(supervisor.pid, signal.SIGKILL)
        await made.until(lambda: supervisor.listen is None)
        assert supervisor.error is not None
        await made.until(lambda: supervisor.listen is not None)
        assert supervisor.restarts == 1
        assert await echoed(made, "api.test.example:443") == b"hello"
        await made.until(lambda: made.use().connections == 2)


async def test_the_proxy_ends_with_its_daemon(tmp_path: Path) -> None:
    """Its end of the socket closes: it goes, whatever it was doing."""
    async with world(tmp_path, NAMES) as made:
        _, writer = await made.tunnel("api.test.example:443")
        pid = made.supervisor.pid
        assert pid is not None
        assert made.supervisor._writer is not None
        made.supervisor._writer.transport.abort()
        await made.until(lambda: not Path(f"/proc/{pid}").exists())
        writer.transport.abort()


async def test_a_port_that_is_taken_is_said_and_waited_for(tmp_path: Path) -> None:
    """The daemon runs on, and says where the proxy cannot listen."""
    taken = await asyncio.start_server(lambda _r, _w: None, "127.0.0.1", 0)
    port = taken.sockets[0].getsockname()[1]
    settings = EgressSettings(
        listen=("127.0.0.1", port),
        base_url="http://10.0.2.2:3128",
        policy=NetworkPolicy(allow_outbound=True, hosts=("a.example",), ports=(443,)),
        limits=EgressLimits(1, 1, 0, 1),
    )
    supervisor = EgressSupervisor(settings, clock=SystemClock())
    running = asyncio.ensure_future(supervisor.run())
    async with asyncio.timeout(60):
        await until(lambda: f"127.0.0.1:{port}" in (supervisor.error or ""))
        taken.close()
        await until(lambda: supervisor.listen is not None)
    running.cancel()
    await asyncio.wait({running})


def test_what_a_cvm_is_told_is_made_of_its_secret_and_both_sides_word() -> None:
    """Name and HMAC in the URL; null when the operator or the challenge names nothing that the other does."""
    settings = EgressSettings(
        listen=("127.0.0.1", 3128),
        base_url="http://10.0.2.2:3128",
        policy=NetworkPolicy(allow_outbound=True, hosts=("*.example",), ports=(443,)),
        limits=EgressLimits(1, 1, 0, 1),
        base_urls={},
    )
    supervisor = EgressSupervisor(settings, clock=SystemClock())
    url = supervisor.allow(VM, SECRET, NetworkSpec(hosts=["a.example"]))
    assert url == f"http://{VM}:{proxy_password(SECRET)}@10.0.2.2:3128"
    assert supervisor.allow(VmName("b"), SECRET, NetworkSpec(hosts=["a.test"])) is None
    assert supervisor.allow(VmName("b"), SECRET, NetworkSpec(hosts=["a.example"], ports=[80])) is None
    assert supervisor.use(VmName("b")) is None
