"""What CVMs use: read from untrusted guests, merged over samples, asked for without harm, kept per CVM."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as some

from platform_protocol.canonical import canonical_json
from platform_protocol.ids import VmId, VmName
from platform_validator.clock import SystemClock
from platform_validator.cvm.dstack import DstackVmm
from platform_validator.cvm.dstack.guest_usage import read_usage
from platform_validator.cvm.hosts import Hosts
from platform_validator.cvm.members import Member
from platform_validator.cvm.sampling import UsageSampler
from platform_validator.cvm.usage import VmUsage, merged
from platform_validator.cvm.vmm import VmmUnavailable
from platform_validator.host_name import HostName

HOST = HostName("default")
NAME = VmName("pv-0123456789-a")
SYSTEM = {
    "used_memory": 300,
    "disks": [
        {"name": "/dev/vda", "mount_point": "/", "total_size": 100, "free_size": 40},
        {"name": "/dev/vda", "mount_point": "/dstack", "total_size": 100, "free_size": 40},
        {"name": "/dev/vdb", "mount_point": "/data", "total_size": 50, "free_size": 45},
    ],
}
NETWORK = {
    "interfaces": [
        {"name": "enp0s1", "rx_bytes": 7, "tx_bytes": 5},
        {"name": "wg0", "rx_bytes": 1000, "tx_bytes": 1000},
        {"name": "lo", "rx_bytes": 1000, "tx_bytes": 1000},
    ]
}
_VALUES = some.recursive(
    some.none() | some.booleans() | some.integers() | some.floats() | some.text(max_size=5),
    lambda inner: some.lists(inner, max_size=3),
    max_leaves=5,
)
_DISK = some.dictionaries(some.sampled_from(["name", "total_size", "free_size"]), _VALUES)
_INTERFACE = some.dictionaries(some.sampled_from(["name", "rx_bytes", "tx_bytes"]), _VALUES)


def test_dstack_s_answers_give_memory_disks_and_network_but_no_cpu_time() -> None:
    """A device counts once, wherever it is mounted; bytes through an inner interface count once as well."""
    expected = VmUsage(memory_bytes=300, disk_bytes=65, network_bytes=12)
    assert read_usage(SYSTEM, NETWORK) == expected
    assert read_usage(SYSTEM, {}).network_bytes is None


def test_a_local_vmm_adds_cpu_time_and_the_peak() -> None:
    more = {"platform_vmm": {"cpu_time_ms": 12, "memory_peak_bytes": 400}}
    found = read_usage(SYSTEM | more, NETWORK)
    assert (found.cpu_time_ms, found.memory_peak_bytes) == (12, 400)


@given(
    used=_VALUES,
    disks=_VALUES | some.lists(_DISK, max_size=3),
    interfaces=_VALUES | some.lists(_INTERFACE, max_size=3),
    local=_VALUES | some.dictionaries(some.sampled_from(["cpu_time_ms", "memory_peak_bytes"]), _VALUES),
)
def test_whatever_a_guest_says_can_be_put_into_a_result(
    used: Any, disks: Any, interfaces: Any, local: Any
) -> None:
    """Also numbers that no result can hold: those are not known."""
    system = {"used_memory": used, "disks": disks, "platform_vmm": local}
    found = merged(None, read_usage(system, {"interfaces": interfaces}))
    canonical_json(found.reported().model_dump(mode="json"))


@pytest.mark.parametrize("said", [2**53, -1, True, 1.5, "3", None, [1], {}])
def test_what_is_no_number_of_bytes_that_a_result_can_hold_is_not_known(said: Any) -> None:
    most = 2**53 - 1
    disks = [{"name": name, "total_size": said, "free_size": 0} for name in "ab"]
    carried = {"interfaces": [{"name": "enp0s1", "rx_bytes": said, "tx_bytes": said}]}
    assert read_usage({"used_memory": said, "disks": disks, "platform_vmm": said}, carried) == VmUsage()
    large = {"interfaces": [{"name": "enp0s1", "rx_bytes": most, "tx_bytes": most}]}
    assert read_usage({}, large).network_bytes == most, "a sum that is too large is the most there is"


_COUNT = some.none() | some.integers(0, 2**53 - 1)
_USAGE = some.builds(VmUsage, _COUNT, _COUNT, _COUNT, _COUNT, _COUNT)


@given(old=some.none() | _USAGE, sample=_USAGE)
def test_counters_and_peaks_never_fall_and_what_was_known_stays_known(
    old: VmUsage | None, sample: VmUsage
) -> None:
    new = merged(old, sample)
    for name in ("cpu_time_ms", "memory_peak_bytes", "disk_bytes", "network_bytes"):
        before = [getattr(one, name) for one in (old, sample) if one is not None]
        known = [value for value in before if value is not None]
        assert not known or getattr(new, name) >= max(known)
    assert new.memory_bytes == sample.memory_bytes
    assert merged(new, sample) == new


@dataclass
class Asked:
    """A VMM that is asked for usage alone: `answers` in turn, then the last one again; None hangs."""

    answers: list[VmUsage | Exception | None]
    hangs: bool = False
    times: int = 0

    async def usage(self, vm_id: VmId) -> VmUsage | None:
        assert vm_id == "vm-1"
        self.times += 1
        if self.hangs:
            await asyncio.Event().wait()
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer


class StepClock(SystemClock):
    """Time passes where the sampler sleeps; a test lets it sleep so many times."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.turn = asyncio.Semaphore(0)

    def monotonic(self) -> float:
        return self.now_s

    async def sleep(self, seconds: float) -> None:
        await self.turn.acquire()
        self.now_s += seconds


@dataclass
class Bench:
    """A sampler of one CVM that is up."""

    vmm: Asked
    every: timedelta | None = timedelta(seconds=5)
    clock: StepClock = field(default_factory=StepClock)
    heard: list[tuple[str, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        record = SimpleNamespace(name=NAME, host=HOST)
        self.member = Member(cast("Any", record), stage="ready", vm_id=VmId("vm-1"))
        self.held = {NAME: self.member}
        host = SimpleNamespace(name=HOST, vmm=self.vmm)
        self.sampler = UsageSampler(
            hosts=Hosts([cast("Any", host)], clock=self.clock),
            held=lambda: self.held,
            clock=self.clock,
            every=self.every,
        )
        self.sampler.heard = lambda *told: self.heard.append(told)

    async def rounds(self, count: int) -> None:
        """The first look, and so many later ones."""
        running = asyncio.create_task(self.sampler.run())
        for _ in range(count):
            self.clock.turn.release()
        while not (running.done() or (self.clock.now_s >= 5 * count and self.clock.turn.locked())):
            await asyncio.sleep(0)
        for _ in range(20):
            await asyncio.sleep(0)  # a turn of the loop: a look takes a few of them
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await running


async def test_each_sample_is_kept_and_what_grew_is_told() -> None:
    bench = Bench(Asked([VmUsage(100, 5, 9, 1, 10), VmUsage(150, 4, 9, 2, 40)]))
    await bench.rounds(1)
    assert bench.heard == [("sampled", 100, 10), ("sampled", 50, 30)]
    assert bench.sampler.of(NAME) == VmUsage(150, 4, 9, 2, 40, cpu_percent=1.0)


async def test_the_share_of_the_cpu_is_of_the_last_two_samples() -> None:
    """Of one CPU: two busy ones are 200. One sample shows none, and a counter that fell no negative one."""
    shares = []
    for rounds in range(4):
        bench = Bench(Asked([VmUsage(1000), VmUsage(11_000), VmUsage(11_500), VmUsage(0)]))
        await bench.rounds(rounds)
        known = bench.sampler.of(NAME)
        assert known is not None
        shares.append(known.cpu_percent)
    assert shares == [None, 200.0, 10.0, 0.0]


async def test_a_sample_beside_another_leaves_the_share_as_it_is() -> None:
    """The one that a result asks for comes at any moment: over milliseconds, a share says nothing."""
    bench = Bench(Asked([VmUsage(1000), VmUsage(2000), VmUsage(2900), VmUsage(4000)]))
    await bench.rounds(1)
    bench.clock.now_s += 0.01
    assert await bench.sampler.last(NAME) == VmUsage(2900, cpu_percent=20.0)
    bench.clock.now_s += 1.99
    assert await bench.sampler.last(NAME) == VmUsage(4000, cpu_percent=100.0)


async def test_a_vmm_that_counts_no_cpu_time_shows_no_share() -> None:
    """As dstack's: not known, and not idle."""
    bench = Bench(Asked([VmUsage(memory_bytes=1)]))
    await bench.rounds(3)
    assert bench.sampler.of(NAME) == VmUsage(memory_bytes=1, memory_peak_bytes=1)


async def test_a_vmm_that_cannot_say_is_asked_ever_more_rarely() -> None:
    """Within ten minutes: at 0, 5, 15, 35, 75, 155, 315 s, then every 300 s."""
    bench = Bench(Asked([None]))
    await bench.rounds(120)
    assert bench.vmm.times == 7
    assert set(bench.heard) == {("unknown", 0, 0)}
    assert await bench.sampler.last(NAME) is None
    assert bench.vmm.times == 7, "a job that ends does not ask it either"


async def test_failures_are_counted_and_the_next_look_goes_on() -> None:
    bench = Bench(Asked([VmmUnavailable("no answer"), VmUsage(cpu_time_ms=3)]))
    await bench.rounds(2)
    assert [answer for answer, _, _ in bench.heard] == ["failed", "sampled", "sampled"]
    assert bench.sampler.of(NAME) == VmUsage(cpu_time_ms=3, cpu_percent=0.0)


async def test_a_vmm_that_hangs_holds_a_result_up_for_a_moment_only() -> None:
    bench = Bench(Asked([None], hangs=True))
    async with asyncio.timeout(20):
        assert await bench.sampler.last(NAME) is None
    assert bench.heard == [("failed", 0, 0)]


async def test_what_does_not_run_is_not_asked_and_what_is_gone_is_forgotten() -> None:
    bench = Bench(Asked([VmUsage(1)]))
    await bench.rounds(0)
    bench.member.stage = "destroying"
    await bench.rounds(3)
    assert bench.vmm.times == 1
    assert bench.sampler.of(NAME) == VmUsage(1)
    bench.held.clear()
    await bench.rounds(0)
    assert bench.sampler.of(NAME) is None


async def test_with_monitoring_off_nothing_is_ever_asked() -> None:
    bench = Bench(Asked([VmUsage(1)]), every=None)
    await bench.rounds(3)
    assert await bench.sampler.last(NAME) is None
    assert bench.vmm.times == 0


@pytest.fixture
async def serve(tmp_path: Path) -> AsyncIterator[Callable[..., Any]]:
    """A client of a server that answers every call in the same way."""
    async with contextlib.AsyncExitStack() as stack:

        async def start(status: int, body: bytes) -> tuple[DstackVmm, list[str]]:
            seen: list[str] = []

            async def answer(request: web.Request) -> web.Response:
                seen.append(f"{request.method} {request.path_qs} {await request.text()}")
                return web.Response(status=status, body=body)

            app = web.Application()
            app.router.add_route("*", "/{path:.*}", answer)
            runner = web.AppRunner(app)
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            await web.UnixSite(runner, str(tmp_path / "s")).start()
            client = DstackVmm(f"unix:{tmp_path / 's'}")
            stack.push_async_callback(client.close)
            return client, seen

        yield start


async def test_the_dstack_client_asks_the_guest_agent_by_id(serve: Callable[..., Any]) -> None:
    client, seen = await serve(200, json.dumps(SYSTEM | NETWORK).encode())
    assert await client.usage(VmId("vm-1")) == VmUsage(memory_bytes=300, disk_bytes=65, network_bytes=12)
    assert seen == [f'POST /guest/{name}?json {{"id": "vm-1"}}' for name in ("SysInfo", "NetworkInfo")]


@pytest.mark.parametrize(
    ("status", "body"),
    [
        (404, b"not found"),
        (400, b'{"error": "guest agent is unreachable"}'),
        (500, b""),
        (200, b"null"),
        (200, b"[1]"),
        (200, b"no json"),
        (200, b"[" * 100_000),
    ],
)
async def test_a_vmm_without_a_guest_agent_cannot_say(
    serve: Callable[..., Any], status: int, body: bytes
) -> None:
    client, _ = await serve(status, body)
    assert await client.usage(VmId("vm-1")) is None
