"""The fleet's reservations over two hosts that fail, a disk that fills up, and processes that are killed.

The law: what is reserved never exceeds the limits, neither in all nor of a host, covers what runs there, and
all of it comes back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, precondition, rule
from no_values import NoValues
from tests.machines.timed import PROFILE, TimedMachine, finds
from tests.simulation.bugs import BUGS

from platform_protocol.canonical import sha256_hex
from platform_protocol.ids import ChallengeId, Hotkey, VmId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.session.v2 import Offer
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.cvm.connection import Callee, Judge
from platform_validator.cvm.errors import BootFailed, CvmError, SessionLost
from platform_validator.cvm.fleet import Fleet, FleetRules
from platform_validator.cvm.holdings import Holdings
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import Hosts, VmmHost
from platform_validator.cvm.memory import IMAGE, MemoryVmm
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import HostView, Limits, Quota, Refusal, Reservation, ReservationSpent, add
from platform_validator.cvm.vmm import VmmAtCapacity, VmmError, VmmRefused, VmmUnavailable, VmState
from platform_validator.host_name import HostName
from platform_validator.keyring import Keyring
from platform_validator.store.memory import MemoryStore
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import Purpose, StateIdentity

LIMITS = Limits(Resources(cpu_cores=4, memory_mb=1024, disk_mb=4096), max_cvms=3)
SMALL, BIG = HostName("small"), HostName("big")
BOUNDS = {
    SMALL: Limits(Resources(cpu_cores=2, memory_mb=512, disk_mb=4096), max_cvms=1),
    BIG: Limits(Resources(cpu_cores=3, memory_mb=1024, disk_mb=4096), max_cvms=3),
}
KINDS = ("cpu_cores", "memory_mb", "disk_mb")
COMPOSE = b"{}"
PORTS = 5
SETTLED = 400.0
"""The longest time that a CVM takes to be gone once nothing is in its way."""

_ERRORS: dict[str, VmmError] = {
    "unanswered": VmmUnavailable("no answer"),
    "refused": VmmRefused("internal error"),
    "full": VmmAtCapacity("not enough CIDs"),
}


class Guest:
    """A session with a guest that is well."""

    def __init__(self, callee: Callee, judge: Judge) -> None:
        self._name = callee.vm
        self._judge = judge
        self._closed = asyncio.Event()

    async def run(self) -> None:
        """See the port."""
        await self._closed.wait()

    async def ready(self) -> None:
        """See the port."""
        await self._judge(Offer(2, None, "", "", b"", VmName(self._name)))

    async def execute(self, *_: Any, **__: Any) -> Any:
        """See the port."""
        raise SessionLost("nobody has it run a job here")

    async def cancel(self, *_: Any) -> None:
        """See the port."""

    async def confirm(self) -> None:
        """See the port."""

    async def acknowledge(self, _: Any) -> None:
        """See the port."""

    async def lost(self) -> Exception:
        """See the port."""
        await self._closed.wait()
        return SessionLost("closed")

    def close(self) -> None:
        """See the port."""
        self._closed.set()


def _session(callee: Callee, *, judge: Judge, **_: Any) -> Guest:
    return Guest(callee, judge)


class HostProbe:
    """Waits for a CVM of one host: it comes up, never, or fails after a while."""

    def __init__(self, vmm: MemoryVmm, ends: Callable[[], str]) -> None:
        self._vmm = vmm
        self._ends = ends

    async def until_ready(self, vm_id: VmId) -> tuple[str, int]:
        """See the port."""
        await asyncio.sleep(5)
        if self._ends() == "never":
            await asyncio.Event().wait()
        if self._ends() == "failed" or await self._vmm.get(vm_id) is None:
            raise BootFailed("it did not come up")
        return "127.0.0.1", 20_000


class ReservationMachine(TimedMachine):
    """CVMs are booted, given up and cancelled while the VMM, the disk and the process fail."""

    @initialize()
    def begins(self) -> None:
        """Two hosts without CVMs."""
        self.vmms = {name: MemoryVmm() for name in BOUNDS}
        self.dead: set[HostName] = set()
        self.store = MemoryStore(identity=StateIdentity("0123456789", "instance"))
        self.full = False
        self.store.fail = lambda call: self.full and call not in {"open_vms", "vm", "drained_hosts"}
        self.boot_ends = "well"
        self.numbers = itertools.count(1)
        self.given_back = 0
        self._open()

    def _open(self) -> None:
        self.ports = HostPorts(20_000, 20_000 + PORTS - 1)
        self.hosts = Hosts(
            [
                VmmHost(name, vmm, HostProbe(vmm, lambda: self.boot_ends), self.ports, limits=BOUNDS[name])
                for name, vmm in self.vmms.items()
            ],
            clock=self.clock,
        )
        self.quota = Quota(LIMITS, self.hosts.states)
        self.fleet = Fleet(
            hosts=self.hosts,
            store=self.store,
            keyring=Keyring(b"k" * 32),
            quota=self.quota,
            policy=AttestationPolicy(level=IsolationLevel.CONTAINER, allow_simulated=False, checker=None),
            values=NoValues(),
            clock=self.clock,
            identity=StateIdentity("0123456789", "instance"),
            validator=Hotkey("5DD"),
            rules=FleetRules(
                level=IsolationLevel.CONTAINER, allow_simulated=False, base_url="http://10.0.2.2:18080"
            ),
            sessions=_session,
            new_id=lambda: f"{next(self.numbers):08d}",
            random_bytes=bytes,
        )
        self.boots: list[asyncio.Task[Any]] = []
        self.do(self.fleet.restore())
        self.running = self.start(self.fleet.run())
        self.let_pass(0)

    @rule(
        cores=st.integers(0, 3),
        memory=st.sampled_from([1, 256, 512, 1024]),
        disk=st.sampled_from([1, 1024, 3000]),
        times=st.integers(1, 3),
    )
    def some_are_wanted(self, cores: int, memory: int, disk: int, times: int) -> None:
        """Several at once; those for which there is room begin to boot."""
        for _ in range(times):
            size = Resources(cpu_cores=cores, memory_mb=memory, disk_mb=disk)
            share = self.quota.reserve(size, owner="machine")
            if isinstance(share, Refusal):
                assert share.wanted > share.free
                continue
            self.boots.append(self.start(self._boot(size, share)))
        # A task that is cancelled before its first step never gets what it was given.
        self.let_pass(0)

    async def _boot(self, size: Resources, share: Reservation) -> None:
        plan = CvmPlan(
            challenge_id=ChallengeId("challenge"),
            instance_key="c@1",
            commit="c" * 40,
            image=IMAGE,
            compose=COMPOSE,
            compose_hash=sha256_hex(COMPOSE),
            bundle_sha256="b" * 64,
            resources=size,
            timeout=timedelta(minutes=5),
            env={},
        )
        with contextlib.suppress(CvmError, VmmError, StoreUnavailable):
            await self.fleet.boot(
                plan, purpose=Purpose.READY, reservation=share, claim_id=None, on_stage=lambda _: None
            )

    @rule(seconds=st.sampled_from([0.01, 1, 6, 30, 120, 400]))
    def time_passes(self, seconds: float) -> None:
        """And whatever is under way goes on."""
        self.let_pass(seconds)

    @precondition(lambda self: self.fleet.views())
    @rule(data=st.data(), twice=st.booleans())
    def one_is_given_up(self, data: st.DataObject, twice: bool) -> None:
        """At any stage; once, or again while it is on its way out."""
        name = data.draw(st.sampled_from(sorted(view.name for view in self.fleet.views())))
        for _ in range(1 + twice):
            self.fleet.destroy(name, reason="given up")

    @precondition(lambda self: any(not boot.done() for boot in self.boots))
    @rule(data=st.data())
    def a_boot_is_cancelled(self, data: st.DataObject) -> None:
        """Its job was."""
        under_way = [boot for boot in self.boots if not boot.done()]
        self.stop(under_way[data.draw(st.integers(0, len(under_way) - 1))])

    @rule(end=st.sampled_from(["well", "well", "failed", "never"]))
    def boots_end(self, end: str) -> None:
        """How guests come up from now on."""
        self.boot_ends = end

    @precondition(lambda self: any(view.stage == "ready" for view in self.fleet.views()))
    @rule(data=st.data())
    def a_ready_one_is_given_a_job(self, data: st.DataObject) -> None:
        """Its share is the job's then."""
        ready = sorted(view.name for view in self.fleet.views() if view.stage == "ready")
        self.fleet.assigned(data.draw(st.sampled_from(ready)))

    @rule(host=st.sampled_from(sorted(BOUNDS)))
    def a_host_dies(self, host: HostName) -> None:
        """`kill -9`: its VMs die with it, and it answers nothing."""
        if host not in self.dead:
            self.dead.add(host)
            self.vmms[host].kill()

    @rule()
    def hosts_come_back(self) -> None:
        """They start again what they had, as dstack does."""
        for host in sorted(self.dead):
            self._revive(host)

    def _revive(self, host: HostName) -> None:
        self.dead.discard(host)
        self.vmms[host].start_again()

    @rule(host=st.sampled_from(sorted(BOUNDS)), drains=st.booleans())
    def the_operator_drains_a_host(self, host: HostName, drains: bool) -> None:
        """Or has it take CVMs again."""
        with contextlib.suppress(StoreUnavailable):
            self.do(self.fleet.keeper.drain(host) if drains else self.fleet.keeper.undrain(host))

    @rule(
        host=st.sampled_from(sorted(BOUNDS)),
        call=st.sampled_from(["create", "create", "stop", "remove", "list", "get"]),
        error=st.sampled_from(sorted(_ERRORS)),
        times=st.integers(1, 4),
        after=st.booleans(),
    )
    def a_vmm_fails(self, host: HostName, call: str, error: str, times: int, after: bool) -> None:
        """Before its call took effect, or after."""
        what = _ERRORS[error] if call == "create" else _ERRORS["unanswered"]
        unsure = isinstance(what, VmmUnavailable) and call in {"create", "stop", "remove"}
        if host not in self.dead:
            self.vmms[host].fail(call, what, times=times, after=after and unsure)

    @rule(at_once=st.booleans())
    def removal_is_quick_or_slow(self, at_once: bool) -> None:
        """A dstack whose removals take their time."""
        for vmm in self.vmms.values():
            vmm.removes_at_once = at_once
            vmm.finish_removals()

    @rule(full=st.booleans())
    def the_disk_changes(self, full: bool) -> None:
        """Full, or not."""
        self.full = full

    @rule()
    def the_process_is_killed(self) -> None:
        """The next one knows only the journal, and gives up what it finds there."""
        for task in [*self.boots, self.running]:
            if not task.done():
                self.stop(task)
        self._open()
        for view in self.fleet.views():
            self.fleet.destroy(view.name, reason="left by an earlier process")

    @rule()
    def it_sweeps(self) -> None:
        """Journal and VMMs are compared."""
        self.do(self.fleet.sweep())

    @invariant()
    def the_account_is_right(self) -> None:
        """Within the limits, never below nothing, and never less than what is there."""
        if self.running.done():
            self.running.result()
        view = self.quota.view()
        assert 0 <= view.cvms <= LIMITS.max_cvms
        for kind in KINDS:
            used, limit = getattr(view.used, kind), getattr(LIMITS.resources, kind)
            assert used <= limit, f"{kind}: {used} reserved, {limit} allowed"
            assert getattr(view.free, kind) == limit - used
        for host, part in view.by_host.items():
            self._a_host_is_right(host, part)
        for parts in (view.by_use.values(), view.by_host.values()):
            assert sum(part.cvms for part in parts) == view.cvms
            assert add(part.used for part in parts) == view.used

    def _a_host_is_right(self, host: HostName, part: HostView) -> None:
        bound, machines = BOUNDS[host], self.vmms[host].machines()
        there = {m.spec.name: m.spec.resources for m in machines if m.state is VmState.RUNNING}
        real = add(there.values())
        assert len(there) <= part.cvms <= bound.max_cvms, f"{host}: more CVMs run than are accounted for"
        for kind in KINDS:
            used, limit = getattr(part.used, kind), getattr(bound.resources, kind)
            assert getattr(real, kind) <= used <= limit, f"{host}: {kind}: {real} run, {part.used} reserved"

    def teardown(self) -> None:
        """When all is well again and everything is given up, everything has come back."""
        try:
            if hasattr(self, "fleet"):
                self._settle()
        finally:
            super().teardown()

    def _settle(self) -> None:
        self.full, self.boot_ends = False, "failed"
        for host, vmm in self.vmms.items():
            self._revive(host)
            vmm.heal()
            vmm.removes_at_once = True
            vmm.finish_removals()
        for boot in [boot for boot in self.boots if not boot.done()]:
            self.stop(boot)
        for view in self.fleet.views():
            self.fleet.destroy(view.name, reason="the end")
        self.let_pass(SETTLED)
        self.the_account_is_right()
        left = self.quota.view()
        assert (left.cvms, left.used.cpu_cores, left.used.memory_mb) == (0, 0, 0), "shares were kept"
        assert [vmm.machines() for vmm in self.vmms.values()] == [[], []]
        assert self.do(self.store.open_vms()) == []
        assert len({self.ports.take() for _ in range(PORTS)}) == PORTS, "a host port was kept"


ReservationMachine.TestCase.settings = PROFILE
TestReservationMachine = ReservationMachine.TestCase


def _never_given_back(patch: pytest.MonkeyPatch) -> None:
    original = Holdings.gone

    def gone(self: Any, name: VmName) -> None:
        self._reservations.pop(name, None)
        original(self, name)

    patch.setattr(Holdings, "gone", gone)


def _forgotten_at_a_restart(patch: pytest.MonkeyPatch) -> None:
    async def restore(self: Any) -> None:
        await self._store.open_vms()

    patch.setattr(Fleet, "restore", restore)


def _given_back_before_it_is_gone(patch: pytest.MonkeyPatch) -> None:
    original = Fleet.destroy

    def destroy(self: Any, name: VmName, reason: str | None = None, **named: Any) -> None:
        reservation = self._holdings._reservations.pop(name, None)
        if reservation is not None:
            self._quota.release(reservation)
        original(self, name, reason, **named)

    patch.setattr(Fleet, "destroy", destroy)


@pytest.mark.parametrize("fault", [_never_given_back, _forgotten_at_a_restart, _given_back_before_it_is_gone])
def test_an_account_with_a_fault_is_caught(
    fault: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The machine finds each fault that is put in."""
    fault(monkeypatch)
    finds(ReservationMachine)


def test_a_share_that_comes_back_twice_is_caught() -> None:
    """The machine finds a fleet that releases early and again, over a quota that forgives it."""
    with BUGS["released-twice"]():
        finds(ReservationMachine)


def test_a_quota_does_not_forgive() -> None:
    """The second release of a share is a fault that is said, so that no count goes below nothing."""
    quota = Quota(LIMITS)
    share = quota.reserve(Resources(cpu_cores=1, memory_mb=1, disk_mb=1), owner="test")
    assert isinstance(share, Reservation)
    quota.release(share)
    with pytest.raises(ReservationSpent):
        quota.release(share)
