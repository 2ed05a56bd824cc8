"""From CreateVm to `/sdk/health` ready, for each image of the local VMM, beside the bare program behind it.

Beside `local-sandbox`: bare bubblewrap in which the same Python answers HTTP. Beside `local-qemu`: bare QEMU
with the same kernel, initrd and root filesystem, until the guest's user space runs. In turn, in one run. The
VMM is a process and is called by its API; the challenge is `examples/digits`, which the guest fetches.
"""

from __future__ import annotations

import argparse
import hashlib
import http.client
import http.server
import json
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from examples.demo.guest_image import offer_guest_image
from examples.demo.ports import free_ports
from examples.demo.processes import Processes, end_all
from examples.demo.unix_http import UnixConnection, answers
from examples.demo.vmm_part import VmmPart

from platform_protocol.bundle import TreeEntry, pack
from platform_protocol.compose import app_compose
from platform_protocol.spec import ChallengeSpec, parse_platform_toml
from platform_protocol.user_config import UserConfig
from platform_vmm.qemu.accelerator import last_answer
from platform_vmm.qemu.argv import PROGRAM
from platform_vmm.qemu.guest.machine import ALIVE, PROBE
from platform_vmm.rootfs.image import GuestImage, newest_image

ROOT = Path(__file__).resolve().parents[1]
CHALLENGE = ROOT / "examples" / "digits"
MEMORY_MB = 512
_PATIENCE = 300.0
_LOOK, _SHARE = 0.01, 0.02
"""Seconds between two looks: the least, and as a part of the time waited so far. A guest on an emulated
processor that is asked a hundred times a second takes a quarter longer; validators ask ten times and less."""
_IN_BWRAP = ["bwrap", "--unshare-all", "--share-net", "--die-with-parent", "--ro-bind", "/", "/"]
_IN_BWRAP += ["--proc", "/proc", "--dev", "/dev"]


class Vmm:
    """A running local VMM, and what a challenge's CVM needs around it."""

    def __init__(self, state: Path) -> None:
        self.part = VmmPart("vmm", "local", state, {})
        self.processes = Processes(state)
        self.bundle = pack(
            [
                TreeEntry(path.relative_to(CHALLENGE).as_posix(), path.read_bytes())
                for path in sorted(CHALLENGE.rglob("*"))
                if path.is_file() and not {"submissions", "__pycache__"} & set(path.parts)
            ]
        )
        self.sha256 = hashlib.sha256(self.bundle).hexdigest()
        self.spec: ChallengeSpec = parse_platform_toml((CHALLENGE / "platform.toml").read_bytes())
        self.server = _serve_bundle(self.bundle)
        self.runtimes: dict[str, str] = {}

    def start(self) -> None:
        """Start it, with both of its images."""
        offer_guest_image(self.part.state / self.part.name)
        self.part.start(self.processes, self.server.server_port)
        for image in self.call("ListImages")["images"]:
            told = json.loads(image["description"])
            self.runtimes[image["name"]] = f"platform-runtime@{told['runtimes']['platform-runtime']}"
            print(f"{image['name']}: {told['note']}", file=sys.stderr)

    def call(self, method: str, **arguments: Any) -> Any:
        """One call of its API."""
        connection = UnixConnection(self.part.socket)
        try:
            token = self.part.token_file.read_text().strip()
            headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
            connection.request("POST", f"/prpc/{method}?json", json.dumps(arguments), headers)
            answer = connection.getresponse()
            body = json.loads(answer.read())
            if answer.status != http.client.OK:
                raise SystemExit(f"{method}: {body}")
            return body
        finally:
            connection.close()

    def health_after(self, image: str) -> float:
        """Seconds from CreateVm until the SDK is ready; the VM is removed again."""
        (port,) = free_ports(1)
        name = f"pv-0123456789-{secrets.token_hex(16)}"
        config = UserConfig(
            vm=name,
            launch_secret=UserConfig.encode_secret(secrets.token_bytes(32)),
            validator_base_url=f"http://10.0.2.2:{self.server.server_port}",
            proxy_url=None,
            max_lifetime_s=3600,
            hard_lifetime_s=3600,
        )
        compose = app_compose(self.spec, bundle_sha256=self.sha256, runtime=self.runtimes[image])
        message = {
            "name": name,
            "image": image,
            "compose_file": compose.decode(),
            "user_config": config.model_dump_json(),
            "vcpu": 1,
            "memory": MEMORY_MB,
            "disk_size": 1,
            "no_tee": True,
            "ports": [{"protocol": "tcp", "host_port": port, "vm_port": 10_000}],
        }
        began = time.perf_counter()
        identity = self.call("CreateVm", **message)["id"]
        _until(lambda: _ready(port))
        took = time.perf_counter() - began
        self.call("RemoveVm", id=identity)
        _until(lambda: not self.call("GetInfo", id=identity)["found"])
        return took


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    runs: int = parser.parse_args().runs
    with tempfile.TemporaryDirectory(prefix="guest-start-") as folder:
        Path(folder).chmod(0o711)
        vmm = Vmm(Path(folder))
        try:
            vmm.start()
            image = newest_image(vmm.part.state / vmm.part.name)
            answer = last_answer(vmm.part.state / vmm.part.name / "images")
            kvm = answer is not None and answer.kvm
            measured: dict[str, Callable[[], float]] = {
                "local-sandbox": lambda: vmm.health_after("local-sandbox"),
                "bare bubblewrap": _bare_bubblewrap,
                "local-qemu": lambda: vmm.health_after("local-qemu"),
                "bare QEMU": lambda: _bare_qemu(image, kvm=kvm),
            }
            seconds: dict[str, list[float]] = {name: [] for name in measured}
            for _ in range(runs):
                for name, measure in measured.items():
                    seconds[name].append(measure())
        finally:
            vmm.processes.stop("vmm", 30)
            end_all(Path(folder))
            vmm.server.shutdown()
    print(f"{'CreateVm to /sdk/health':<28}{'p50 ms':>9}{'min':>9}{'max':>9}")
    for name, values in seconds.items():
        shown = (statistics.median(values), min(values), max(values))
        print(f"{name:<28}" + "".join(f"{value * 1000:>9.0f}" for value in shown))
    half = {name: statistics.median(values) for name, values in seconds.items()}
    report: dict[str, Any] = {"runs": runs}
    report |= {
        f"{name.replace(' ', '_').replace('-', '_').lower()}_s_p50": round(half[name], 3) for name in half
    }
    report["sandbox_ratio"] = round(half["local-sandbox"] / half["bare bubblewrap"], 2)
    report["qemu_ratio"] = round(half["local-qemu"] / half["bare QEMU"], 2)
    print(json.dumps(report))


def _bare_bubblewrap() -> float:
    """Until a Python in it, with nothing else around, answers HTTP."""
    (port,) = free_ports(1)
    words = [*_IN_BWRAP, sys.executable, "-I", "-m", "http.server", str(port), "--bind", "127.0.0.1"]
    began = time.perf_counter()
    with subprocess.Popen(
        words, cwd="/usr/share", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as one:
        _until(lambda: answers(f"http://127.0.0.1:{port}/"))
        took = time.perf_counter() - began
        one.kill()
    return took


def _bare_qemu(image: GuestImage, *, kvm: bool) -> float:
    """Until its user space says that it runs; the accelerator is the one that the VMM found."""
    words = [PROGRAM, "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-M", "q35"]
    words += ["-accel", "kvm", "-cpu", "host"] if kvm else ["-accel", "tcg", "-cpu", "max"]
    words += ["-m", str(MEMORY_MB), "-kernel", str(image.kernel), "-initrd", str(image.initrd)]
    words += ["-append", f"console=ttyS0 quiet panic=-1 {PROBE}", "-serial", "stdio"]
    words += ["-drive", f"if=virtio,file={image.root},format=raw,readonly=on"]
    began = time.perf_counter()
    with subprocess.Popen(
        words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as one:
        for line in one.stdout or ():
            if ALIVE in line:
                return time.perf_counter() - began
    raise SystemExit("bare QEMU: the guest did not come up")


def _ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", "/sdk/health")
        return bool(json.loads(connection.getresponse().read())["status"] == "ready")
    except (OSError, ValueError, KeyError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _until(condition: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not condition():
        waited = time.monotonic() - began
        if waited > _PATIENCE:
            raise SystemExit(f"not so after {_PATIENCE:g} s")
        time.sleep(max(_LOOK, _SHARE * waited))


def _serve_bundle(bundle: bytes) -> http.server.ThreadingHTTPServer:
    """The validator's listener for CVMs, as far as a boot needs it."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", str(len(bundle)))
            self.end_headers()
            self.wfile.write(bundle)

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    main()
