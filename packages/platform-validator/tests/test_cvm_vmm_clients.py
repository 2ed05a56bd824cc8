"""Both VMM clients keep the port's promises, and the dstack one bears every version of dstack.

The dstack client talks to a real HTTP server on a Unix socket, which answers for the VMM in memory in the
words of a given dstack version.
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from platform_protocol.ids import VmId, VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.resources import Resources
from platform_validator.cvm.conformance import CASES, Case
from platform_validator.cvm.dstack import DstackVmm, refusal
from platform_validator.cvm.memory import IMAGE, MemoryVmm
from platform_validator.cvm.vmm import (
    VmmAtCapacity,
    VmmClient,
    VmmImage,
    VmmRefused,
    VmmUnauthorized,
    VmmUnavailable,
    VmNotFound,
    VmSpec,
    VmState,
)

SIZE = Resources(cpu_cores=1, memory_mb=256, disk_mb=1024)
_ports = itertools.count(30_000)


def a_spec(name: str = "a-vm") -> VmSpec:
    return VmSpec(
        name=VmName(name),
        image=IMAGE,
        compose=b"{}",
        user_config="{}",
        resources=SIZE,
        host_port=next(_ports),
        guest_port=10000,
        tee=False,
        simulated_tee=False,
    )


@dataclass
class Harness:
    client: VmmClient
    patience: float = 5.0
    has_tee: bool = False

    def spec(self, name: VmName) -> VmSpec:
        return a_spec(name)


@dataclass
class Dstack:
    """A VMM's HTTP side over the one in memory. `debug`: error texts as up to v0.5.5.

    `answers` replaces a method's whole answer: (status, body).
    """

    vmm: MemoryVmm
    version: str = "0.6.0"
    debug: bool = False
    empty: str = "null"
    token: str | None = None
    answers: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    requests: list[tuple[str, dict[str, str], Any]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.Response:
        method = request.path.removeprefix("/prpc/")
        body = json.loads(await request.read() or b"null")
        self.requests.append((method, dict(request.headers), body))
        if self.token is not None and request.headers.get("X-Admin-Token") != self.token:
            return web.Response(status=401)
        if request.path == "/logs":
            return await self.logs(request)
        if method in self.answers:
            status, data = self.answers[method]
            return web.Response(status=status, body=data)
        try:
            answer = await self.call(method, body)
        except VmmRefused as error:
            text = f"Failed to do it\n\nCaused by:\n    0: {error}" if self.debug else f"Failed: {error}"
            return web.json_response({"error": text}, status=400)
        return web.Response(text=self.empty if answer is None else json.dumps(answer))

    async def logs(self, request: web.Request) -> web.Response:
        try:
            return web.Response(text=await self.vmm.logs(VmId(request.query["id"]), 10))
        except VmNotFound:
            return web.Response(status=404, text="VM not found")

    async def call(self, method: str, body: dict[str, Any]) -> Any:
        answer: Any = None
        match method:
            case "Version":
                answer = {"version": self.version, "rev": "git:abc"}
            case "ListImages":
                [image] = (await self.vmm.facts()).images
                described = json.dumps({"isolation_level": image.level.value, "runtimes": image.runtimes})
                answer = {"images": [{"name": image.name, "description": described}]}
            case "CreateVm":
                answer = {"id": await self.vmm.create(_spec_of(body))}
            case "StopVm":
                await self.vmm.stop(body["id"])
            case "RemoveVm":
                await self.vmm.remove(body["id"])
            case "GetInfo":
                info = next((m for m in self.vmm.machines() if m.id == body["id"]), None)
                answer = {"found": info is not None, "info": None if info is None else _info(info)}
            case "Status":
                word = body.get("keyword", "")
                answer = {"vms": [_info(m) for m in self.vmm.machines() if word in m.spec.name]}
            case _:
                raise VmmRefused(f"Method not found: {method}")
        return answer


def _spec_of(body: dict[str, Any]) -> VmSpec:
    return VmSpec(
        name=VmName(body["name"]),
        image=body["image"],
        compose=body["compose_file"].encode(),
        user_config=body["user_config"],
        resources=Resources(
            cpu_cores=body["vcpu"], memory_mb=body["memory"], disk_mb=body["disk_size"] * 1024
        ),
        host_port=body["ports"][0]["host_port"],
        guest_port=body["ports"][0]["vm_port"],
        tee=not body["no_tee"],
        simulated_tee="simulated_tee" in body,
    )


def _info(machine: Any) -> dict[str, Any]:
    spec = machine.spec
    return {
        "id": machine.id,
        "name": spec.name,
        "status": machine.state.value,
        "boot_progress": machine.boot_progress,
        "boot_error": machine.boot_error,
        "instance_id": machine.instance,
        "configuration": {
            "vcpu": spec.resources.cpu_cores,
            "memory": spec.resources.memory_mb,
            "disk_size": spec.resources.disk_mb // 1024,
            "ports": [{"protocol": "tcp", "host_port": spec.host_port, "vm_port": spec.guest_port}],
            "gpus": None,
        },
    }


@pytest.fixture
async def memory() -> AsyncIterator[MemoryVmm]:
    async with MemoryVmm() as vmm:
        yield vmm


@contextlib.asynccontextmanager
async def serving(dstack: Dstack, folder: Path, **credentials: Any) -> AsyncIterator[DstackVmm]:
    """The client of a server on a Unix socket."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", dstack.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    path = folder / "vmm.sock"
    client = DstackVmm(f"unix:{path}", **credentials)
    try:
        await web.UnixSite(runner, str(path)).start()
        yield client
    finally:
        await client.close()
        await runner.cleanup()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_the_vmm_in_memory_conforms(case: Case, memory: MemoryVmm) -> None:
    """The shipped twin."""
    await case(Harness(memory))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
@pytest.mark.parametrize("words", ["head", "v0.5.6"])
async def test_the_dstack_client_conforms(case: Case, words: str, memory: MemoryVmm, tmp_path: Path) -> None:
    """With single-line errors and `null`, and with Debug texts and no body at all."""
    old = words != "head"
    dstack = Dstack(memory, version="0.5.6" if old else "0.6.0", debug=old, empty="" if old else "null")
    async with serving(dstack, tmp_path) as client:
        await case(Harness(client))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
async def test_a_vmm_that_listens_on_tcp_conforms(case: Case, memory: MemoryVmm) -> None:
    """Over http, as over a Unix socket."""
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", Dstack(memory).handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    client = DstackVmm(f"http://127.0.0.1:{port}/")
    try:
        await case(Harness(client))
    finally:
        await client.close()
        await runner.cleanup()


async def test_a_vm_below_tee_is_refused_on_a_vmm_that_would_start_a_tdx_one(
    memory: MemoryVmm, tmp_path: Path
) -> None:
    """Before v0.5.6 no_tee is ignored in silence: CreateVm is not even sent."""
    dstack = Dstack(memory, version="0.5.5")
    async with serving(dstack, tmp_path) as client:
        with pytest.raises(VmmRefused, match=r"0\.5\.6"):
            await client.create(a_spec())
    assert [method for method, _, _ in dstack.requests] == ["Version"]


@pytest.mark.parametrize("version", ["", "unknown", "0.5"])
async def test_a_vmm_that_does_not_tell_its_version_is_not_trusted_with_no_tee(
    version: str, memory: MemoryVmm, tmp_path: Path
) -> None:
    """What is unknown counts as old."""
    async with serving(Dstack(memory, version=version), tmp_path) as client:
        with pytest.raises(VmmRefused):
            await client.create(a_spec())


async def test_a_create_carries_what_dstack_wants(memory: MemoryVmm, tmp_path: Path) -> None:
    """Bytes as they are, disk in GB rounded up, `gpus` left out, simulated_tee only when asked for."""
    dstack = Dstack(memory)
    spec = replace(a_spec(), compose=b'{"a":  1}', resources=SIZE.model_copy(update={"disk_mb": 1025}))
    async with serving(dstack, tmp_path) as client:
        await client.create(replace(spec, simulated_tee=True))
    body = dstack.requests[-1][2]
    assert body["compose_file"] == '{"a":  1}'
    assert (body["disk_size"], body["no_tee"], body["simulated_tee"]) == (2, True, "dstack-tdx")
    assert "gpus" not in body
    assert body["ports"] == [
        {"protocol": "tcp", "host_port": spec.host_port, "vm_port": 10000, "host_address": "127.0.0.1"}
    ]


async def test_a_token_is_sent_in_both_forms_and_a_missing_one_is_named(
    memory: MemoryVmm, tmp_path: Path
) -> None:
    """Bearer and X-Admin-Token; without one the error says which setting."""
    dstack = Dstack(memory, token="t0ken")
    async with serving(dstack, tmp_path, token="t0ken") as client:
        await client.facts()
    headers = dstack.requests[0][1]
    assert (headers["Authorization"], headers["X-Admin-Token"]) == ("Bearer t0ken", "t0ken")
    (tmp_path / "vmm.sock").unlink(missing_ok=True)
    async with serving(dstack, tmp_path) as client:
        with pytest.raises(VmmUnauthorized, match="DSTACK_VMM_TOKEN"):
            await client.facts()


async def test_user_and_password_are_sent_as_basic(memory: MemoryVmm, tmp_path: Path) -> None:
    """Where there is no token."""
    dstack = Dstack(memory)
    async with serving(dstack, tmp_path, user="u", password="p") as client:
        await client.facts()
    assert dstack.requests[0][1]["Authorization"] == "Basic dTpw"


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>hello</html>"),
        (200, b'{"version":'),
        (200, b"[" * 100_000),
        (404, b'{"error":{"code":404}}'),
        (301, b""),
        (500, b'{"error":"panic"}'),
        (503, b""),
    ],
)
async def test_an_answer_that_is_not_the_vmm_s_means_unavailable(
    answer: tuple[int, bytes], memory: MemoryVmm, tmp_path: Path
) -> None:
    """Nothing is known about the effect: never a refusal."""
    dstack = Dstack(memory, answers={"Version": answer, "StopVm": answer})
    async with serving(dstack, tmp_path) as client:
        with pytest.raises(VmmUnavailable):
            await client.facts()
        with pytest.raises(VmmUnavailable):
            await client.stop(VmId("x"))


async def test_a_vmm_that_is_not_there_is_unavailable(tmp_path: Path) -> None:
    """And the message says where it was looked for."""
    client = DstackVmm(f"unix:{tmp_path}/nowhere.sock")
    with pytest.raises(VmmUnavailable, match=r"nowhere\.sock"):
        await client.facts()
    await client.close()


async def test_an_answer_over_the_limit_is_cut_off(
    memory: MemoryVmm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A VMM cannot fill our memory."""
    monkeypatch.setattr("platform_validator.cvm.dstack.wire.MAX_ANSWER", 1000)
    dstack = Dstack(memory, answers={"Status": (200, b" " * 5000)})
    async with serving(dstack, tmp_path) as client:
        with pytest.raises(VmmUnavailable, match="over 1000 bytes"):
            await client.list()


@pytest.mark.parametrize("answer", [b"null", b"", b"{}", b'{"id":""}', b'{"id":null}'])
async def test_a_create_without_an_id_may_have_been_done(
    answer: bytes, memory: MemoryVmm, tmp_path: Path
) -> None:
    """Unavailable: the caller looks for the name."""
    async with serving(Dstack(memory, answers={"CreateVm": (200, answer)}), tmp_path) as client:
        with pytest.raises(VmmUnavailable):
            await client.create(a_spec())


async def test_missing_null_and_unknown_fields_are_borne(memory: MemoryVmm, tmp_path: Path) -> None:
    """A brief answer, an older one, and one from the future."""
    infos: list[Any] = [
        {"id": "1", "name": "n", "status": "hibernating", "configuration": None, "future": 1},
        {"id": "2", "name": "n2"},
        {"id": "3", "name": "n3", "status": "running", "configuration": {"ports": [], "gpus": None}},
        "nonsense",
    ]
    answers = {"Status": (200, json.dumps({"vms": infos}).encode())}
    async with serving(Dstack(memory, answers=answers), tmp_path) as client:
        vms = await client.list()
    assert [(vm.id, vm.state, vm.address) for vm in vms] == [
        (VmId("1"), VmState.UNKNOWN, None),
        (VmId("2"), VmState.UNKNOWN, None),
        (VmId("3"), VmState.RUNNING, None),
    ]


async def test_an_image_without_our_description_is_dstack_s_own(memory: MemoryVmm, tmp_path: Path) -> None:
    """TDX; one whose level is unknown to us is believed nothing."""
    images = [
        {"name": "dstack-0.5.5", "description": '{"rootfs_hash":"ab"}', "version": "0.5.5"},
        {"name": "empty", "description": ""},
        {"name": "odd", "description": "[1]"},
        {"name": "future", "description": '{"isolation_level":"Quantum"}'},
        {"name": "local", "description": '{"isolation_level":"Container","runtimes":{"r":"sha256:1"}}'},
    ]
    answers = {"ListImages": (200, json.dumps({"images": images}).encode())}
    async with serving(Dstack(memory, answers=answers), tmp_path) as client:
        facts = await client.facts()
    assert facts.images == (
        VmmImage("dstack-0.5.5", IsolationLevel.TEE),
        VmmImage("empty", IsolationLevel.TEE),
        VmmImage("odd", IsolationLevel.TEE),
        VmmImage("future", IsolationLevel.NONE, local=True),
        VmmImage("local", IsolationLevel.CONTAINER, {"r": "sha256:1"}, local=True),
    )


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("Failed to start VM: VM not found: 123", VmNotFound),
        ("Failed to start VM\n\nCaused by:\n    0: VM not found: 123", VmNotFound),
        ("Failed to remove VM directory: No such file", VmNotFound),
        ("Failed to allocate: No CID available", VmmAtCapacity),
        ("Failed to create\n\nCaused by:\n    0: CID pool is exhausted", VmmAtCapacity),
        ("not enough memory", VmmAtCapacity),
        ("No space left on device (os error 28)", VmmAtCapacity),
        ("VM is running, stop it first", VmmRefused),
        ("", VmmRefused),
    ],
)
def test_refusals_are_told_apart_by_substrings(text: str, kind: type[VmmRefused]) -> None:
    """Both text forms; an unknown text is a refusal."""
    assert type(refusal("CreateVm", text)) is kind
