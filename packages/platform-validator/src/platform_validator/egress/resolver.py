"""The egress proxy's own DNS: what a name resolves to now, by the operator's servers or the system's."""

from __future__ import annotations

import asyncio
import ipaddress
from collections import OrderedDict
from collections.abc import Sequence
from itertools import islice

import dns.asyncresolver
import dns.exception
import dns.nameserver
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
            self._resolver.nameservers = [dns.nameserver.Do53Nameserver(*server) for server in servers]
        else:
            try:
                self._resolver.read_resolv_conf("/etc/resolv.conf")
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
