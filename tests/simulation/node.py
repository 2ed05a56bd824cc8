"""One validator through all its lives: killed, stopped, drained, started again on the same disk and host."""

from __future__ import annotations

import asyncio
import contextvars
import random
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path

from tests.simulation.disk import Disk
from tests.simulation.faults import strike
from tests.simulation.host import Host, SimulatedProbe, VmmLine
from tests.simulation.laws import Laws
from tests.simulation.plan import NodePlan, Plan
from tests.simulation.server import Line, Server
from tests.simulation.sessions import session_maker
from tests.simulation.source import MemorySource
from tests.simulation.virtual import Wall, passing
from tests.simulation.world import LIFE, Dead, Dice, Life

from platform_protocol.ids import Hotkey
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.config import Settings
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import VmmHost
from platform_validator.daemon.engine import Engine
from platform_validator.daemon.parts import Outside, make_components, make_values
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.jobs.lease import LeaseRules, TaskRenewer
from platform_validator.keyring import Keyring
from platform_validator.store.memory import MemoryStore
from platform_validator.store.port import StoreUnavailable
from platform_validator.store.records import Stage, StateIdentity
from platform_validator.telemetry.metrics import Metrics
from platform_validator.values.keys import MemoryKeys


class SimulatedClock:
    """The clocks of one life, on its machine's wall. See `platform_validator.clock.Clock`."""

    def __init__(self, life: Life, wall: Wall) -> None:
        self._life = life
        self._wall = wall
        self._loop = asyncio.get_running_loop()

    def now(self) -> datetime:
        """See the port."""
        return self._wall.now()

    def monotonic(self) -> float:
        """See the port."""
        return self._loop.time()

    def boottime(self) -> float:
        """See the port."""
        return self._loop.time()

    async def sleep(self, seconds: float) -> None:
        """See the port."""
        self._life.check()
        await passing(seconds)
        self._life.check()


class Node:
    """A validator.

    Args:
        number: Which one.
        plan: The world's, and its own.
        settings: Its configuration.
        server: The Platform API.
        laws: Are told.
        dice: Chance.
        folder: For submissions.
    """

    def __init__(
        self,
        number: int,
        plan: tuple[Plan, NodePlan],
        settings: Settings,
        server: Server,
        laws: Laws,
        dice: Dice,
        folder: Path,
    ) -> None:
        self.number = number
        self.plan, self.mine = plan
        self._settings = settings
        self._server = server
        self._laws = laws
        self._dice = dice
        self._folder = folder
        self._ids = dice.stream(f"ids/{number}")
        self._jitter = dice.stream(f"jitter/{number}")
        self._lives = 0
        self.hotkey = f"validator-{number}"
        state_id = f"{self._ids.getrandbits(40):010x}"
        self._identity = StateIdentity(state_id, f"instance-{number}")
        self.store = MemoryStore(identity=self._identity)
        limits = settings.limits, settings["resource_limits.max_cvms"]
        self.host = Host(number, state_id, plan, limits, laws, dice.stream(f"host/{number}"))
        self.wall = Wall()
        self.keyring = Keyring(b"k" * 32)
        self.value_keys = MemoryKeys(b"v" * 32)
        self.life = Life(number)
        self.engine: Engine | None = None
        self.disk: Disk | None = None
        self.line: Line | None = None
        self.healed = False
        self._points = list(self.mine.crashpoints)
        self._passed: dict[str, int] = {}
        self._over = False

    async def run(self) -> None:
        """Live, and live again after each death or drain, until told that it is over."""
        book, pause = self._laws.book, self._dice.stream(f"down/{self.number}")
        while True:
            life = self.life = Life(self.number)
            self._lives += 1
            context = contextvars.copy_context()
            context.run(LIFE.set, life)
            life.root = asyncio.get_running_loop().create_task(self._live(life), context=context)
            await asyncio.wait({life.root})
            error = None if life.root.cancelled() else life.root.exception()
            if life.alive and error is not None and not isinstance(error, StoreUnavailable):
                book.violated("daemon", f"validator {self.number} died of {error!r}")
            if not life.alive:
                book.counts["crashes"] += 1
                book.note(f"crash {self.number}")
            life.alive = False
            if self._over:
                return
            await asyncio.sleep(pause.choice((0.5, 5.0, 5.0, 30.0, 200.0)))

    async def _live(self, life: Life) -> None:
        clock = SimulatedClock(life, self.wall)
        plan = self.plan, self.mine
        stream = self._dice.stream
        name = f"{self.number}/{self._lives}"
        line = self.line = Line(self._server, life, self.hotkey, plan, self._laws, stream(f"net/{name}"))
        disk = self.disk = Disk(
            self.store, life, self.mine, self.plan.disk, self._laws, self._server, stream(f"disk/{name}")
        )
        line.healed = disk.healed = self.healed
        vmm, ports = VmmLine(self.host, life), HostPorts(*self._settings["dstack.port_range"])
        outside = Outside(
            clock=clock,
            client=line,
            hosts=(VmmHost(DEFAULT_HOST, vmm, SimulatedProbe(self.host, vmm, clock), ports),),
            sessions=session_maker(self.host, life),
            source=MemorySource(clock, stream(f"source/{name}")),
            policy=AttestationPolicy(level=IsolationLevel.CONTAINER, allow_simulated=False, checker=None),
            renewer=TaskRenewer(client=line, clock=clock, rules=LeaseRules()),
            rng=self._jitter,
            new_id=self._new_id,
            random_bytes=lambda count: b"s" * count,
        )
        metrics = Metrics()
        parts = make_components(
            self._settings,
            outside,
            validator=Hotkey(self.hotkey),
            store=disk.port(),
            identity=self._identity,
            keyring=self.keyring,
            values=make_values(self._settings, self.value_keys, store=disk.port(), clock=clock),
            metrics=metrics,
            cache=self._folder / str(self.number),
        )
        life.stored_in_slots = lambda: {
            view.vm for view in parts.jobs.views() if view.stage is Stage.SUBMITTING and view.vm is not None
        }
        engine = self.engine = Engine(
            parts=parts,
            client=line,
            store=disk.port(),
            clock=clock,
            rng=self._jitter,
            metrics=metrics,
            drain_timeout=timedelta(minutes=15),
        )
        await engine.run()
        self._laws.book.counts["drains"] += 1

    def _new_id(self) -> str:
        bits = self._ids.getrandbits(128)
        return f"{bits:032x}"

    @property
    def runs(self) -> bool:
        """Whether it lives, and its loops turn."""
        return self.life.alive and self.engine is not None and self.engine.phase == "running"

    # What befalls it

    def passes(self, name: str) -> None:
        """It came to a crashpoint."""
        self._passed[name] = self._passed.get(name, 0) + 1
        due = (name, self._passed[name])
        if due in self._points and not self.healed:
            self._points.remove(due)
            strike(self._laws.book, "crashpoint")
            self._laws.book.counts[f"at_{name}"] += 1
            self.life.end()
            raise Dead

    def kill(self) -> None:
        """Kill -9."""
        if self.life.alive and self.life.root is not None and not self.life.root.done():
            strike(self._laws.book, "kill")
            self.life.end()

    def stop_for(self, seconds: float) -> None:
        """SIGSTOP, and SIGCONT that many seconds later."""
        strike(self._laws.book, "stop")
        self.life.frozen_until = asyncio.get_running_loop().time() + seconds

    def drain(self) -> None:
        """SIGTERM."""
        if self.engine is not None and self.life.alive:
            strike(self._laws.book, "drain")
            self.engine.drain("simulated")

    def heal(self) -> None:
        """Nothing befalls it any more."""
        self.healed = True
        self.host.heal()
        self.life.frozen_until = 0.0
        for port in (self.line, self.disk):
            if port is not None:
                port.healed = True

    def end(self) -> None:
        """Drain, and do not start again."""
        self._over = True
        if self.engine is not None and self.life.alive:
            self.engine.drain("over")


def settings_for(base: Settings, dice: random.Random) -> Settings:
    """A configuration of its own: how much room and how many slots it has."""
    cores = dice.choice((4, 6, 10))
    values = dict(base.values) | {
        "resource_limits.cpu_cores": cores,
        "resource_limits.memory_mb": cores * 600,
        "resource_limits.disk_mb": 20_000,
        "resource_limits.max_cvms": dice.choice((4, 8, 16)),
        "jobs.max_concurrent": dice.choice((3, 4, 8)),
    }
    return replace(base, values=values)


SMALL = Resources(cpu_cores=1, memory_mb=256, disk_mb=512)
