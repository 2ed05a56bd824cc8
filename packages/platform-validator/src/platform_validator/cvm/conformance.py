"""What any VMM behind the port must do: run by the tests of each client, against a twin or a real VMM.

A harness says how to make a VM; each case is a coroutine function of the harness. `CASES` names them.
A case removes what it makes, and touches nothing else.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from typing import Protocol
from uuid import uuid4

from platform_protocol.ids import VmId, VmName
from platform_validator.cvm.vmm import Vm, VmmClient, VmmError, VmmRefused, VmNotFound, VmSpec, VmState

_POLL = 0.05
UNKNOWN = VmId("99999999-9999-4999-8999-999999999999")
_ENDED = (VmState.STOPPED, VmState.EXITED)


class VmmHarness(Protocol):
    """The VMM's side of a case."""

    @property
    def client(self) -> VmmClient:
        """The client under test."""

    @property
    def patience(self) -> float:
        """Seconds after which a VM that has not started, stopped or gone fails the case."""

    @property
    def has_tee(self) -> bool:
        """Whether it can make TDX VMs: then the case of the refused TEE proves nothing and passes."""

    def spec(self, name: VmName) -> VmSpec:
        """The smallest VM that this VMM boots, on a host port that is free."""


Case = Callable[[VmmHarness], Awaitable[None]]


async def it_names_its_version_and_images(harness: VmmHarness) -> None:
    """`facts` has a version, and the image that VMs are made of."""
    facts = await harness.client.facts()
    _require(bool(facts.version), "facts without a version")
    _require(
        harness.spec(_name()).image in [image.name for image in facts.images],
        "the image is not in facts",
    )


async def a_vm_is_found_by_its_exact_name(harness: VmmHarness) -> None:
    """What was created is listed under its name and prefix, once, and under no other."""
    name = _name()
    async with _made(harness, name) as vm_id:
        listed = await harness.client.list(name)
        _require([(vm.id, vm.name) for vm in listed] == [(vm_id, name)], f"listed as {listed}")
        _require(name in await _names(harness, name[:6]), "not listed under its prefix")
        _require(name in await _names(harness, ""), "not listed among all")
        _require(not await _names(harness, _name()), "listed under another name")


async def a_vm_shows_what_it_was_made_of(harness: VmmHarness) -> None:
    """Port, memory and CPUs are those of its spec; disk is at least the spec's."""
    name = _name()
    spec = harness.spec(name)
    async with _made(harness, name, spec) as vm_id:
        vm = await harness.client.get(vm_id)
        _require(vm is not None and vm.name == name, f"`get` shows {vm}")
        if vm is None or vm.address is None:
            raise AssertionError(f"no address in {vm}")
        made, asked = vm.resources, spec.resources
        _require(vm.address[1] == spec.host_port, f"expected port {spec.host_port}, found {vm.address[1]}")
        _require(made.cpu_cores == asked.cpu_cores, f"expected {asked}, found {made}")
        _require(made.memory_mb == asked.memory_mb, f"expected {asked}, found {made}")
        _require(made.disk_mb >= asked.disk_mb, f"expected {asked}, found {made}")


async def a_vm_runs_until_it_is_stopped(harness: VmmHarness) -> None:
    """It comes up running; stopping ends it, and stopping again is no error."""
    async with _made(harness, _name()) as vm_id:
        await _until(harness, vm_id, lambda vm: vm is not None and vm.state is VmState.RUNNING)
        await harness.client.stop(vm_id)
        await _until(harness, vm_id, lambda vm: vm is not None and vm.state in _ENDED)
        await harness.client.stop(vm_id)


async def a_removed_vm_is_gone(harness: VmmHarness) -> None:
    """After stop, wait, remove, wait: `get` answers None and no list shows it."""
    name = _name()
    async with _made(harness, name) as vm_id:
        await _destroy(harness, vm_id)
        _require(await harness.client.get(vm_id) is None, "`get` still shows it")
        _require(not await _names(harness, name), "it is still listed")


async def removing_twice_does_no_harm(harness: VmmHarness) -> None:
    """A second removal is answered, or says that it is gone."""
    async with _made(harness, _name()) as vm_id:
        await _destroy(harness, vm_id)
        with contextlib.suppress(VmNotFound):
            await harness.client.remove(vm_id)
        _require(await harness.client.get(vm_id) is None, "`get` still shows it")


async def an_unknown_vm_is_not_found(harness: VmmHarness) -> None:
    """`get` answers None; stop and remove say VmNotFound."""
    _require(await harness.client.get(UNKNOWN) is None, "`get` shows a VM that nobody made")
    for call in (harness.client.stop, harness.client.remove):
        with _raises(VmNotFound):
            await call(UNKNOWN)


async def its_console_can_be_read(harness: VmmHarness) -> None:
    """`logs` is text, of at most as many lines as were asked for (and its process's errors)."""
    async with _made(harness, _name()) as vm_id:
        _require(isinstance(await harness.client.logs(vm_id, 5), str), "logs are no text")


async def what_it_uses_is_told_or_not_known(harness: VmmHarness) -> None:
    """`usage` has counts, or is None: of a VM that nobody made, and of one that does not run, always."""
    _require(await harness.client.usage(UNKNOWN) is None, "a VM that nobody made uses something")
    async with _made(harness, _name()) as vm_id:
        await _until(harness, vm_id, lambda vm: vm is not None and vm.state is VmState.RUNNING)
        used = await harness.client.usage(vm_id)
        counts = [] if used is None else [used.memory_bytes, used.disk_bytes, used.network_bytes]
        _require(all(one is None or one >= 0 for one in counts), f"it uses {used}")
        await harness.client.stop(vm_id)
        await _until(harness, vm_id, lambda vm: vm is not None and vm.state in _ENDED)
        _require(await harness.client.usage(vm_id) is None, "a VM that has ended uses something")


async def an_unknown_image_is_refused(harness: VmmHarness) -> None:
    """Nothing is made of it."""
    name = _name()
    with _raises(VmmRefused):
        await harness.client.create(replace(harness.spec(name), image="no-such-image"))
    _require(not await _names(harness, name), "something was made")


async def a_tee_is_refused_where_there_is_none(harness: VmmHarness) -> None:
    """A VMM without TDX refuses `tee`, rather than start something less."""
    if harness.has_tee:
        return
    name = _name()
    with _raises(VmmRefused):
        await harness.client.create(replace(harness.spec(name), tee=True, simulated_tee=False))
    _require(not await _names(harness, name), "something was made")


async def two_vms_never_share_a_host_port(harness: VmmHarness) -> None:
    """The second is refused, or ends by itself."""
    first = _name()
    spec = harness.spec(first)
    async with _made(harness, first, spec):
        second = replace(harness.spec(_name()), host_port=spec.host_port)
        try:
            vm_id = await harness.client.create(second)
        except VmmRefused:
            return
        try:
            await _until(harness, vm_id, lambda vm: vm is not None and vm.state in _ENDED)
        finally:
            await _destroy(harness, vm_id)


CASES: tuple[Case, ...] = (
    it_names_its_version_and_images,
    a_vm_is_found_by_its_exact_name,
    a_vm_shows_what_it_was_made_of,
    a_vm_runs_until_it_is_stopped,
    a_removed_vm_is_gone,
    removing_twice_does_no_harm,
    an_unknown_vm_is_not_found,
    its_console_can_be_read,
    what_it_uses_is_told_or_not_known,
    an_unknown_image_is_refused,
    a_tee_is_refused_where_there_is_none,
    two_vms_never_share_a_host_port,
)


def _name() -> VmName:
    return VmName(f"conformance-{uuid4()}")


@contextlib.asynccontextmanager
async def _made(harness: VmmHarness, name: VmName, spec: VmSpec | None = None) -> AsyncIterator[VmId]:
    vm_id = await harness.client.create(spec or harness.spec(name))
    try:
        yield vm_id
    finally:
        await _destroy(harness, vm_id)


async def _destroy(harness: VmmHarness, vm_id: VmId) -> None:
    with contextlib.suppress(VmNotFound):
        await harness.client.stop(vm_id)
        await _until(harness, vm_id, lambda vm: vm is None or vm.state is not VmState.RUNNING)
        await harness.client.remove(vm_id)
    await _until(harness, vm_id, lambda vm: vm is None)


async def _until(harness: VmmHarness, vm_id: VmId, holds: Callable[[Vm | None], bool]) -> None:
    async with asyncio.timeout(harness.patience):
        while True:
            if holds(await harness.client.get(vm_id)):
                return
            await asyncio.sleep(_POLL)


async def _names(harness: VmmHarness, prefix: str) -> list[VmName]:
    return [vm.name for vm in await harness.client.list(prefix)]


def _require(holds: bool, found: str) -> None:
    if not holds:
        raise AssertionError(found)


@contextlib.contextmanager
def _raises(kind: type[VmmError]) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    raise AssertionError(f"expected {kind.__name__}")
