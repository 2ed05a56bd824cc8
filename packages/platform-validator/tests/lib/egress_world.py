"""A small internet for the egress proxy: a name server of ours, a TLS and an HTTP server, a CVM's client."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import ipaddress
import json
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from ports import free_port
from waiting import until

from platform_protocol.ids import VmName
from platform_protocol.spec import NetworkSpec
from platform_protocol.tokens import proxy_password
from platform_validator.clock import SystemClock
from platform_validator.egress.accounts import EgressLimits
from platform_validator.egress.gate import EgressUse
from platform_validator.egress.supervisor import EgressSettings, EgressSupervisor
from platform_validator.network_policy import NetworkPolicy

PUBLIC = "93.184.216.34"
"""An address of the public internet, which nothing here connects to."""
VM = VmName("pv-0123456789-a")
SECRET = b"\1" * 32
LAUNCHER = Path(__file__).with_name("egress_launcher.py")


class NameServer(asyncio.DatagramProtocol):
    """Answers with `names`: for each the addresses of one answer after the other, the last for ever."""

    def __init__(self, names: Mapping[str, list[list[str]]], ttl: int = 0) -> None:
        self.names = names
        self.asked: list[str] = []
        self._ttl = ttl
        self._turns: dict[tuple[str, int], int] = {}
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        [question] = query.question
        name, kind = question.name.to_text(omit_final_dot=True), question.rdtype
        self.asked.append(name)
        answer = dns.message.make_response(query)
        answer.flags |= dns.flags.RA
        turns = self.names.get(name)
        if turns is None:
            answer.set_rcode(dns.rcode.NXDOMAIN)
        else:
            turn = self._turns.get((name, kind), 0)
            self._turns[name, kind] = turn + 1
            wanted = 6 if kind == dns.rdatatype.AAAA else 4
            found = [
                each
                for each in turns[min(turn, len(turns) - 1)]
                if ipaddress.ip_address(each).version == wanted
            ]
            if found:
                answer.answer.append(
                    dns.rrset.from_text(question.name, self._ttl, "IN", dns.rdatatype.to_text(kind), *found)
                )
        assert self._transport is not None
        self._transport.sendto(answer.to_wire(), addr)


@dataclass
class World:
    """What a test has in its hands."""

    supervisor: EgressSupervisor
    dns: NameServer
    trust: ssl.SSLContext
    tried: Path
    requests: list[bytes] = field(default_factory=list)
    proxy_url: str | None = None

    def dialled(self) -> list[str]:
        """Every address that the proxy tried to connect to."""
        return self.tried.read_text().splitlines() if self.tried.exists() else []

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A connection to the proxy, with nothing said."""
        assert self.supervisor.listen is not None
        return await asyncio.open_connection(*self.supervisor.listen)

    async def ask(self, request: str, *, authorize: bool = True) -> bytes:
        """Send a request's head (its lines, without Proxy-Authorization) and read all that comes."""
        reader, writer = await self.connect()
        head, _, body = request.partition("\n\n")
        named = [] if "\nHost:" in head or "HTTP/1.0" in head else ["Host: x"]
        lines = [
            *head.splitlines(),
            *named,
            *([f"Proxy-Authorization: {authorization()}"] if authorize else []),
        ]
        writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + body.encode())
        async with asyncio.timeout(30):
            answer = await reader.read(-1)
        writer.close()
        return answer

    async def tunnel(self, to: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """A tunnel that stands."""
        reader, writer = await self.connect()
        head = f"CONNECT {to} HTTP/1.1\r\nHost: {to}\r\nProxy-Authorization: {authorization()}\r\n\r\n"
        writer.write(head.encode())
        async with asyncio.timeout(30):
            answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        return reader, writer

    def use(self) -> EgressUse:
        """What VM reached."""
        used = self.supervisor.use(VM)
        assert used is not None
        return used

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait for the proxy's next words."""
        await until(condition)


def authorization(vm: str = VM, secret: bytes = SECRET) -> str:
    """What a CVM sends."""
    return "Basic " + base64.b64encode(f"{vm}:{proxy_password(secret)}".encode()).decode()


@contextlib.asynccontextmanager
async def world(
    folder: Path,
    names: Mapping[str, list[list[str]]],
    *,
    hosts: tuple[str, ...] = ("api.test.example", "*.wild.example"),
    ports: tuple[int, ...] = (443, 80),
    limits: EgressLimits | None = None,
    leads: tuple[str, ...] = (f"{PUBLIC}:443", f"{PUBLIC}:80"),
    ttl: int = 0,
) -> AsyncIterator[World]:
    """The proxy as its own process, VM allowed to reach `hosts`; port 443 is TLS that echoes, 80 HTTP."""
    loop = asyncio.get_running_loop()
    server_side, trust = make_tls(folder)
    tried, requests = folder / "tried", list[bytes]()
    transport, nameserver = await loop.create_datagram_endpoint(
        lambda: NameServer(names, ttl), local_addr=("127.0.0.1", 0)
    )
    secure = await asyncio.start_server(_echo, "127.0.0.1", 0, ssl=server_side)
    plain = await asyncio.start_server(lambda r, w: _http(r, w, requests), "127.0.0.1", 0)
    led = {each: (secure if each.endswith(":443") else plain).sockets[0].getsockname()[1] for each in leads}
    settings = EgressSettings(
        listen=("127.0.0.1", free_port()),
        base_url="http://10.0.2.2:3128",
        policy=NetworkPolicy(allow_outbound=True, hosts=hosts, ports=ports),
        limits=limits or EgressLimits(connections=8, bytes=10**9, rate=0, all_connections=64),
        dns_servers=(transport.get_extra_info("sockname")[:2],),
    )
    command = (sys.executable, str(LAUNCHER), json.dumps(led), str(tried))
    supervisor = EgressSupervisor(settings, clock=SystemClock(), command=command)
    running = asyncio.ensure_future(supervisor.run())
    made = World(supervisor, nameserver, trust, tried, requests)
    made.proxy_url = supervisor.allow(VM, SECRET, NetworkSpec(hosts=list(hosts)))
    try:
        await until(lambda: supervisor.listen is not None)
        yield made
    finally:
        running.cancel()
        await asyncio.wait({running})
        transport.close()
        secure.close()
        plain.close()


def make_tls(folder: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's side for every name of these tests, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "egress tests")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName(
                [x509.DNSName(each) for each in ("api.test.example", "*.wild.example", "other.example")]
            ),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    chain, secret = folder / "server.pem", folder / "server.key"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(chain, secret)
    return server, ssl.create_default_context(cafile=str(chain))


async def _echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    writer.close()


async def _http(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: list[bytes]) -> None:
    """Answers by path: /redirect away, /big with a megabyte, /broken with no HTTP; else with what it got."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        head = await reader.readuntil(b"\r\n\r\n")
        size = next(
            (
                int(line.split(b":")[1])
                for line in head.lower().splitlines()
                if line.startswith(b"content-length:")
            ),
            0,
        )
        body = await reader.readexactly(size)
        if b"chunked" in head.lower():
            body = await reader.readuntil(b"0\r\n\r\n")
        requests.append(head + body)
        path = head.split(b" ", 2)[1]
        if path == b"/redirect":
            writer.write(
                b"HTTP/1.1 302 Found\r\nLocation: http://other.example/\r\nContent-Length: 0\r\n\r\n"
            )
        elif path == b"/big":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1048576\r\n\r\n" + b"x" * 1048576)
        elif path == b"/broken":
            writer.write(b"SSH-2.0-nothing\r\n")
        elif path == b"/hop":
            writer.write(b"HTTP/1.1 200 OK\r\nConnection: X-Hop\r\nX-Hop: 1\r\n")
            writer.write(b"Transfer-Encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n")
        else:
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(head + body) + head + body)
        await writer.drain()
    writer.close()
