"""What each CVM may send, and has sent: connections, bytes, refusals. No I/O, no clock of its own."""

from __future__ import annotations

import asyncio
import hmac
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from platform_protocol.ids import VmName
from platform_validator.egress.policy import Grant
from platform_validator.egress.refusals import Reason, Refused

_NOBODY = "0" * 64


@dataclass(frozen=True, slots=True)
class EgressLimits:
    """For one CVM: connections at once, bytes in its life (both ways together), bytes a second (0: any).

    `all_connections`: of all CVMs together, at once.
    """

    connections: int
    bytes: int
    rate: int
    all_connections: int


@dataclass(slots=True)
class Account:
    """A CVM that exists. `password` is HMAC(L, "proxy"), hex; `tasks` serve its open connections."""

    vm: VmName
    password: str = field(repr=False)
    grant: Grant
    limits: EgressLimits
    tasks: set[asyncio.Task[None]] = field(default_factory=set)
    connections: int = 0
    sent: int = 0
    received: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    _due: float = 0.0

    def enter(self) -> None:
        """A connection begins.

        Raises:
            Refused: TOO_MANY_CONNECTIONS or BYTES_SPENT.
        """
        if len(self.tasks) >= self.limits.connections:
            raise Refused(
                Reason.TOO_MANY_CONNECTIONS, f"a CVM may have {self.limits.connections} connections at once"
            )
        self._check_bytes()
        self.connections += 1

    def count(self, *, sent: int = 0, received: int = 0, now: float) -> float:
        """Bytes went through.

        Returns:
            How many seconds to wait before the next ones.

        Raises:
            Refused: BYTES_SPENT.
        """
        self.sent += sent
        self.received += received
        self._check_bytes()
        if not self.limits.rate:
            return 0.0
        self._due = max(self._due, now) + (sent + received) / self.limits.rate
        return max(0.0, self._due - now - 1.0)

    def cut(self) -> None:
        """End its connections."""
        for task in self.tasks:
            task.cancel()

    def _check_bytes(self) -> None:
        if self.sent + self.received > self.limits.bytes:
            raise Refused(Reason.BYTES_SPENT, f"a CVM may move {self.limits.bytes} bytes in its life")


class Accounts:
    """All CVMs that may reach something now, and those that stopped to since the last look."""

    def __init__(self) -> None:
        self._all: dict[VmName, Account] = {}
        self._ended: list[Account] = []
        self.unauthenticated = 0

    def allow(self, account: Account) -> None:
        """A CVM may go out from now on. Told again: what it used counts on, and what it had is kept."""
        before = self._all.get(account.vm)
        if before is not None:
            if (before.password, before.grant) == (account.password, account.grant):
                return
            before.cut()
            account.connections, account.sent = before.connections, before.sent
            account.received, account.refused = before.received, before.refused
        self._all[account.vm] = account

    def forget(self, vm: VmName) -> None:
        """A CVM may not go out any more; its connections are cut."""
        account = self._all.pop(vm, None)
        if account is not None:
            account.cut()
            self._ended.append(account)

    def authenticate(self, vm: str, password: str) -> Account | None:
        """The account, if both fit. Compared in constant time, against nobody's where there is none."""
        account = self._all.get(VmName(vm))
        expected = account.password if account is not None else _NOBODY
        fits = hmac.compare_digest(expected.encode(), password.encode())
        if account is not None and fits:
            return account
        self.unauthenticated += 1
        return None

    def look(self) -> list[Account]:
        """All that there are, and, once, each that was forgotten since the last look."""
        ended, self._ended = self._ended, []
        return [*ended, *self._all.values()]

    def check_room(self, account: Account) -> None:
        """Whether the connections of all CVMs leave room for one more of this one.

        Raises:
            Refused: TOO_MANY_CONNECTIONS.
        """
        others = [len(each.tasks) for each in self._all.values() if each is not account]
        if not has_room(len(account.tasks), others, account.limits.all_connections):
            raise Refused(Reason.TOO_MANY_CONNECTIONS, "too many connections of all CVMs are open")


def has_room(held: int, others: Sequence[int], most: int) -> bool:
    """Whether a CVM that has `held` of `most` connections may have one more.

    Half of them are kept in equal shares, so that whoever takes many, as several CVMs, takes no other's last.
    """
    share = most // (2 * (1 + len(others)))
    kept = 0 if held < share else sum(max(0, share - other) for other in others)
    return most - held - sum(others) > kept
