"""What a VMM of dstack's API must do with calls to a guest's agent: led to it, and refused without one."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

from platform_validator.cvm.dstack.bench import Bench, Deviation, Reply, Skipped, require
from platform_validator.cvm.dstack.checks import UNKNOWN, Check

_OK, _REFUSED = 200, 400
_POLL = 0.1
_CALLS = ("SysInfo", "NetworkInfo")
_SIZES = ("total_memory", "used_memory", "free_memory", "available_memory")


async def guest_calls_of_an_unknown_vm_are_refused(bench: Bench) -> None:
    """400 and a text."""
    for method in _CALLS:
        _refused(method, await _ask(bench, method, UNKNOWN))


async def an_unknown_guest_method_is_refused(bench: Bench) -> None:
    """400 and a text."""
    _refused("NoSuchMethod", await _ask(bench, "NoSuchMethod", UNKNOWN))


async def a_guest_call_of_a_wrong_type_is_refused(bench: Bench) -> None:
    """Its message is an Id."""
    wrong: tuple[object, ...] = ({"id": 5}, {"id": None}, [])
    for message in wrong:
        _refused("SysInfo", await _ask(bench, "SysInfo", message))


async def a_guest_that_does_not_run_is_not_reached(bench: Bench) -> None:
    """400 and a text: there is no agent."""
    if not bench.can.stopped:
        raise Skipped(f"version {bench.can.version} does not know `stopped`")
    async with bench.vm() as info:
        for method in _CALLS:
            _refused(method, await _ask(bench, method, {"id": info["id"]}))


async def a_running_guest_tells_what_it_uses(bench: Bench) -> None:
    """Sizes in bytes, disks and interfaces; or, without an agent that answers, 400 and a text."""
    if not bench.start:
        raise Skipped("it starts a VM: --start allows it")
    async with bench.vm() as info:
        vm = {"id": info["id"]}
        await bench.call("StartVm", vm)
        await bench.until(info["id"], "running")
        await _answered(bench, vm)
        system, network = [await _ask(bench, method, vm) for method in _CALLS]
        sizes = [system.fields.get(name) for name in _SIZES]
        require(all(_count(one) for one in sizes), f"sizes of memory: {sizes}")
        for disk in _objects(system, "disks"):
            known = _count(disk.get("total_size")) and _count(disk.get("free_size"))
            require(known and isinstance(disk.get("mount_point"), str), f"a disk is {disk}")
        for interface in _objects(network, "interfaces"):
            known = _count(interface.get("rx_bytes")) and _count(interface.get("tx_bytes"))
            require(known and isinstance(interface.get("name"), str), f"an interface is {interface}")


GUEST_CHECKS: tuple[Check, ...] = (
    guest_calls_of_an_unknown_vm_are_refused,
    an_unknown_guest_method_is_refused,
    a_guest_call_of_a_wrong_type_is_refused,
    a_guest_that_does_not_run_is_not_reached,
    a_running_guest_tells_what_it_uses,
)


async def _ask(bench: Bench, method: str, message: object) -> Reply:
    answer = await bench.wire.exchange("POST", f"/guest/{method}?json", json.dumps(message).encode())
    try:
        return Reply(answer.status, json.loads(answer.body))
    except ValueError as error:
        raise Deviation(f"/guest/{method}: HTTP {answer.status} with a body that is not JSON") from error


async def _answered(bench: Bench, vm: dict[str, Any]) -> None:
    """Wait for its agent. Until that answers, its refusals are judged."""
    deadline = time.monotonic() + bench.patience
    while (reply := await _ask(bench, "SysInfo", vm)).status != _OK:
        _refused("SysInfo", reply)
        status = (await bench.info(vm["id"]))["status"]
        if status != "running" or time.monotonic() > deadline:
            raise Skipped(f"no guest agent answers within {bench.patience:.0f} s, it is {status}")
        await asyncio.sleep(_POLL)


def _refused(method: str, reply: Reply) -> None:
    require(reply.status == _REFUSED, f"/guest/{method}: expected 400, got {reply.status}")
    text = reply.value.get("error") if isinstance(reply.value, dict) else None
    require(isinstance(text, str) and bool(text), f"/guest/{method}: a 400 without a text in `error`")


def _count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _objects(reply: Reply, name: str) -> list[dict[str, Any]]:
    found = reply.fields.get(name)
    require(isinstance(found, list) and all(isinstance(one, dict) for one in found), f"{name} is {found!r}")
    return list(found or [])
