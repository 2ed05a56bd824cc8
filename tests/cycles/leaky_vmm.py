"""A VMM that leaves something of each kind with every sandbox that it destroys: what the count must see.

Run as `python tests/cycles/leaky_vmm.py KIND[,KIND…] serve …`.
"""

from __future__ import annotations

import ctypes
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from platform_vmm.cli import main
from platform_vmm.sandbox.driver import Sandbox

_MEMORY = 512 * 1024
_held: list[object] = []


def process() -> None:
    """One that nobody waits for."""
    subprocess.Popen(["sleep", "600"], start_new_session=True)


def mount() -> None:
    """A tmpfs on a folder that was there already."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"tmpfs", b"/mnt", b"tmpfs", 0, b"size=4k"):
        raise OSError(ctypes.get_errno(), "mount")


def namespace() -> None:
    """A network namespace with nobody in it, held by a descriptor of a process that lives on."""
    script = "import ctypes, time; ctypes.CDLL(None).unshare(0x40000000); time.sleep(600)"
    _held.append(subprocess.Popen([sys.executable, "-c", script], start_new_session=True))


def cgroup() -> None:
    """An empty group beside the sandboxes'."""
    name = f"platform-vmm-{Path(sys.argv[-1], 'id').read_text()}"
    bases = [Path(folder) for folder, _, _ in os.walk("/sys/fs/cgroup") if Path(folder).name == name]
    (bases[0] / f"left-{os.urandom(4).hex()}").mkdir()


def file() -> None:
    """In the folder for temporary files."""
    os.close(tempfile.mkstemp()[0])


def port() -> None:
    """A listening socket."""
    _held.append(socket.create_server(("127.0.0.1", 0)))


def descriptor() -> None:
    """An open file that many have open."""
    _held.append(os.open("/dev/null", os.O_RDONLY))


def memory() -> None:
    """Half a mebibyte that is never freed."""
    _held.append(bytearray(os.urandom(1)) * _MEMORY)


LEAKS: dict[str, Callable[[], None]] = {
    "processes": process,
    "mounts": mount,
    "namespaces": namespace,
    "cgroups": cgroup,
    "files": file,
    "ports": port,
    "descriptors": descriptor,
    "memory": memory,
}


def leaking(kinds: list[str]) -> None:
    """From now on every sandbox's end leaves these."""
    destroy = Sandbox.destroy

    async def leave(self: Sandbox) -> None:
        await destroy(self)
        for kind in kinds:
            LEAKS[kind]()

    Sandbox.destroy = leave  # type: ignore[method-assign] # the fault that is planted


if __name__ == "__main__":
    leaking(sys.argv.pop(1).split(","))
    main()
