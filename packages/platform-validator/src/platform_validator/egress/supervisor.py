"""The daemon's side of the egress proxy: starts it, tells it the CVMs, starts it again when it dies.

The table of who may reach what is here; the process has a copy. Without the process nothing goes out, and a
new one is told all of it before anything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import structlog
from pydantic import ValidationError

from platform_protocol.ids import VmName
from platform_protocol.spec import NetworkSpec
from platform_protocol.tokens import proxy_password
from platform_validator.clock import Clock
from platform_validator.egress.accounts import EgressLimits
from platform_validator.egress.control import (
    MAX_LINE,
    SAID,
    Allow,
    Counts,
    Failed,
    Forget,
    Ready,
    RefusedRequest,
    Start,
    VmCounts,
)
from platform_validator.egress.effective import narrowed
from platform_validator.egress.gate import EgressUse
from platform_validator.host_name import DEFAULT_HOST, HostName
from platform_validator.network_policy import NetworkPolicy

PRODUCT = (sys.executable, "-I", "-m", "platform_validator.egress")
_SILENT = 20.0
_STARTS_WITHIN = 60.0
_FIRST_PAUSE, _MOST_PAUSE = 0.5, 30.0
_ENDS_WITHIN = 5.0
_UNSENT = 8 * 1024 * 1024

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EgressSettings:
    """The operator's side.

    `base_url` is the proxy as a CVM reaches it, `base_urls` those of hosts that have one of their own;
    `denied` are networks (CIDR) that nothing is connected to, beside all that is not public.
    """

    listen: tuple[str, int]
    base_url: str
    policy: NetworkPolicy
    limits: EgressLimits
    dns_servers: tuple[tuple[str, int], ...] = ()
    denied: tuple[str, ...] = ()
    base_urls: Mapping[HostName, str] | None = None


class EgressSupervisor:
    """The gate of a daemon whose operator lets CVMs out. `run` is one of its loops.

    Args:
        settings: The operator's.
        clock: Time.
        command: What is started, with the number of its end of the control socket behind it.
    """

    def __init__(self, settings: EgressSettings, *, clock: Clock, command: Sequence[str] = PRODUCT) -> None:
        self._settings = settings
        self._clock = clock
        self._command = tuple(command)
        self._allowed: dict[VmName, Allow] = {}
        self._uses: dict[VmName, EgressUse] = {}
        self._seen: dict[VmName, VmCounts] = {}
        self._unauthenticated = 0
        self._writer: asyncio.StreamWriter | None = None
        self.error: str | None = "not started yet"
        self.listen: tuple[str, int] | None = None
        self.pid: int | None = None
        self.restarts = 0
        self.beat: Callable[[], None] = lambda: None
        self.counted: Callable[[int, int, int], None] = lambda _connections, _sent, _received: None
        self.refused: Callable[[str, int], None] = lambda _reason, _more: None
        self.died: Callable[[], None] = lambda: None

    # The gate

    def allow(
        self, vm: VmName, secret: bytes, wanted: NetworkSpec, *, host: HostName = DEFAULT_HOST
    ) -> str | None:
        """See the port."""
        grant = narrowed(wanted, self._settings.policy).grant
        if grant is None:
            return None
        password = proxy_password(secret)
        self._allowed[vm] = Allow(vm=vm, password=password, hosts=grant.hosts, ports=grant.ports)
        self._uses.setdefault(vm, EgressUse())
        self._tell(self._allowed[vm])
        url = urlsplit((self._settings.base_urls or {}).get(host, self._settings.base_url))
        return f"{url.scheme}://{vm}:{password}@{url.netloc}"

    def forget(self, vm: VmName) -> None:
        """See the port."""
        if self._allowed.pop(vm, None) is not None:
            self._tell(Forget(vm=vm))

    def gone(self, vm: VmName) -> None:
        """See the port."""
        self.forget(vm)
        self._uses.pop(vm, None)
        self._seen.pop(vm, None)

    def use(self, vm: VmName) -> EgressUse | None:
        """See the port."""
        return self._uses.get(vm)

    # The process

    async def run(self) -> None:
        """Keep the process running until cancelled; it ends with this."""
        pause = _FIRST_PAUSE
        while True:
            began = self._clock.monotonic()
            try:
                await self._once()
            except (OSError, TimeoutError, ValueError, ValidationError) as error:
                self.error = str(error) or type(error).__name__
            self.restarts += 1
            self.died()
            _log.error("egress_proxy_died", reason=self.error, again_in=pause)
            if self._clock.monotonic() - began > _MOST_PAUSE:
                pause = _FIRST_PAUSE
            self.beat()
            await self._clock.sleep(pause)
            pause = min(_MOST_PAUSE, pause * 2)

    async def _once(self) -> None:
        """One process, from its start to its end. Raises ValueError for why it ended."""
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *self._command,
                    str(theirs.fileno()),
                    pass_fds=(theirs.fileno(),),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=asyncio.subprocess.DEVNULL,
                    # The daemon's environment has its secrets in it.
                    env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                    start_new_session=True,
                )
            self.pid = process.pid
            try:
                reader, writer = await asyncio.open_unix_connection(sock=ours, limit=MAX_LINE)
                await self._converse(reader, writer)
            finally:
                self._writer, self.listen, self.pid = None, None, None
                self.error = self.error or "the egress proxy has ended, and is started anew"
                self._seen.clear()
                self._unauthenticated = 0
                await _end(process)
        raise ValueError(f"the egress proxy ended with code {process.returncode}")

    async def _converse(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        settings, limits = self._settings, self._settings.limits
        start = Start(
            listen=settings.listen,
            dns_servers=settings.dns_servers,
            denied=settings.denied,
            connections=limits.connections,
            bytes=limits.bytes,
            rate=limits.rate,
            all_connections=limits.all_connections,
        )
        writer.write(start.line())
        self._writer = writer
        for allow in self._allowed.values():
            self._tell(allow)
        within = _STARTS_WITHIN
        try:
            while True:
                async with asyncio.timeout(within):
                    line = await reader.readline()
                if not line:
                    return
                self._hear(SAID.validate_json(line))
                within = _SILENT
                self.beat()
        except TimeoutError:
            raise ValueError(f"the egress proxy said nothing for {within:g} s") from None
        finally:
            writer.close()

    def _hear(self, said: Ready | Failed | RefusedRequest | Counts) -> None:
        match said:
            case Ready(listen=listen):
                self.error, self.listen = None, listen
                _log.info("egress_proxy_ready", listen=f"{listen[0]}:{listen[1]}", cvms=len(self._allowed))
            case Failed(error=error):
                raise ValueError(f"the egress proxy cannot listen on {error}")
            case RefusedRequest(vm=vm, reason=reason, target=target, more=more):
                _log.warning("egress_refused", vm=vm, reason=reason.value, target=target, not_shown=more)
            case Counts():
                self._count(said)

    def _count(self, counts: Counts) -> None:
        """The process counts from its own start; what grew since its last word is added up here."""
        for vm, now in counts.vms.items():
            before = self._seen.get(vm, VmCounts())
            connections, sent = now.connections - before.connections, now.sent - before.sent
            received = now.received - before.received
            self.counted(connections, sent, received)
            use = self._uses.get(vm)
            if use is not None:
                use.connections += connections
                use.sent_bytes += sent
                use.received_bytes += received
                use.open = now.open if vm in self._allowed else 0
            for reason, total in now.refused.items():
                more = total - before.refused.get(reason, 0)
                self.refused(reason, more)
                if use is not None and more:
                    use.refused[reason] = use.refused.get(reason, 0) + more
            if vm in self._uses:
                self._seen[vm] = now
            else:
                self._seen.pop(vm, None)
        self.refused("unauthenticated", counts.unauthenticated - self._unauthenticated)
        self._unauthenticated = counts.unauthenticated

    def view(self) -> dict[str, object]:
        """As status shows it."""
        at = self.listen
        return {
            "listen": None if at is None else f"{at[0]}:{at[1]}",
            "cvms": len(self._allowed),
            "open": self.open,
            "restarts": self.restarts,
            "error": self.error,
        }

    @property
    def open(self) -> int:
        """Connections now."""
        return sum(use.open for use in self._uses.values())

    def _tell(self, line: Allow | Forget) -> None:
        """One that does not take what it is told is not alive: it is cut off, ended, and started anew."""
        if self._writer is None:
            return
        self._writer.write(line.line())
        if self._writer.transport.get_write_buffer_size() > _UNSENT:
            self._writer.transport.abort()


async def _end(process: asyncio.subprocess.Process) -> None:
    """Its end of the socket is closed: it has a moment to end by itself."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(_ENDS_WITHIN):
            await process.wait()
            return
    with contextlib.suppress(ProcessLookupError):
        process.kill()
    await process.wait()
