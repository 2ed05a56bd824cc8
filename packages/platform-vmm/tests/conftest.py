"""The runtime image is built once a run; each test has a VMM or a sandbox of its own."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from guests import Guests
from running_vmm import Bench, Vmm

from platform_vmm.images import Runtime, RuntimeTable, build_runtime
from platform_vmm.machines import Machines
from platform_vmm.prpc import Prpc
from platform_vmm.restarts import RestartPolicy
from platform_vmm.rootfs import GuestImage, build_guest_image
from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.simulation.pki import Pki, load_pki
from platform_vmm.state import StateDirectory

MakeGuests = Callable[..., contextlib.AbstractAsyncContextManager[Guests]]


@pytest.fixture(scope="session")
def image_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="session")
def runtime(image_state: Path) -> Runtime:
    return build_runtime(image_state)


@pytest.fixture(scope="session")
def guest_image() -> GuestImage:
    """Made by the first who asks, while others wait for it; kept in the checkout from run to run."""
    state = Path(__file__).resolve().parents[3] / ".cache" / "platform-vmm"
    state.mkdir(parents=True, exist_ok=True)
    return build_guest_image(state)


@pytest.fixture(scope="session")
def pki(image_state: Path) -> Pki:
    return load_pki(image_state)


@pytest.fixture
def bench(tmp_path: Path, runtime: Runtime) -> Iterator[Bench]:
    groups = ControlGroups(f"platform-vmm-test-{os.getpid()}-{tmp_path.name[:30]}")
    yield Bench(tmp_path, runtime, groups)
    groups.close()


@pytest.fixture
async def vmm(tmp_path: Path, runtime: Runtime, pki: Pki) -> AsyncIterator[Vmm]:
    table = RuntimeTable([runtime])
    with StateDirectory(tmp_path) as state:
        machines = Machines(state, runtimes=table, pki=pki)
        ready = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(machines.run(ready))
            await ready.wait()
            yield Vmm(machines, Prpc(machines), runtime)
            machines.stop()


@pytest.fixture
async def guest_port() -> AsyncIterator[int]:
    """The host port that guests may reach: it says `validator`."""

    async def hello(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"validator")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(hello, "127.0.0.1", 0) as server:
        yield int(server.sockets[0].getsockname()[1])


@pytest.fixture
def make_guests(tmp_path: Path, runtime: Runtime, pki: Pki, guest_port: int) -> MakeGuests:
    """Makes a VMM for an `async with`; a second one in the same test is the first one restarted."""

    @contextlib.asynccontextmanager
    async def make(**options: Any) -> AsyncIterator[Guests]:
        options = {"restarts": RestartPolicy(first=60.0), "guest_ports": (guest_port,)} | options
        with StateDirectory(tmp_path / "state") as state:
            machines = Machines(state, runtimes=RuntimeTable([runtime]), pki=pki, **options)
            ready = asyncio.Event()
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(machines.run(ready))
                await ready.wait()
                try:
                    yield Guests(machines, runtime, state, guest_port)
                finally:
                    machines.stop()

    return make


@pytest.fixture
async def guests(make_guests: MakeGuests) -> AsyncIterator[Guests]:
    """A VMM whose VMs do not restart by themselves within the test's time."""
    async with make_guests() as one:
        yield one


@pytest.fixture
def free_port() -> int:
    """A TCP port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
