"""The egress proxy as a process: told by the daemon over an inherited socket, and ended with it.

It holds no key and no secret of the validator: its environment is empty, and started as root it runs as
nobody.
"""

from __future__ import annotations

import asyncio
import codecs
import contextlib
import ctypes
import ipaddress
import os
import resource
import signal
import socket
from collections.abc import Callable

from pydantic import ValidationError

from platform_validator.egress.accounts import Account, Accounts, EgressLimits
from platform_validator.egress.control import (
    COUNTS_EVERY,
    MAX_LINE,
    TOLD,
    Allow,
    Counts,
    Failed,
    Forget,
    Ready,
    RefusedRequest,
    Start,
    VmCounts,
)
from platform_validator.egress.policy import Grant
from platform_validator.egress.refusals import Reason
from platform_validator.egress.resolver import Resolver
from platform_validator.egress.server import EgressServer
from platform_validator.memory_guard import guard_memory

_NOBODY = 65534
_PR_SET_NO_NEW_PRIVS = 38
_TOLD_EACH = 5
_TOLD_WITHIN = 60.0
_MAX_TARGET = 200
_MAX_MEMORY = 4 << 30
_SPARE_DESCRIPTORS = 512
_NICE = 5


class RefusalTelling:
    """Lets five refusals of a CVM and reason through a minute, and counts the rest into the next one.

    Args:
        say: Takes what is let through.
        now: Seconds.
    """

    def __init__(self, say: Callable[[RefusedRequest], None], now: Callable[[], float]) -> None:
        self._say = say
        self._now = now
        self._told: dict[tuple[str, Reason], tuple[float, int, int]] = {}

    def tell(self, vm: str, reason: Reason, wanted: str) -> None:
        """A refusal happened. `wanted` is the guest's own text: escaped and capped here."""
        now, key = self._now(), (vm, reason)
        since, told, more = self._told.get(key, (now, 0, 0))
        if now - since >= _TOLD_WITHIN:
            since, told = now, 0
        if told >= _TOLD_EACH:
            self._told[key] = (since, told, more + 1)
            return
        self._told[key] = (since, told + 1, 0)
        shown = ascii(wanted[:_MAX_TARGET])[1:-1]
        self._say(RefusedRequest(vm=vm, reason=reason, target=shown, more=more))

    def forget(self, vm: str) -> None:
        """A CVM is gone."""
        for key in [key for key in self._told if key[0] == vm]:
            del self._told[key]


class EgressProcess:
    """One run, from `start` to the end of the daemon's side."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._accounts = Accounts()
        self._telling = RefusalTelling(
            lambda told: self._writer.write(told.line()), asyncio.get_running_loop().time
        )

    async def run(self) -> int:
        """Returns the exit code."""
        start = await self._heard()
        if not isinstance(start, Start):
            return 2
        limits = EgressLimits(start.connections, start.bytes, start.rate, start.all_connections)
        server = EgressServer(
            self._accounts,
            resolver=Resolver(start.dns_servers),
            denied=[ipaddress.ip_network(each) for each in start.denied],
            tell=self._telling.tell,
        )
        drop_privileges(descriptors=2 * start.all_connections + _SPARE_DESCRIPTORS)
        try:
            listener = await server.listen(*start.listen)
        except OSError as error:
            where = f"{start.listen[0]}:{start.listen[1]}"
            self._writer.write(Failed(error=f"{where}: {error.strerror or error}").line())
            await self._writer.drain()
            return 1
        host, port = listener.sockets[0].getsockname()[:2]
        self._writer.write(Ready(listen=(host, port)).line())
        counting = asyncio.ensure_future(self._count())
        try:
            while (told := await self._heard()) is not None:
                if isinstance(told, Allow):
                    grant = Grant(told.hosts, told.ports)
                    self._accounts.allow(Account(told.vm, told.password, grant, limits))
                elif isinstance(told, Forget):
                    self._accounts.forget(told.vm)
                    self._telling.forget(told.vm)
        finally:
            counting.cancel()
            listener.close()
        return 0

    async def _heard(self) -> Start | Allow | Forget | None:
        """The daemon's next line; None at its end, or when it says what this version does not know."""
        with contextlib.suppress(OSError, ValueError, ValidationError):
            if line := await self._reader.readline():
                return TOLD.validate_json(line)
        return None

    async def _count(self) -> None:
        while True:
            vms: dict[str, VmCounts] = {}
            for account in self._accounts.look():
                vms[account.vm] = VmCounts(
                    connections=account.connections,
                    open=len(account.tasks),
                    sent=account.sent,
                    received=account.received,
                    refused=dict(account.refused),
                )
            self._writer.write(Counts(vms=vms, unauthenticated=self._accounts.unauthenticated).line())
            await self._writer.drain()
            await asyncio.sleep(COUNTS_EVERY)


def drop_privileges(*, descriptors: int) -> None:
    """No core file, no new privileges, behind the daemon for the CPU; from root to nobody.

    Nobody may not be able to read where Python is: what it loads when it is first needed is loaded before.
    """
    for codec in ("ascii", "latin-1", "utf-8", "idna"):
        codecs.lookup(codec)
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_MEMORY, _MAX_MEMORY))
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = descriptors if most == resource.RLIM_INFINITY else min(descriptors, most)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, most))
    os.nice(_NICE)
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(_NOBODY, _NOBODY, _NOBODY)
        os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    guard_memory()


def main(descriptor: int) -> int:
    """Run until the daemon's end of the socket `descriptor` closes. Returns the exit code."""
    # The daemon drains first: a terminal's Ctrl-C, sent to all, must not cut what still runs.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.set_inheritable(descriptor, False)
    return asyncio.run(_main(descriptor))


async def _main(descriptor: int) -> int:
    control = socket.socket(fileno=descriptor)
    reader, writer = await asyncio.open_unix_connection(sock=control, limit=MAX_LINE)
    try:
        return await EgressProcess(reader, writer).run()
    finally:
        writer.close()
