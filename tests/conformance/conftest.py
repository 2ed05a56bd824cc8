"""One running server a kind and run (the real local VMM, the double as each version); houses for a test."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from tests.conformance.house import House, MakeHouse, house
from tests.dstack_double import VERSIONS, DstackDouble, Running
from tests.dstack_double.server import IMAGE

from platform_vmm.rootfs import build_guest_image

LOCAL = {"local": "local-sandbox", "local-qemu": "local-qemu"}
"""Name to image of the local VMM."""
_GUEST_IMAGES = Path(__file__).resolve().parents[2] / ".cache" / "platform-vmm"
DOUBLES = {"head" if version == VERSIONS[-1] else f"v{version}": version for version in VERSIONS}
SERVERS = (*LOCAL, *DOUBLES)
TOKEN = "double-token"


def needs_of(name: str) -> list[pytest.MarkDecorator]:
    """What a server of this name needs of the machine: the double nothing."""
    programs = {"local": ("bwrap",), "local-qemu": ("bwrap", "qemu-system-x86_64", "mksquashfs")}
    return [pytest.mark.needs("root", *programs[name])] if name in programs else []


class Server(NamedTuple):
    """Where it is, and what its VMs are made of."""

    url: str
    token: str | None
    image: str


@pytest.fixture(scope="session")
def server_of(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Server]]:
    """Starts each server when it is first asked for."""
    with contextlib.ExitStack() as stack:
        running: dict[str, Server] = {}

        def get(name: str) -> Server:
            if name not in running:
                image = LOCAL.get(name)
                made = local_vmm(image) if image else double(name, tmp_path_factory.mktemp("double"))
                running[name] = stack.enter_context(made)
            return running[name]

        yield get


@contextlib.contextmanager
def double(name: str, folder: Path) -> Iterator[Server]:
    """Versions differ in where they listen as well: a Unix socket, or TCP."""
    version = DOUBLES[name]
    where = folder / "vmm.sock" if version in ("0.5.2", "0.5.7") else 0
    made = DstackDouble(version, token=TOKEN, bare_empty=version == "0.5.5")
    with Running(made, where).serving() as server:
        yield Server(server.url, TOKEN, IMAGE)


@contextlib.contextmanager
def local_vmm(image: str) -> Iterator[Server]:
    """`platform-vmm serve`, and one of its images."""
    with tempfile.TemporaryDirectory(prefix="pvmm-") as folder:
        state, path = Path(folder, "state"), Path(folder, "vmm.sock")
        if image == "local-qemu":
            build_guest_image(_GUEST_IMAGES)
            (state / "images").mkdir(parents=True)
            (state / "images" / "guest").symlink_to(_GUEST_IMAGES / "images" / "guest")
        program = str(Path(sys.executable).parent / "platform-vmm")
        with subprocess.Popen(
            [program, "serve", "--listen", f"unix:{path}", "--state-dir", str(state)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                deadline = time.monotonic() + 50
                while not path.exists():
                    assert process.poll() is None, "the VMM ended"
                    assert time.monotonic() < deadline, "the VMM does not listen"
                    time.sleep(0.05)
                yield Server(f"unix:{path}", (state / "token").read_text().strip(), image)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(20)


@pytest.fixture
def short_patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deadlines of minutes pass in tenths of a second."""
    monkeypatch.setattr("platform_validator.cvm.dstack.client._CREATE", 0.4)
    monkeypatch.setattr("platform_validator.cvm.dstack.wire.CALL", 5.0)
    monkeypatch.setattr("platform_validator.cvm.destroyer._PATIENCE", 0.4)


@pytest.fixture
def make(tmp_path: Path, short_patience: None) -> MakeHouse:
    """Makes a house with the double as a version."""

    @contextlib.asynccontextmanager
    async def made(version: str, **rules: Any) -> AsyncIterator[House]:
        async with house(tmp_path, version, **rules) as one:
            yield one

    return made
