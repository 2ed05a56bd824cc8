"""`platform-vmm serve` as a process: its API over HTTP, its token, its lock, kill -9 and SIGTERM."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import dcap_qvl
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from guests import until

from platform_vmm.images import Runtime
from platform_vmm.machines import guest_uids
from platform_vmm.rootfs import GuestImage
from platform_vmm.simulation.pki import load_pki
from platform_vmm.simulation.quote import Measurements, make_quote

pytestmark = [
    pytest.mark.needs("root"),
    pytest.mark.slow,  # each starts real VMM processes, some of them several times
]


@dataclass
class Served:
    """A running `platform-vmm serve`, and a client of it."""

    process: asyncio.subprocess.Process
    state: Path
    http: aiohttp.ClientSession

    async def call(self, method: str, body: object = None, **options: Any) -> tuple[int, Any]:
        """(HTTP status, JSON answer)."""
        options.setdefault("headers", {"X-Admin-Token": (self.state / "token").read_text()})
        data = body if isinstance(body, bytes) else json.dumps(body or {}).encode()
        async with self.http.post(f"http://vmm/prpc/{method}?json", data=data, **options) as response:
            text = await response.text()
            return response.status, json.loads(text) if text else None

    async def create(self, *command: str, **more: Any) -> str:
        """A VM that runs a command."""
        _, answer = await self.call("ListImages")
        told = {image["name"]: json.loads(image["description"]) for image in answer["images"]}
        digest = told[more.get("image", "local-sandbox")]["runtimes"]["platform-runtime"]
        image = f"platform-runtime@{digest}"
        service = json.dumps({"services": {"one": {"image": image, "command": list(command)}}})
        compose = {"manifest_version": 2, "name": "t", "runner": "docker-compose"}
        message = {"name": "t", "image": "local-sandbox", "vcpu": 1, "memory": 128, "disk_size": 1} | more
        message |= {"compose_file": json.dumps(compose | {"docker_compose_file": service}), "no_tee": True}
        status, answer = await self.call("CreateVm", message)
        assert status == 200, answer
        return str(answer["id"])

    async def info(self, identity: str, **wanted: object) -> dict[str, Any]:
        """GetInfo, once it shows what is wanted."""
        async with asyncio.timeout(20):
            while True:
                _, answer = await self.call("GetInfo", {"id": identity})
                found: dict[str, Any] = {"found": answer["found"]} | (answer["info"] or {})
                if all(found.get(key) == value for key, value in wanted.items()):
                    return found
                await asyncio.sleep(0.02)

    async def end(self, number: int) -> int:
        """Send a signal and wait for its end."""
        self.process.send_signal(number)
        async with asyncio.timeout(20):
            return await self.process.wait()


@pytest.fixture
def serve(tmp_path: Path, image_state: Path, runtime: Runtime) -> Any:
    """Starts it for an `async with`, in this test's state directory; the image is not built again."""
    state = tmp_path / "state"
    state.mkdir()
    subprocess.run(["cp", "-al", str(image_state / "images"), str(state / "images")], check=True)

    @contextlib.asynccontextmanager
    async def start(port: int | None = None) -> AsyncIterator[Served]:
        path = tmp_path / "s"
        path.unlink(missing_ok=True)
        listen = f"unix:{path}" if port is None else f"127.0.0.1:{port}"
        command = [sys.executable, "-m", "platform_vmm", "serve", "--listen", listen]
        process = await asyncio.create_subprocess_exec(
            *command, "--state-dir", str(state), stderr=asyncio.subprocess.DEVNULL
        )
        connector = aiohttp.UnixConnector(str(path))
        async with aiohttp.ClientSession(connector=connector) as http:
            served = Served(process, state, http)
            try:
                await until(lambda: process.returncode is not None or _accepts(port, path))
                yield served
            finally:
                if process.returncode is None:
                    await served.end(signal.SIGTERM)

    return start


def _accepts(port: int | None, path: Path) -> bool:
    family = socket.AF_UNIX if port is None else socket.AF_INET
    with contextlib.suppress(OSError), socket.socket(family) as one:
        one.connect(str(path) if port is None else ("127.0.0.1", port))
        return True
    return False


def _basic(pair: str) -> str:
    return f"Basic {base64.b64encode(pair.encode()).decode()}"


def _groups(state: Path) -> list[Path]:
    name = (state / "id").read_text()
    return [path for path in Path("/sys/fs/cgroup").glob(f"**/platform-vmm-{name}*") if path.is_dir()]


def _processes(state: Path) -> list[int]:
    """The guests' and the stages', found by the uids of this VMM."""
    uids = guest_uids(state)
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and entry.stat().st_uid in uids:
                found.append(int(entry.name))
    return found


def _emulators(state: Path) -> list[int]:
    """Those of them that are QEMU."""
    found = []
    for pid in _processes(state):
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("qemu-system"):
                found.append(pid)
    return found


async def test_a_vm_is_created_runs_and_is_removed_over_the_api(serve: Any) -> None:
    """Create, done, logs, stop, remove: then it is not found, and SIGTERM leaves nothing."""
    async with serve() as vmm:
        identity = await vmm.create("sh", "-c", "printf '\\033[1mhello\\033[0m\\n'; exec sleep 600")
        found = await vmm.info(identity, status="running", boot_progress="done")
        assert found["configuration"]["ports"] == []
        assert found["instance_id"]
        console = vmm.state / "vms" / identity / "serial.log"
        await until(lambda: "hello" in console.read_text())
        token = (vmm.state / "token").read_text()
        for ansi, expected in (("false", "hello\n"), ("true", "\x1b[1mhello\x1b[0m\n")):
            query = {"id": identity, "follow": "false", "ansi": ansi, "lines": "1", "token": token}
            async with vmm.http.get("http://vmm/logs", params=query) as response:
                assert await response.text() == expected
        query = {"id": identity, "follow": "true", "ansi": "false", "token": token}
        async with vmm.http.get("http://vmm/logs", params=query) as response:
            assert b"boot @" in await response.content.readline()
            assert await response.content.readline() == b"hello\n"
        assert await vmm.call("StopVm", {"id": identity}) == (200, None)
        await vmm.info(identity, status="stopped")
        assert await vmm.call("RemoveVm", {"id": identity}) == (200, None)
        await vmm.info(identity, found=False)
        assert await vmm.call("RemoveVm", {"id": identity}) == (400, {"error": f"VM not found: {identity}"})
        await vmm.create("sleep", "600")
        assert await vmm.end(signal.SIGTERM) == 0
        await until(lambda: _processes(vmm.state) == [])
        assert _groups(vmm.state) == []
        assert not (vmm.state.parent / "s").exists()


@pytest.mark.parametrize("way", ["header", "bearer", "basic", "basic user", "query"])
async def test_the_token_opens_every_way_that_dstack_knows(serve: Any, way: str) -> None:
    """X-Admin-Token, Bearer, Basic with it as password or as user, and ?token= on GET."""
    async with serve() as vmm:
        token = (vmm.state / "token").read_text()
        assert (vmm.state / "token").stat().st_mode & 0o777 == 0o600
        headers = {
            "header": {"X-Admin-Token": token},
            "bearer": {"Authorization": f"Bearer {token}"},
            "basic": {"Authorization": _basic(f"x:{token}")},
            "basic user": {"Authorization": _basic(f"{token}:")},
            "query": {},
        }[way]
        query = {"token": token} if way == "query" else {}
        async with vmm.http.get("http://vmm/prpc/Version", headers=headers, params=query) as response:
            assert (await response.json())["version"] == "0.6.0-local"
            assert "local" in response.headers["X-App-Version"]


@pytest.mark.parametrize("path", ["prpc/Status", "logs?id=x", "pccs/sgx/certification/v4/rootcacrl", "", "x"])
async def test_without_the_token_everything_is_401(serve: Any, path: str) -> None:
    """Also what is not there: nothing is told to who has no token."""
    async with serve() as vmm:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic %%%"}):
            async with vmm.http.get(f"http://vmm/{path}", headers=headers) as response:
                assert response.status == 401
                assert response.headers["WWW-Authenticate"] == 'Basic realm="dstack-vmm API"'
                assert await response.read() == b""


async def test_messages_are_read_by_dstacks_json_rules(serve: Any) -> None:
    """Unknown fields are ignored, wrong types and broken JSON are 400, Empty inputs are not read at all."""
    async with serve() as vmm:
        status, answer = await vmm.call("Status", {"page": 1, "page_size": 1, "swap_size": 3})
        assert (status, answer) == (200, {"vms": [], "port_mapping_enabled": True, "total": 0})
        for body in (b"{", b"[]", b'{"page": -1}', b'{"ids": null}', b"[" * 100_000):
            status, answer = await vmm.call("Status", body)
            assert (status, list(answer)) == (400, ["error"])
        assert (await vmm.call("Version", b"{"))[0] == 200
        assert (await vmm.call("Teepod.Version"))[0] == 200
        assert (await vmm.call("Vmm.CreateVm"))[0] == 400
        assert (await vmm.call("GetInfo", {"id": "nobody"})) == (200, {"found": False, "info": None})
        images = (await vmm.call("ListImages"))[1]["images"]
        description = json.loads(images[0]["description"])
        assert images[0]["name"] == "local-sandbox"
        assert description["isolation_level"] == "Container"
        assert description["guest_ports"]
        digest = description["runtimes"]["platform-runtime"].removeprefix("sha256:")
        assert (vmm.state / "images" / digest).is_dir()
        assert (await vmm.call("ListGpus"))[1] == {"gpus": [], "allow_attach_all": False}
        assert (await vmm.call("GetMeta"))[1]["networking"]["default_mode"] == "user"


async def test_after_kill_9_nothing_lives_and_the_next_start_brings_back_what_was_started(
    serve: Any,
) -> None:
    """Guests die with their VMM; started VMs come back, stopped ones stay stopped, removed ones go."""
    async with serve() as vmm:
        kept = await vmm.create("sleep", "600", name="kept")
        halted = await vmm.create("sleep", "600", name="halted", stopped=True)
        await vmm.info(kept, boot_progress="done")
        assert _processes(vmm.state)
        await vmm.end(signal.SIGKILL)
        await until(lambda: not _processes(vmm.state))
        half = vmm.state / "vms" / "0-half-made"
        half.mkdir()
    async with serve() as vmm:
        found = await vmm.info(kept, boot_progress="done", status="running")
        assert found["name"] == "kept"
        assert (await vmm.info(halted))["status"] == "stopped"
        assert not half.exists()
        await vmm.call("RemoveVm", {"id": kept})
        await vmm.end(signal.SIGKILL)
    async with serve() as vmm:
        await vmm.info(kept, found=False)
        await vmm.call("RemoveVm", {"id": halted})
        await vmm.info(halted, found=False)
        await vmm.end(signal.SIGTERM)
        await until(lambda: _processes(vmm.state) == [])
        assert _groups(vmm.state) == []
        assert list((vmm.state / "vms").iterdir()) == []


@pytest.mark.needs("qemu-system-x86_64", "mksquashfs")
async def test_kill_9_ends_virtual_machines_too_and_the_next_start_brings_them_back(
    serve: Any, tmp_path: Path, guest_image: GuestImage
) -> None:
    """QEMU dies with its VMM, also in the middle of a boot, and is there again after the next start."""
    (tmp_path / "state" / "images" / "guest").symlink_to(guest_image.path.parent)
    async with serve() as vmm:
        identity = await vmm.create("sleep", "600", image="local-qemu")
        await until(lambda: _emulators(vmm.state), timeout=60)
        await vmm.end(signal.SIGKILL)
        await until(lambda: not _processes(vmm.state), timeout=60)
    async with serve() as vmm:
        await until(lambda: _emulators(vmm.state), timeout=60)
        assert (await vmm.info(identity))["status"] == "running"
        await vmm.call("RemoveVm", {"id": identity})
        await vmm.info(identity, found=False)
        assert _processes(vmm.state) == []
        await vmm.end(signal.SIGTERM)
        assert _groups(vmm.state) == []
        assert list((vmm.state / "vms").iterdir()) == []


async def test_a_second_vmm_on_one_state_directory_is_refused_and_harms_nothing(
    serve: Any, tmp_path: Path
) -> None:
    """Exit 2 with the reason; the first keeps its socket and its guests."""
    async with serve() as vmm:
        identity = await vmm.create("sleep", "600")
        await vmm.info(identity, boot_progress="done")
        command = [sys.executable, "-m", "platform_vmm", "serve", "--listen", f"unix:{tmp_path / 's'}"]
        second = await asyncio.to_thread(
            subprocess.run,
            [*command, "--state-dir", str(vmm.state)],
            capture_output=True,
            text=True,
            check=False,
            env=os.environ | {"COLUMNS": "200"},
        )
        assert second.returncode == 2
        assert "another platform-vmm uses" in second.stderr
        assert (await vmm.info(identity))["status"] == "running"


async def test_dcap_qvl_fetches_the_collateral_with_the_token_in_its_url(serve: Any, free_port: int) -> None:
    """`http://x:TOKEN@host/pccs`: a client that knows no header can still verify; without it, it cannot."""
    async with serve(free_port) as vmm:
        pki = load_pki(vmm.state)
        raw = make_quote(pki, Measurements(bytes(48), (bytes(48),) * 4, bytes(48)), b"nonce")
        token = (vmm.state / "token").read_text()
        found = await dcap_qvl.get_collateral(f"http://x:{token}@127.0.0.1:{free_port}/pccs", raw)
        root = pki.root.public_bytes(Encoding.DER)
        assert dcap_qvl.verify_with_root_ca(raw, found, root, int(time.time())).status == "UpToDate"
        with pytest.raises(ValueError, match="401"):
            await dcap_qvl.get_collateral(f"http://127.0.0.1:{free_port}/pccs", raw)


async def test_after_kill_9_in_the_middle_of_boots_nothing_lives(serve: Any) -> None:
    """At moments spread over a boot, also before the guest's first process exists."""
    for wait in range(6):
        async with serve() as vmm:
            made = [await vmm.create("sleep", "600") for _ in range(3)]
            await asyncio.sleep(wait * 0.02)  # no event marks these moments
            await vmm.end(signal.SIGKILL)
            await until(lambda: not _processes(vmm.state))
            for identity in made:
                shutil.rmtree(vmm.state / "vms" / identity)
    async with serve() as vmm:
        await vmm.end(signal.SIGTERM)
        assert _groups(vmm.state) == []


async def test_what_a_running_guest_uses_is_told_as_its_guest_agent_would(serve: Any, free_port: int) -> None:
    """It burns CPU, holds memory, fills its disk and is sent bytes: all of it shows, and no more."""
    script = """
import socket, time
end = time.process_time() + 0.3
while time.process_time() < end: pass
held = bytearray(b'x') * 2**25
open('/tmp/file', 'wb').write(bytes(2**23))
listener = socket.create_server(('0.0.0.0', 10000))
peer, _ = listener.accept()
for _ in range(100): peer.sendall(peer.recv(1000, socket.MSG_WAITALL))
print('echoed', flush=True)
time.sleep(600)
"""
    ports = [{"protocol": "tcp", "host_port": free_port, "vm_port": 10000}]
    async with serve() as vmm:
        identity = await vmm.create("python3", "-I", "-c", script, ports=ports, memory=256)
        token = {"X-Admin-Token": (vmm.state / "token").read_text()}

        async def ask(method: str) -> tuple[int, Any]:
            url = f"http://vmm/guest/{method}?json"
            async with vmm.http.post(url, json={"id": identity}, headers=token) as response:
                return response.status, await response.json()

        await vmm.info(identity, status="running", boot_progress="done")
        await _echo(free_port)
        console = vmm.state / "vms" / identity / "serial.log"
        await until(lambda: "echoed" in console.read_text())
        status, system = await ask("SysInfo")
        assert status == 200
        [disk] = system["disks"]
        assert 2**23 <= disk["total_size"] - disk["free_size"] < 2**24
        assert disk["total_size"] == 2**30
        used, local = system["used_memory"], system["platform_vmm"]
        assert 2**25 < used <= local["memory_peak_bytes"] < 2**28
        assert 300 <= local["cpu_time_ms"] < 60_000
        _, network = await ask("NetworkInfo")
        [interface] = network["interfaces"]
        assert (interface["rx_bytes"], interface["tx_bytes"]) == (100_000, 100_000)
        assert await ask("Shutdown") == (400, {"error": "Method not found: Shutdown"})
        await vmm.call("StopVm", {"id": identity})
        await vmm.info(identity, status="stopped")
        unreachable = {"error": "guest agent is unreachable: VM is not running"}
        assert await ask("SysInfo") == (400, unreachable)
        async with vmm.http.post("http://vmm/guest/SysInfo?json", json={"id": identity}) as response:
            assert response.status == 401


async def _echo(port: int) -> None:
    """Send 100 kB and read them back, once somebody listens."""
    async with asyncio.timeout(30):
        while True:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                for _ in range(100):
                    writer.write(bytes(1000))
                    await reader.readexactly(1000)
            except (asyncio.IncompleteReadError, ConnectionError):
                await asyncio.sleep(0.05)
            else:
                return
            finally:
                writer.close()
