"""VMs as dstack's API shows them: states, boot errors, removal, restarts, and what a crash leaves."""

from __future__ import annotations

import json
import shutil
from typing import Any

import pytest
from running_vmm import Vmm, compose
from waiting import until

from platform_vmm.errors import VmmError


async def test_create_stop_remove(vmm: Vmm) -> None:
    machine = vmm.create()
    shown = await vmm.until(machine.id, status="running", boot_progress="done")
    assert (shown["name"], shown["boot_error"], shown["exited_at"]) == ("pv-test", "", "never")
    assert len(shown["instance_id"]) == 40
    vmm.prpc.call("StopVm", {"id": machine.id})
    await vmm.until(machine.id, status="stopped")
    assert vmm.prpc.call("RemoveVm", {"id": machine.id}) is None
    await vmm.until(machine.id, found=False)
    assert not machine.folder.exists()


async def test_a_running_vm_is_removed_in_the_background(vmm: Vmm) -> None:
    machine = vmm.create()
    await vmm.until(machine.id, boot_progress="done")
    vmm.prpc.call("RemoveVm", {"id": machine.id})
    assert vmm.info(machine.id)["info"]["status"] == "removing"
    vmm.prpc.call("RemoveVm", {"id": machine.id})
    await vmm.until(machine.id, found=False)


@pytest.mark.parametrize("running", [True, False])
async def test_a_vm_whose_record_cannot_be_written_changes_nothing_but_can_be_removed(
    vmm: Vmm, running: bool
) -> None:
    """As on a full disk: start and stop are refused with the reason; what is removed makes room."""
    machine = vmm.create(stopped=not running)
    await vmm.until(machine.id, **({"boot_progress": "done"} if running else {"status": "stopped"}))
    (machine.folder / "vm.json.new").mkdir()  # where the new record is written first
    call = "StopVm" if running else "StartVm"
    with pytest.raises(VmmError, match="Failed to write the VM's record"):
        vmm.prpc.call(call, {"id": machine.id})
    assert vmm.info(machine.id)["info"]["status"] == ("running" if running else "stopped")
    vmm.prpc.call("RemoveVm", {"id": machine.id})
    await vmm.until(machine.id, found=False)
    assert not machine.folder.exists()


async def test_a_vm_whose_folder_somebody_removed_can_be_removed(vmm: Vmm) -> None:
    machine = vmm.create()
    await vmm.until(machine.id, boot_progress="done")
    shutil.rmtree(machine.folder)
    vmm.prpc.call("RemoveVm", {"id": machine.id})
    await vmm.until(machine.id, found=False)


async def test_a_guest_that_exits_is_exited_and_started_again(vmm: Vmm) -> None:
    machine = vmm.create(["sh", "-c", "echo crashed; exit 3"])
    await vmm.until(machine.id, status="exited")
    assert "crashed" in machine.console.read_text()
    assert any(event["body"] == "exit code 3" for event in vmm.info(machine.id)["info"]["events"])


async def test_a_stopped_vm_is_created_and_not_started(vmm: Vmm) -> None:
    machine = vmm.create(stopped=True)
    assert vmm.info(machine.id)["info"]["status"] == "stopped"
    vmm.prpc.call("StartVm", {"id": machine.id})
    await vmm.until(machine.id, boot_progress="done", status="running")


@pytest.mark.parametrize(
    ("service", "key"),
    [
        ({"privileged": True}, "services.challenge.privileged"),
        ({"volumes": ["/etc:/etc"]}, "services.challenge.volumes"),
        ({"image": "python:3"}, "services.challenge.image"),
        ({"command": None}, "services.challenge.command"),
    ],
)
async def test_outside_the_compose_subset_is_a_boot_error_that_names_the_key(
    vmm: Vmm, service: dict[str, Any], key: str
) -> None:
    machine = vmm.create(
        compose_file=compose(vmm.runtime, ["true"], **service)
        if "image" not in service and "command" not in service
        else _with(vmm, service)
    )
    await until(lambda: key in vmm.info(machine.id)["info"]["boot_error"])


def _with(vmm: Vmm, service: dict[str, Any]) -> str:
    document = json.loads(compose(vmm.runtime, ["true"]))
    inner = json.loads(document["docker_compose_file"])
    inner["services"]["challenge"] |= service
    return json.dumps(document | {"docker_compose_file": json.dumps(inner)})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"no_tee": False}, "makes no TEE"),
        ({"image": "other"}, "Failed to load image"),
        ({"compose_file": "{}"}, "missing field"),
        ({"vcpu": "2"}, "vcpu"),
        ({"memory": 0}, "memory"),
        ({"name": "a/b"}, "name"),
        ({"ports": [{"host_port": 80, "vm_port": 80, "host_address": "0.0.0.0"}]}, "127.0.0.1 only"),
        ({"simulated_tee": "dstack-amd-sev-snp"}, "simulates dstack-tdx only"),
    ],
)
async def test_what_it_does_not_do_is_refused_at_once(vmm: Vmm, change: dict[str, Any], told: str) -> None:
    with pytest.raises(VmmError, match=told):
        vmm.create(**change)
    assert vmm.prpc.call("Status", {})["total"] == 0


async def test_two_vms_cannot_map_one_host_port(vmm: Vmm) -> None:
    ports = [{"protocol": "tcp", "host_port": 19_321, "vm_port": 10_000}]
    vmm.create(ports=ports)
    with pytest.raises(VmmError, match="conflicts"):
        vmm.create(ports=ports)


async def test_a_hard_lifetime_ends_the_vm_for_good(vmm: Vmm) -> None:
    machine = vmm.create(user_config=json.dumps({"hard_lifetime_s": 1}))
    await vmm.until(machine.id, boot_progress="done")
    await vmm.until(machine.id, status="stopped")


async def test_status_filters_and_pages(vmm: Vmm) -> None:
    for number in range(3):
        vmm.create(name=f"pv-a-{number}", stopped=True)
    vmm.create(name="other", stopped=True)
    found = vmm.prpc.call("Status", {"keyword": "pv-a", "page": 2, "page_size": 2, "brief": True})
    assert (found["total"], [vm["name"] for vm in found["vms"]]) == (3, ["pv-a-2"])
    assert found["vms"][0]["configuration"] is None
