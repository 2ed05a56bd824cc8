"""Environments that differ in whether namespaces nest there, and a process in each that plays the SDK.

`docker`: a container with Docker's limits. `unmasked` and `nesting`: the same with `seccomp=unconfined`, and
with `systempaths=unconfined` as well. `user`: an ordinary user under Docker's system call filter;
`nesting user`: one where neither is in the way.
Programs are handed to it; it answers how they ended and what it found afterwards.
"""
# ruff: noqa: E501 - a line of that process's program stays one line

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import platform_challenge_sdk
import platform_protocol

SDK = """
import json, os, socket, subprocess, sys, threading
from pathlib import Path
from platform_challenge_sdk.containment import Containment
from platform_challenge_sdk.contained import MIB, Order, run_contained
from platform_challenge_sdk.errors import ContainmentUnavailable
from platform_challenge_sdk import landlock, room
from platform_challenge_sdk.trial import containment

# Other houses have other uids: the kernel counts processes of a uid over all of them.
room._FIRST_UID, room._UIDS = int(os.environ["UIDS"]), 50

CANARY = "canary"[::-1][::-1]
Path("/tmp/user-config").write_text("canary")
Path("/tmp/victim").write_text("whole")
os.chmod("/tmp/victim", 0o666)
for number, kind in enumerate((socket.SOCK_STREAM, socket.SOCK_DGRAM)):
    agent = socket.socket(socket.AF_UNIX, kind)
    agent.bind(f"/tmp/agent{number}")
    os.chmod(f"/tmp/agent{number}", 0o777)
    if kind == socket.SOCK_STREAM: agent.listen()
    globals()[f"keep{number}"] = agent
    agent.setblocking(False)
tcp = socket.create_server(("127.0.0.1", 0))
folder = Path("/tmp/private/submission")
folder.parent.mkdir(mode=0o700)
folder.mkdir()
KNOWN = set(os.listdir("/tmp"))

def processes():
    return {name for name in os.listdir("/proc") if name.isdigit()}

def run(program, options, place):
    place.mkdir(exist_ok=True)
    (place / "main.py").write_text(program)
    values = {"stdin": b"", "timeout": 20.0, "memory": 192 * MIB, "files": {"given": b"file"}, "disk": 8 * MIB}
    plain = options.pop("plain", False)
    argv = options.pop("argv", ["python3", "main.py", str(os.getpid()), str(tcp.getsockname()[1])])
    if plain:
        user = 61999 if os.getuid() == 0 else None
        folder.parent.chmod(0o711)
        done = subprocess.run(argv, cwd=place, user=user, group=user, extra_groups=None if user is None else [], capture_output=True)
        folder.parent.chmod(0o700)
        Path("/tmp/victim").write_text("whole")
        return {"text": done.stdout.decode(), "stderr": done.stderr.decode(), "exit": done.returncode}
    kind = Containment(**options.pop("containment")) if "containment" in options else containment()
    try:
        outcome = run_contained(Order(argv, place, **(values | options)), (), kind)
    except ContainmentUnavailable as error:
        return {"refused": str(error)}
    return {"text": outcome.text, "stderr": outcome.stderr.decode("utf-8", "replace"), "exit": outcome.exit,
            "killed_by": outcome.killed_by, "lost": outcome.containment.lost, "peak": outcome.usage.memory_peak_bytes}

if "LANDLOCK" in os.environ:
    landlock.version = lambda: int(os.environ["LANDLOCK"])
try:
    choice = str(containment())
except ContainmentUnavailable as error:
    choice = str(error)
print(json.dumps(choice), flush=True)
for line in sys.stdin:
    runs = json.loads(line)
    before, told = processes(), [None] * len(runs)
    def one(number):
        place = folder if number == 0 else folder.with_name(f"submission{number}")
        told[number] = run(runs[number][0], runs[number][1], place)
    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(runs))]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    left = sorted(set(os.listdir("/tmp")) - KNOWN)
    for told_one in told:
        told_one |= {"survivors": len(processes() - before), "left": left}
    info = os.stat("/tmp/victim")
    whole = (Path("/tmp/victim").read_text(), oct(info.st_mode & 0o7777), info.st_uid, info.st_nlink) == ("whole", "0o666", os.getuid(), 1)
    print(json.dumps([one | {"victim": whole} for one in told]), flush=True)
"""
DOCKER = (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE SYS_CHROOT KILL"
)


def without_namespaces() -> bytes:
    """A filter like Docker's: what makes namespaces and mounts is refused."""

    def step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
        return struct.pack("=HBBI", code, yes, no, value)

    program = step(0x20, 0)
    for number in (272, 308, 165, 166, 155, 428, 429, 430, 431, 432, 433, 442):
        program += step(0x15, number, 0, 1) + step(6, 0x50001)
    program += step(0x15, 435, 0, 1) + step(6, 0x50026)
    program += step(0x15, 56, 0, 3) + step(0x20, 16) + step(0x45, 0x7E020000, 0, 1) + step(6, 0x50001)
    return program + step(6, 0x7FFF0000)


class House:
    """An environment of one kind, and the SDK in it, to which the kernel may seem to know an older Landlock."""

    def __init__(self, kind: str, landlock: int | None = None) -> None:
        self.kind = kind
        packages = [
            str(Path(module.__file__ or "").parents[1])
            for module in (platform_challenge_sdk, platform_protocol)
        ]
        uids = 100_000 + os.getpid() % 1000 * 100
        words = ["bwrap", "--unshare-ipc", "--unshare-net", "--die-with-parent", "--cap-drop", "ALL"]
        environment = {"CANARY": "canary", "UIDS": str(uids)}
        environment |= {} if landlock is None else {"LANDLOCK": str(landlock)}
        words += ["--new-session", "--clearenv"]
        words += [word for pair in environment.items() for word in ("--setenv", *pair)]
        words += ["--ro-bind", "/usr", "/usr"]
        for name in ("bin", "lib", "lib64"):
            words += ["--symlink", f"usr/{name}", f"/{name}"]
        words += ["--dir", "/etc", "--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--dev", "/dev"]
        if kind.startswith("nesting"):  # bubblewrap's own /proc has covers, as Docker's
            words = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc", *words]
            words += ["--bind", "/proc", "/proc"]
        else:
            words += ["--unshare-pid", "--proc", "/proc"]
        words += ["--perms", "1777", "--tmpfs", "/tmp"]
        for path in dict.fromkeys([sys.base_prefix, sys.prefix, *packages]):
            for parent in reversed(Path(path).parents[:-1]):
                words += ["--perms", "0755", "--dir", str(parent)]
            words += ["--ro-bind", path, path]
        filter_file = os.memfd_create("filter", 0)
        os.write(filter_file, without_namespaces())
        os.lseek(filter_file, 0, os.SEEK_SET)
        if kind in ("docker", "user"):
            words += ["--seccomp", str(filter_file)]
        command = [sys.executable, "-c", SDK]
        if os.getuid() != 0:
            words += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        elif "user" not in kind:
            words += [word for name in DOCKER.split() for word in ("--cap-add", f"CAP_{name}")]
        else:
            words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            command = ["setpriv", f"--reuid={uids + 99}", f"--regid={uids + 99}", "--clear-groups", *command]
        self._process = subprocess.Popen(
            [*words, "--", *command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            pass_fds=[filter_file],
        )
        os.close(filter_file)
        self.choice = self._answer()

    def run(self, program: str, **options: Any) -> dict[str, Any]:
        """How the program ended there, and what was found afterwards. Its argv: the SDK's pid, a TCP port."""
        return self.run_all((program, options))[0]

    def run_all(self, *runs: tuple[str, dict[str, Any]]) -> list[dict[str, Any]]:
        """The same, for programs that run at once."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(runs) + "\n")
        self._process.stdin.flush()
        told: list[dict[str, Any]] = self._answer()
        return told

    def close(self) -> None:
        """End it."""
        self._process.kill()
        self._process.communicate()

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the SDK has died"
        return json.loads(line)
