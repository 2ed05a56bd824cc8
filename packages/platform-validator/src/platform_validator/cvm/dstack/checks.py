"""What a VMM of dstack's API must do on its wire, whatever its version: methods, JSON rules and errors.

Nothing here makes a VM. `CHECKS` names them; each is documented by what it expects.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Awaitable, Callable

from platform_validator.cvm.dstack.bench import Bench, Skipped, require
from platform_validator.cvm.vmm import VmmUnauthorized

Check = Callable[[Bench], Awaitable[None]]
UNKNOWN = {"id": "99999999-9999-4999-8999-999999999999"}
_TOO_MUCH = 11 * 1024 * 1024
_OK, _NOT_FOUND = 200, 404


async def version_has_three_numbers(bench: Bench) -> None:
    """Version: `version` with three numbers, and `rev`."""
    told = (await bench.call("Version", {})).fields
    require(bool(re.search(r"\d+\.\d+\.\d+", str(told.get("version")))), f"version {told.get('version')!r}")
    require(isinstance(told.get("rev"), str), "no rev")


async def answers_are_json(bench: Bench) -> None:
    """With `?json` the answer's type is application/json, and X-App-Version names the version."""
    answer = await bench.wire.exchange("POST", "/prpc/Version?json", b"{}")
    require(answer.headers.get("Content-Type", "").startswith("application/json"), f"{answer.headers}")
    told = (await bench.call("Version", {})).fields["version"]
    require(told in answer.headers.get("X-App-Version", ""), "X-App-Version has another version")


async def a_get_is_answered_in_json(bench: Bench) -> None:
    """GET /prpc/Version is the same as POST."""
    answer = await bench.wire.exchange("GET", "/prpc/Version")
    require(answer.status == _OK, f"expected 200, got {answer.status}")
    require("version" in json.loads(answer.body), "no version")


async def a_get_takes_its_message_from_the_query(bench: Bench) -> None:
    """GET /prpc/GetInfo?id=…."""
    answer = await bench.wire.exchange("GET", f"/prpc/GetInfo?id={UNKNOWN['id']}")
    require(answer.status == _OK, f"expected 200, got {answer.status}")
    require(json.loads(answer.body).get("found") is False, "it finds a VM that nobody made")


async def the_historic_prefix_is_trimmed(bench: Bench) -> None:
    """Teepod.Version is Version."""
    require("version" in (await bench.call("Teepod.Version", {})).fields, "no version")


async def another_prefix_is_no_method(bench: Bench) -> None:
    """Vmm.Version is none."""
    answer = await bench.wire.exchange("POST", "/prpc/Vmm.Version?json", b"{}")
    require(answer.status != _OK, "Vmm.Version is answered")


async def an_unknown_method_is_refused(bench: Bench) -> None:
    """400 and a text."""
    await bench.refuses("NoSuchMethod", {})


async def an_unknown_path_is_not_found(bench: Bench) -> None:
    """404."""
    answer = await bench.wire.exchange("POST", "/no/such/path", b"{}")
    require(answer.status == _NOT_FOUND, f"expected 404, got {answer.status}")


async def a_method_without_input_ignores_its_body(bench: Bench) -> None:
    """Version with half an object is answered."""
    require("version" in (await bench.call("Version", b'{"x":')).fields, "no version")


async def a_cut_message_is_refused(bench: Bench) -> None:
    """400."""
    await bench.refuses("GetInfo", b'{"id":')


async def a_wrong_type_is_refused(bench: Bench) -> None:
    """A number for a text: 400."""
    await bench.refuses("GetInfo", {"id": 5})


async def null_for_a_plain_field_is_refused(bench: Bench) -> None:
    """Only optional fields take null."""
    await bench.refuses("GetInfo", {"id": None})


async def a_list_for_a_message_is_refused(bench: Bench) -> None:
    """400."""
    await bench.refuses("GetInfo", b"[]")


async def an_unknown_field_is_ignored(bench: Bench) -> None:
    """As clients newer than the VMM send them."""
    found = (await bench.call("GetInfo", UNKNOWN | {"future": {"a": [1]}})).fields
    require(found.get("found") is False, "it finds a VM that nobody made")


async def a_missing_field_has_its_default(bench: Bench) -> None:
    """GetInfo without an id finds nothing."""
    require((await bench.call("GetInfo", {})).fields.get("found") is False, "it finds a VM without an id")


async def a_message_over_ten_mebibytes_is_refused(bench: Bench) -> None:
    """400, and the connection bears it."""
    await bench.refuses("GetInfo", json.dumps(UNKNOWN | {"future": "x" * _TOO_MUCH}).encode())


async def status_lists_with_a_total(bench: Bench) -> None:
    """`vms`, `total`, `port_mapping_enabled`."""
    found = (await bench.call("Status", {})).fields
    require(isinstance(found.get("vms"), list), "vms is no list")
    require(found.get("total") == len(found["vms"]), f"total {found.get('total')} of {len(found['vms'])}")
    require(isinstance(found.get("port_mapping_enabled"), bool), "no port_mapping_enabled")


async def status_of_an_unknown_word_is_empty(bench: Bench) -> None:
    """`keyword` filters."""
    found = (await bench.call("Status", {"keyword": UNKNOWN["id"]})).fields
    require((found["vms"], found["total"]) == ([], 0), f"it shows {found['total']} VMs")


async def info_of_an_unknown_vm_is_not_found(bench: Bench) -> None:
    """200, `found` false, `info` null: no error."""
    found = (await bench.call("GetInfo", UNKNOWN)).fields
    require(found == {"found": False, "info": None}, f"got {str(found)[:200]}")


async def stopping_an_unknown_vm_is_refused(bench: Bench) -> None:
    """400."""
    await bench.refuses("StopVm", UNKNOWN)


async def starting_an_unknown_vm_is_refused(bench: Bench) -> None:
    """400."""
    await bench.refuses("StartVm", UNKNOWN)


async def shutting_an_unknown_vm_down_is_refused(bench: Bench) -> None:
    """400."""
    await bench.refuses("ShutdownVm", UNKNOWN)


async def removing_an_unknown_vm_is_refused(bench: Bench) -> None:
    """400, in words that tell it from other refusals."""
    text = (await bench.refuses("RemoveVm", UNKNOWN)).lower()
    require("not found" in text or "failed to remove vm directory" in text, f"it says {text[:200]!r}")


async def images_have_name_and_description(bench: Bench) -> None:
    """ListImages: `description` is JSON in a text."""
    images = (await bench.call("ListImages", {})).fields["images"]
    for image in images:
        require(isinstance(json.loads(image["description"]), dict), f"{image['name']}: no object")
        require(isinstance(image["version"], str) and isinstance(image["is_dev"], bool), f"{image}")


async def meta_has_kms_gateway_and_resources(bench: Bench) -> None:
    """GetMeta."""
    meta = (await bench.call("GetMeta", {})).fields
    require({"kms", "gateway", "resources"} <= meta.keys(), f"it has {sorted(meta)}")
    wanted = {"max_cvm_number", "max_allocable_vcpu", "max_allocable_memory_in_mb"}
    require(wanted <= meta["resources"].keys(), f"resources has {sorted(meta['resources'])}")


async def gpus_are_a_list(bench: Bench) -> None:
    """ListGpus; empty where GPUs are off."""
    gpus = (await bench.call("ListGpus", {})).fields["gpus"]
    require(isinstance(gpus, list), f"it is {gpus!r}")
    for gpu in gpus:
        require(isinstance(gpu["slot"], str) and isinstance(gpu["is_free"], bool), f"{gpu}")


async def the_compose_hash_is_of_the_bytes_as_sent(bench: Bench) -> None:
    """GetComposeHash: SHA-256, no canonical form."""
    compose = ' {"runner": "docker-compose",  "name": "ü", "manifest_version": 2}\n'
    found = (await bench.call("GetComposeHash", {"compose_file": compose})).fields
    require(found["hash"] == hashlib.sha256(compose.encode()).hexdigest(), f"it says {found['hash']}")


async def a_compose_without_a_name_has_no_hash(bench: Bench) -> None:
    """400: it must be an app-compose."""
    await bench.refuses("GetComposeHash", {"compose_file": '{"manifest_version": 2, "runner": "bash"}'})


async def logs_of_an_unknown_vm_are_told(bench: Bench) -> None:
    """404 since the head; before, 200 with an error as its text."""
    answer = await bench.wire.exchange("GET", f"/logs?id={UNKNOWN['id']}&follow=false&ansi=false&ch=serial")
    expected = _NOT_FOUND if bench.can.guards else _OK
    require(answer.status == expected, f"expected {expected}, got {answer.status}")
    require(bool(answer.body), "without a word")


async def without_credentials_nothing_is_answered(bench: Bench) -> None:
    """401 with WWW-Authenticate on every path, since the head."""
    if not (bench.can.guards and bench.credentials):
        raise Skipped(
            "up to v0.5.11 calls are never guarded" if bench.credentials else "no credentials given"
        )
    for path in ("/prpc/Version?json", "/prpc/CreateVm?json", "/logs"):
        try:
            answer = await bench.anonymous.exchange("POST" if "prpc" in path else "GET", path, b"{}")
        except VmmUnauthorized:
            continue
        require(False, f"{path} is answered with {answer.status} without credentials")


CHECKS: tuple[Check, ...] = (
    version_has_three_numbers,
    answers_are_json,
    a_get_is_answered_in_json,
    a_get_takes_its_message_from_the_query,
    the_historic_prefix_is_trimmed,
    another_prefix_is_no_method,
    an_unknown_method_is_refused,
    an_unknown_path_is_not_found,
    a_method_without_input_ignores_its_body,
    a_cut_message_is_refused,
    a_wrong_type_is_refused,
    null_for_a_plain_field_is_refused,
    a_list_for_a_message_is_refused,
    an_unknown_field_is_ignored,
    a_missing_field_has_its_default,
    a_message_over_ten_mebibytes_is_refused,
    status_lists_with_a_total,
    status_of_an_unknown_word_is_empty,
    info_of_an_unknown_vm_is_not_found,
    stopping_an_unknown_vm_is_refused,
    starting_an_unknown_vm_is_refused,
    shutting_an_unknown_vm_down_is_refused,
    removing_an_unknown_vm_is_refused,
    images_have_name_and_description,
    meta_has_kms_gateway_and_resources,
    gpus_are_a_list,
    the_compose_hash_is_of_the_bytes_as_sent,
    a_compose_without_a_name_has_no_hash,
    logs_of_an_unknown_vm_are_told,
    without_credentials_nothing_is_answered,
)
