"""The runtime image is built once a run; each test has a VMM or a sandbox of its own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from running_vmm import Bench, Vmm

from platform_vmm.images import Runtime, RuntimeTable, build_runtime
from platform_vmm.machines import Machines
from platform_vmm.prpc import Prpc
from platform_vmm.sandbox.cgroups import ControlGroups
from platform_vmm.simulation.pki import Pki, load_pki


@pytest.fixture(scope="session")
def image_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("images")


@pytest.fixture(scope="session")
def runtime(image_state: Path) -> Runtime:
    return build_runtime(image_state)


@pytest.fixture(scope="session")
def pki(image_state: Path) -> Pki:
    return load_pki(image_state)


@pytest.fixture
def bench(tmp_path: Path, runtime: Runtime) -> Iterator[Bench]:
    groups = ControlGroups(f"platform-vmm-test-{tmp_path.name[:40]}")
    yield Bench(tmp_path, runtime, groups)
    groups.close()


@pytest.fixture
async def vmm(tmp_path: Path, runtime: Runtime, pki: Pki) -> AsyncIterator[Vmm]:
    table = RuntimeTable([runtime])
    machines = Machines(tmp_path, runtimes=table, pki=pki, guest_ports=())
    ready = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(machines.run(ready))
        await ready.wait()
        yield Vmm(machines, Prpc(machines, table), runtime)
        machines.stop()
