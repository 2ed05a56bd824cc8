"""The egress proxy's own DNS: what a name resolves to now, by the operator's servers or the system's."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice
from typing import Any

import dns.asyncresolver
import dns.exception
import dns.message
import dns.nameserver
import dns.query
import dns.rdata
import dns.rdataclass
import dns.rdatatype
import dns.resolver

from platform_validator.egress.addresses import MOST, Address
from platform_validator.egress.refusals import Reason, Refused

WITHIN = 5.0
"""Seconds for a name, however many servers there are."""
_CACHED = 1000
"""Answers. Of each only the first MOST addresses are kept: whoever owns a name can answer with 64 KiB."""
_MAX_ANSWER = 4096
"""Bytes of an answer over TCP: reading 64 KiB would keep this process, and every CVM's bytes, for a while."""
_KINDS = (dns.rdatatype.A, dns.rdatatype.AAAA)
_Failure = dns.exception.DNSException | OSError | EOFError | ValueError


class Resolver:
    """Asks for A and AAAA at once. Answers are kept for their TTL; /etc/hosts and search lists are not read.

    Args:
        servers: Address and port of each; none: those of /etc/resolv.conf, as it is now.
    """

    def __init__(self, servers: Sequence[tuple[str, int]]) -> None:
        # dnspython loads a record type's module when it first meets one: now, while this process may.
        for kind in (*_KINDS, dns.rdatatype.CNAME, dns.rdatatype.SOA, dns.rdatatype.OPT):
            dns.rdata.get_rdata_class(dns.rdataclass.IN, kind)  # type: ignore[no-untyped-call]  # theirs
        self._resolver = dns.asyncresolver.Resolver(configure=False)
        if servers:
            self._resolver.nameservers = [_Nameserver(*server) for server in servers]
        else:
            try:
                self._resolver.read_resolv_conf("/etc/resolv.conf")
                self._resolver.nameservers = [_Nameserver(str(each)) for each in self._resolver.nameservers]
            except (OSError, dns.resolver.NoResolverConfiguration):
                self._resolver.nameservers = []
        self._resolver.lifetime = WITHIN
        self._known: OrderedDict[tuple[str, int], tuple[float, list[Address]]] = OrderedDict()

    async def resolve(self, host: str) -> list[Address]:
        """All addresses of a name, IPv4 first. Empty: it has none.

        Raises:
            Refused: NAME_UNKNOWN, or NAME_UNANSWERED: no server answered in five seconds.
        """
        if not self._resolver.nameservers:
            raise Refused(Reason.NAME_UNANSWERED, "no DNS server is known")
        name = f"{host}."
        async with asyncio.TaskGroup() as group:
            answers = [group.create_task(self._ask(name, kind)) for kind in _KINDS]
        found: list[Address] = []
        failed: _Failure | None = None
        for answer in answers:
            got = answer.result()
            if isinstance(got, list):
                found += got
            else:
                failed = got
        if found or failed is None:
            return found
        if isinstance(failed, dns.resolver.NXDOMAIN):
            raise Refused(Reason.NAME_UNKNOWN, "the name does not exist") from failed
        raise Refused(Reason.NAME_UNANSWERED, "no DNS server answered for the name") from failed

    async def _ask(self, name: str, kind: dns.rdatatype.RdataType) -> list[Address] | _Failure:
        now = asyncio.get_running_loop().time()
        until, known = self._known.get((name, kind), (now, []))
        if now < until:
            return known
        try:
            async with asyncio.timeout(WITHIN + 1):
                answer = await self._resolver.resolve(name, kind, search=False, raise_on_no_answer=False)
        except (dns.exception.DNSException, OSError, EOFError, ValueError) as error:
            return error
        found = [ipaddress.ip_address(record.address) for record in islice(answer.rrset or (), MOST)]
        self._known[name, kind] = now + answer.chaining_result.minimum_ttl, found
        self._known.move_to_end((name, kind))
        if len(self._known) > _CACHED:
            self._known.popitem(last=False)
        return found


class _Nameserver(dns.nameserver.Do53Nameserver):
    """One whose answers are short. An answer that did not fit into a datagram is asked for over TCP."""

    async def async_query(
        self,
        request: dns.message.QueryMessage,
        timeout: float,
        source: str | None,
        source_port: int,
        max_size: bool,
        backend: Any,
        one_rr_per_rrset: bool = False,
        ignore_trailing: bool = False,
    ) -> dns.message.Message:
        if not max_size:
            return await super().async_query(
                request, timeout, source, source_port, max_size, backend, one_rr_per_rrset, ignore_trailing
            )
        async with asyncio.timeout(timeout):
            reader, writer = await asyncio.open_connection(self.address, self.port)
            try:
                writer.write(request.to_wire(prepend_length=True))
                size = int.from_bytes(await reader.readexactly(2))
                if size > _MAX_ANSWER:
                    raise EOFError(f"expected an answer of at most {_MAX_ANSWER} bytes")
                answer = dns.message.from_wire(await reader.readexactly(size))
            finally:
                writer.close()
        if not request.is_response(answer):
            raise dns.query.BadResponse
        return answer
