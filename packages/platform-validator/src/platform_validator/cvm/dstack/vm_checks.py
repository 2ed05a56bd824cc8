"""What a VMM of dstack's API must do with VMs: made and not started, and, where allowed, started."""

from __future__ import annotations

import hashlib

from platform_validator.cvm.dstack.bench import PREFIX, Bench, Skipped, require
from platform_validator.cvm.dstack.checks import Check

_OK = 200
_INFO = {
    "id",
    "name",
    "status",
    "uptime",
    "app_url",
    "app_id",
    "instance_id",
    "configuration",
    "exited_at",
    "boot_progress",
    "boot_error",
    "shutdown_progress",
    "image_version",
}


async def a_vm_is_made_without_being_started(bench: Bench) -> None:
    """`stopped` is obeyed (v0.5.4)."""
    if not bench.can.stopped:
        raise Skipped(f"version {bench.can.version} does not know `stopped`")
    async with bench.vm() as info:
        require(info["status"] == "stopped", f"it is {info['status']}")


async def a_vm_shows_every_field(bench: Bench) -> None:
    """VmInfo emits what is empty as well."""
    async with bench.vm() as info:
        missing = _INFO - info.keys()
        require(not missing, f"VmInfo lacks {', '.join(sorted(missing))}")


async def a_vm_is_made_of_what_was_sent(bench: Bench) -> None:
    """Its configuration comes back: sizes, image, and both texts to the byte."""
    config = '{"vm": "x", "text": "ü \\u0000 \\" \\n"}'
    async with bench.vm(user_config=config) as info:
        shown = info["configuration"]
        require(shown["compose_file"] == bench.compose(), "another compose_file")
        require(shown["user_config"] == config, "another user_config")
        sizes = (shown["vcpu"], shown["memory"], shown["disk_size"], shown["image"])
        require(sizes == (1, 256, 1, bench.image.name), f"made of {sizes}")


async def the_app_id_is_the_compose_hash(bench: Bench) -> None:
    """Its first 40 hex digits, when none is given."""
    async with bench.vm() as info:
        expected = hashlib.sha256(bench.compose().encode()).hexdigest()[:40]
        require(info["app_id"] == expected, f"app_id {info['app_id']}, expected {expected}")


async def no_tee_is_kept_where_it_is_known(bench: Bench) -> None:
    """Since v0.5.6; before, the field is not shown either."""
    async with bench.vm() as info:
        shown = info["configuration"].get("no_tee")
        expected = (not bench.has_tee) if bench.can.no_tee else None
        require(shown == expected, f"no_tee is {shown}, expected {expected}")


async def a_port_gets_its_host_address(bench: Bench) -> None:
    """An empty host_address is shown as the one that is used."""
    port = bench.port()
    mapping = {"protocol": "tcp", "host_port": port, "vm_port": 10000, "host_address": ""}
    async with bench.vm(ports=[mapping]) as info:
        [shown] = info["configuration"]["ports"]
        require((shown["host_port"], shown["vm_port"]) == (port, 10000), f"mapped {shown}")
        require(bool(shown["host_address"]), "without an address")


async def a_vm_is_found_by_name_and_by_id(bench: Bench) -> None:
    """Status by `keyword` of either, and by `ids`."""
    async with bench.vm() as info:
        for message in ({"keyword": info["name"]}, {"keyword": info["id"]}, {"ids": [info["id"]]}):
            found = (await bench.call("Status", message)).fields["vms"]
            require([vm["id"] for vm in found] == [info["id"]], f"{message} finds {len(found)} VMs")


async def brief_leaves_the_configuration_out(bench: Bench) -> None:
    """As null."""
    async with bench.vm() as info:
        [shown] = (await bench.call("Status", {"ids": [info["id"]], "brief": True})).fields["vms"]
        require(shown["configuration"] is None, "brief shows a configuration")


async def pages_count_from_one(bench: Bench) -> None:
    """`total` counts what the filter leaves, before paging."""
    async with bench.vm() as first, bench.vm() as second:
        ids = [first["id"], second["id"]]
        shown = []
        for page in (1, 2, 3):
            found = (await bench.call("Status", {"ids": ids, "page": page, "page_size": 1})).fields
            require(found["total"] == len(ids), f"total {found['total']}")
            shown += [vm["id"] for vm in found["vms"]]
        require(shown == ids, "pages in another order than that of creation")


async def a_name_can_be_had_twice(bench: Bench) -> None:
    """CreateVm is not idempotent."""
    name = f"{PREFIX}twice"
    async with bench.vm(name=name) as first, bench.vm(name=name) as second:
        require(first["id"] != second["id"], "the second is the first")


async def stopping_a_stopped_vm_is_no_error(bench: Bench) -> None:
    """And its answer is Empty."""
    async with bench.vm() as info:
        await bench.call("StopVm", {"id": info["id"]})
        await bench.until_ended(info["id"])
        status, value = await bench.call("StopVm", {"id": info["id"]})
        require((status, value) == (_OK, None), f"answered {status} {value!r}")


async def a_removed_vm_is_shown_nowhere(bench: Bench) -> None:
    """From GetInfo and from Status; removing it again is answered or refused, and does no harm."""
    async with bench.vm() as info:
        await bench.destroy(info["id"])
        found = (await bench.call("Status", {"ids": [info["id"]]})).fields
        require(found["vms"] == [], "Status shows it")
        await bench.refuses("RemoveVm", {"id": info["id"]})
        await bench.refuses("StopVm", {"id": info["id"]})


async def a_removal_is_asked_for_twice(bench: Bench) -> None:
    """While it is being removed 200, once it is gone 400."""
    async with bench.vm() as info:
        await bench.call("StopVm", {"id": info["id"]})
        await bench.until_ended(info["id"])
        status, value = await bench.call("RemoveVm", {"id": info["id"]})
        require((status, value) == (_OK, None), f"answered {status} {value!r}")
        again = await bench.call("RemoveVm", {"id": info["id"]})
        require(again.status in (_OK, 400), f"answered {again.status}")
        await bench.until(info["id"])


async def null_for_an_optional_field_is_none(bench: Bench) -> None:
    """app_id and gpus."""
    async with bench.vm(app_id=None, gpus=None) as info:
        require(info["configuration"]["gpus"] is None, "it has GPUs")


async def null_for_the_name_is_refused(bench: Bench) -> None:
    """It is a plain field."""
    await bench.refuses_vm(name=None)


async def a_text_for_a_number_is_refused(bench: Bench) -> None:
    """Also within a list of messages."""
    await bench.refuses_vm(memory="256")
    await bench.refuses_vm(ports=[{"protocol": "tcp", "host_port": "1", "vm_port": 1}])


async def a_negative_size_is_refused(bench: Bench) -> None:
    """And one that is no u32."""
    await bench.refuses_vm(memory=-1)
    await bench.refuses_vm(memory=2**32)


async def a_name_with_a_slash_is_refused(bench: Bench) -> None:
    """Names have an alphabet."""
    await bench.refuses_vm(name=f"{PREFIX}a/b")


async def an_image_that_is_not_there_is_refused(bench: Bench) -> None:
    """Also one that points elsewhere."""
    await bench.refuses_vm(image="no-such-image")
    await bench.refuses_vm(image=f"../{bench.image.name}")


async def a_compose_that_is_none_is_refused(bench: Bench) -> None:
    """Not JSON, or without manifest_version, name or runner."""
    await bench.refuses_vm(compose_file="{")
    await bench.refuses_vm(compose_file='{"manifest_version": 2, "name": "x"}')


async def gpus_without_a_mode_are_refused(bench: Bench) -> None:
    """An empty attach_mode is none: whoever wants no GPU leaves `gpus` out."""
    if not bench.can.refuses_disabled_gpus:
        raise Skipped(f"version {bench.can.version} drops GPUs where they are off")
    await bench.refuses_vm(gpus={"attach_mode": "", "gpus": []})


async def a_gpu_that_is_not_there_is_refused(bench: Bench) -> None:
    """Where GPUs are off."""
    if not bench.can.refuses_disabled_gpus:
        raise Skipped(f"version {bench.can.version} drops GPUs where they are off")
    if (await bench.call("ListGpus", {})).fields["gpus"]:
        raise Skipped("this VMM has GPUs")
    await bench.refuses_vm(gpus={"attach_mode": "listed", "gpus": [{"slot": "ff:00.0"}]})


async def a_taken_host_port_is_refused(bench: Bench) -> None:
    """At once since the head; before, it shows when the VM is started."""
    if not bench.can.refuses_taken_ports:
        raise Skipped(f"version {bench.can.version} finds out at the start")
    port = {"protocol": "tcp", "host_port": bench.port(), "vm_port": 10000, "host_address": ""}
    async with bench.vm(ports=[port]):
        await bench.refuses_vm(ports=[port])
    await bench.refuses_vm(ports=[port, port | {"vm_port": 10001}])


async def a_vm_starts_and_stops(bench: Bench) -> None:
    """running, then stopped; starting what runs is no error, and changes nothing."""
    _needs_start(bench)
    async with bench.vm() as info:
        vm = {"id": info["id"]}
        require((await bench.call("StartVm", vm)).status == _OK, "StartVm is refused")
        await bench.until(info["id"], "running")
        require((await bench.call("StartVm", vm)).status == _OK, "a second StartVm is refused")
        require((await bench.call("StopVm", vm)).status == _OK, "StopVm is refused")
        await bench.until(info["id"], "stopped")


async def a_started_vm_tells_its_progress(bench: Bench) -> None:
    """boot_progress is not empty, and uptime is told."""
    _needs_start(bench)
    async with bench.vm() as info:
        await bench.call("StartVm", {"id": info["id"]})
        await bench.until(info["id"], "running")
        shown = await bench.info(info["id"])
        require(bool(shown["boot_progress"]), "no boot_progress")
        require(isinstance(shown["uptime"], str) and bool(shown["uptime"]), f"uptime {shown['uptime']!r}")


async def a_running_vm_is_removed_as_its_version_does(bench: Bench) -> None:
    """Refused up to v0.5.6; since, it is stopped and removed in the background."""
    _needs_start(bench)
    async with bench.vm() as info:
        vm = {"id": info["id"]}
        await bench.call("StartVm", vm)
        await bench.until(info["id"], "running")
        if not bench.can.removes_later:
            await bench.refuses("RemoveVm", vm)
            return
        require((await bench.call("RemoveVm", vm)).status == _OK, "RemoveVm is refused")
        await bench.until(info["id"])


async def logs_end_after_as_many_lines(bench: Bench) -> None:
    """`lines` counts from the end."""
    _needs_start(bench)
    async with bench.vm() as info:
        await bench.call("StartVm", {"id": info["id"]})
        await bench.until(info["id"], "running")
        path = f"/logs?id={info['id']}&follow=false&ansi=false&lines=2&ch=serial"
        answer = await bench.wire.exchange("GET", path)
        require(answer.status == _OK, f"expected 200, got {answer.status}")
        require(len(answer.body.splitlines()) <= 2, "more lines than were asked for")  # noqa: PLR2004 - as asked


VM_CHECKS: tuple[Check, ...] = (
    a_vm_is_made_without_being_started,
    a_vm_shows_every_field,
    a_vm_is_made_of_what_was_sent,
    the_app_id_is_the_compose_hash,
    no_tee_is_kept_where_it_is_known,
    a_port_gets_its_host_address,
    a_vm_is_found_by_name_and_by_id,
    brief_leaves_the_configuration_out,
    pages_count_from_one,
    a_name_can_be_had_twice,
    stopping_a_stopped_vm_is_no_error,
    a_removed_vm_is_shown_nowhere,
    a_removal_is_asked_for_twice,
    null_for_an_optional_field_is_none,
    null_for_the_name_is_refused,
    a_text_for_a_number_is_refused,
    a_negative_size_is_refused,
    a_name_with_a_slash_is_refused,
    an_image_that_is_not_there_is_refused,
    a_compose_that_is_none_is_refused,
    gpus_without_a_mode_are_refused,
    a_gpu_that_is_not_there_is_refused,
    a_taken_host_port_is_refused,
    a_vm_starts_and_stops,
    a_started_vm_tells_its_progress,
    a_running_vm_is_removed_as_its_version_does,
    logs_end_after_as_many_lines,
)


def _needs_start(bench: Bench) -> None:
    if not bench.start:
        raise Skipped("it starts a VM: --start allows it")
