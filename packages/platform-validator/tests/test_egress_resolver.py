"""The egress proxy's resolver against name servers that answer too much, too little, or for somebody else."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import cast

import dns.flags
import dns.message
import dns.rrset
import pytest

from platform_validator.egress.addresses import MOST
from platform_validator.egress.refusals import Reason, Refused
from platform_validator.egress.resolver import Resolver

Answers = Callable[[dns.message.Message], Iterator[bytes]]
NAME = "a.wild.example"


@dataclass
class Server(asyncio.DatagramProtocol):
    """`datagrams` says what is sent for a query for A, `stream` the same over TCP; AAAA has no address."""

    datagrams: Answers
    stream: Answers | None = None
    asked: list[str] = field(default_factory=list)
    hung_up: asyncio.Event = field(default_factory=asyncio.Event)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        query = dns.message.from_wire(data)
        if query.question[0].rdtype == dns.rdatatype.AAAA:
            self._transport.sendto(dns.message.make_response(query).to_wire(), addr)
            return
        self.asked.append(query.question[0].name.to_text(omit_final_dot=True))
        for wire in self.datagrams(query):
            self._transport.sendto(wire, addr)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(2))
        assert self.stream is not None
        with contextlib.suppress(ConnectionError):
            for wire in self.stream(dns.message.from_wire(await reader.readexactly(size))):
                writer.write(len(wire).to_bytes(2) + wire)
            await reader.read()
        self.hung_up.set()
        writer.close()


@contextlib.asynccontextmanager
async def served(server: Server) -> AsyncIterator[Resolver]:
    loop = asyncio.get_running_loop()
    listener = await asyncio.start_server(server.connected, "127.0.0.1", 0)
    address = listener.sockets[0].getsockname()
    transport, _ = await loop.create_datagram_endpoint(lambda: server, local_addr=address)
    try:
        yield Resolver([address])
    finally:
        transport.close()
        listener.close()


def answer(query: dns.message.Message, *records: tuple[str, str, str]) -> dns.message.Message:
    made = dns.message.make_response(query)
    made.answer += [dns.rrset.from_text(f"{name}.", 60, "IN", kind, to) for name, kind, to in records]
    return made


def truncated(query: dns.message.Message) -> Iterator[bytes]:
    made = dns.message.make_response(query)
    made.flags |= dns.flags.TC
    yield made.to_wire()


def many(count: int) -> Answers:
    addresses = [str(ipaddress.IPv4Address("93.0.0.0") + number) for number in range(count)]

    def over_tcp(query: dns.message.Message) -> Iterator[bytes]:
        made = dns.message.make_response(query)
        made.answer.append(dns.rrset.from_text(f"{NAME}.", 60, "IN", "A", *addresses))
        yield made.to_wire(max_size=65535)

    return over_tcp


async def test_an_answer_that_fits_no_datagram_is_asked_for_over_tcp() -> None:
    """Of its addresses as many are kept as are looked at, and it is not asked for again."""
    server = Server(truncated, many(200))
    async with served(server) as resolver:
        found = await resolver.resolve(NAME)
        assert (len(found), set(map(str, found)) < {f"93.0.0.{number}" for number in range(200)}) == (
            MOST,
            True,
        )
        assert await resolver.resolve(NAME) == found
    assert server.asked == [NAME]


async def test_an_answer_of_64_kib_is_not_even_read() -> None:
    """Whoever owns a name that is allowed could keep the proxy, and with it every CVM, busy with it."""
    server = Server(truncated, many(4000))
    async with served(server) as resolver:
        with pytest.raises(Refused) as error:
            await resolver.resolve(NAME)
        assert error.value.reason is Reason.NAME_UNANSWERED
        async with asyncio.timeout(20):
            await server.hung_up.wait()


async def test_names_are_followed_through_a_chain_but_not_in_a_circle() -> None:
    """Also a name that leads nowhere has no address, and is not an error."""

    def chain(query: dns.message.Message) -> Iterator[bytes]:
        links = [(NAME, "CNAME", "x0.")] + [(f"x{one}", "CNAME", f"x{one + 1}.") for one in range(8)]
        yield answer(query, *links, ("x8", "A", "93.0.0.1")).to_wire()

    def circle(query: dns.message.Message) -> Iterator[bytes]:
        yield answer(query, (NAME, "CNAME", "x."), ("x", "CNAME", f"{NAME}.")).to_wire()

    def nowhere(query: dns.message.Message) -> Iterator[bytes]:
        yield answer(query, (NAME, "CNAME", "x.")).to_wire()

    async with served(Server(chain)) as resolver:
        assert list(map(str, await resolver.resolve(NAME))) == ["93.0.0.1"]
    async with served(Server(nowhere)) as resolver:
        assert await resolver.resolve(NAME) == []
    async with served(Server(circle)) as resolver:
        with pytest.raises(Refused, match="no DNS server answered"):
            await resolver.resolve(NAME)


async def test_answers_to_another_question_are_passed_over() -> None:
    """Another id, another name, no answer at all, garbage: the right one is waited for."""

    def forged(query: dns.message.Message) -> Iterator[bytes]:
        for change in ("id", "name", "query", "garbage"):
            false = answer(query, (NAME, "A", "93.0.0.66"))
            if change == "id":
                false.id = query.id ^ 1
            if change == "name":
                false.question = dns.message.make_query("b.wild.example", "A").question
            if change == "query":
                false.flags &= ~dns.flags.QR
            yield b"\0" * 5 if change == "garbage" else false.to_wire()
        yield answer(query, ("b.wild.example", "A", "93.0.0.66"), (NAME, "A", "93.0.0.1")).to_wire()

    async with served(Server(forged)) as resolver:
        assert list(map(str, await resolver.resolve(NAME))) == ["93.0.0.1"]
