"""The local VMM as an ordinary user: what still holds, what falls away and is said, and when it refuses."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.cycles.vmm import Vmm

from platform_vmm.sandbox.namespaces import explained

ROOT = Path(__file__).resolve().parents[2]
UID = 2_500_000


@dataclass(frozen=True, slots=True)
class User:
    """Somebody without any right: how to run Python as him, and a folder of his."""

    python: list[str]
    environment: dict[str, str]
    folder: Path


@pytest.fixture
def user() -> Iterator[User]:
    """As root another uid; else ourselves. The interpreter is one that he can run."""
    folder = Path(tempfile.mkdtemp(prefix="platform-user-"))
    folder.chmod(0o755)
    sources = [path for path in sys.path if path] + [str(ROOT)]
    environment = {"PATH": os.environ["PATH"], "HOME": str(folder)}
    environment |= {"PYTHONDONTWRITEBYTECODE": "1", "TMPDIR": str(folder)}
    become: list[str] = []
    if os.getuid() == 0:
        os.chown(folder, UID, UID)
        become = ["setpriv", f"--reuid={UID}", f"--regid={UID}", "--clear-groups", "--no-new-privs"]
        become.append("env")  # setpriv itself would look in PATH for another Python
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    try:
        for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
            command = [*become, python]
            environment["PYTHONPATH"] = _importable(sources, python)
            check = [*command, "-c", "import platform_vmm, cryptography"]
            if subprocess.run(check, env=environment, capture_output=True, check=False).returncode == 0:
                yield User(command, environment, folder)
                return
        pytest.skip("this Python, or the checkout, lies where no other user may look")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _importable(sources: list[str], python: str) -> str:
    """Ours but the standard library, which is another interpreter's."""
    own = python == sys.executable
    return ":".join(path for path in sources if own or "site-packages" in path or str(ROOT) in path)


PROBE = """
import ctypes, errno, json, os, socket
libc = ctypes.CDLL(None, use_errno=True)
def tcp(host, port):
    try:
        socket.create_connection((host, port), 3).close()
        return 'reached'
    except OSError as error: return errno.errorcode.get(error.errno, type(error).__name__)
def write(path):
    try:
        open(path, 'w').close()
        return 'written'
    except OSError as error: return errno.errorcode[error.errno]
def fill():
    total = 0
    try:
        with open('/tmp/x', 'wb', buffering=0) as file:
            while True: total += file.write(bytes(2**22))
    except OSError: return total
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(json.dumps({
    'uid': os.getuid(), 'caps': int(status['CapEff'], 16), 'filter': status['Seccomp'].strip(),
    'pids': [name for name in os.listdir('/proc') if name.isdigit()],
    'net': [tcp('127.0.0.1', PORT), tcp('10.0.2.2', PORT), tcp('1.1.1.1', 443)],
    'system': [write('/usr/x'), write('/x'), write('/etc/x')], 'home': os.path.exists(HOME),
    'sysctl': write('/proc/sys/kernel/core_pattern'), 'disk': fill(),
}), flush=True)
print('up', flush=True)
"""


LAYERED = """
import errno, json, os
def write(path):
    try:
        open(path, 'a').close()
        return 'written'
    except OSError as error: return errno.errorcode[error.errno]
def read(path):
    try: return os.listdir(path)
    except OSError as error: return errno.errorcode[error.errno]
print(json.dumps({'added': write('/usr/local/lib/x'), 'root': write('/x'), 'changed': write('/usr/bin/env'),
                  'hidden': read('/usr/share')}), flush=True)
print('up', flush=True)
"""


@pytest.mark.slow(reason="starts a VMM, and a guest in it")
@pytest.mark.timeout(240)
def test_as_an_ordinary_user_a_guest_is_held_and_what_is_weaker_is_said(user: User) -> None:
    """Namespaces, filter, network, system and disk hold; uids of its own and groups' limits do not."""
    vmm = Vmm(user.folder, python=user.python, environment=user.environment)
    if os.getuid() == 0:
        os.chown(vmm.temporary, UID, UID)
    with socket.create_server(("127.0.0.1", 0)) as beside:
        port = beside.getsockname()[1]
        script = PROBE.replace("PORT", str(port)).replace("HOME", repr(str(user.folder)))
        vmm.start()
        try:
            python = f"/opt/platform/bin/python{sys.version_info.major}.{sys.version_info.minor}"
            identity = vmm.create(
                script,
                _free_port(),
                filesystem={"tmpfs_size_mb": 32},
                interpreter=(python, "-I", "-c"),
            )
            vmm.until_said(identity, "up")
            found = _told(vmm, identity)
            layers = {"read_only": False, "denied_paths": ["/usr/share"], "tmpfs_size_mb": 32}
            identity = vmm.create(LAYERED, _free_port(), filesystem=layers, interpreter=(python, "-I", "-c"))
            vmm.until_said(identity, "up")
            layered = _told(vmm, identity)
        finally:
            vmm.end(signal.SIGTERM)
    assert (found["uid"], found["caps"], found["filter"], found["pids"]) == (1000, 0, "2", ["1", "2"])
    assert "reached" not in found["net"]
    assert set(found["system"]) <= {"EROFS", "EACCES"}
    assert found["sysctl"] in {"EROFS", "EACCES"}
    assert not found["home"]
    assert 20 * 2**20 < found["disk"] <= 32 * 2**20
    assert layered == {"added": "written", "root": "written", "changed": "EACCES", "hidden": "EACCES"}
    weaker = vmm.described["weaker"]
    assert vmm.described["isolation_level"] == "Container"
    for words in ("no uid of its own", "no control groups"):
        assert any(text.startswith(words) for text in weaker), weaker


@pytest.mark.slow(reason="makes and destroys sandboxes")
@pytest.mark.timeout(300)
def test_as_an_ordinary_user_cycles_leave_nothing(user: User) -> None:
    """The VMM is killed once in between; without groups the stages end what it leaves."""
    done = subprocess.run(
        [*user.python, "-m", "tests.cycles", "--cycles", "20", "--kills", "1", "--output", str(user.folder)],
        env=user.environment,
        cwd=user.folder,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert (report["cycles"], report["leaks"], report["vmm_kills"]) == (20, 0, 1)


@pytest.mark.slow(reason="starts Python three times")
@pytest.mark.parametrize("kind", ["user", "net", "mnt"])
def test_where_namespaces_are_forbidden_the_vmm_refuses_and_names_the_setting(user: User, kind: str) -> None:
    """Really forbidden, by the limit of a user namespace around it: exit 2, no guest of less isolation."""
    forbid = f'echo 0 > /proc/sys/user/max_{kind}_namespaces; exec "$@"'
    inside = ["unshare", "--user", "--map-current-user", "--keep-caps", "sh", "-c", forbid, "sh"]
    become, python = user.python[:-1], user.python[-1]
    done = subprocess.run(
        [*become, *inside, python, "-m", "platform_vmm", "serve", "--listen", f"unix:{user.folder}/s"],
        cwd=user.folder,
        env=user.environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert "a sandbox's namespaces cannot be made here" in done.stderr
    assert f"sysctl -w user.max_{kind}_namespaces=65536" in done.stderr


@pytest.mark.parametrize(
    ("setting", "value", "told", "way"),
    [
        ("kernel/apparmor_restrict_unprivileged_userns", "1", "mount: Permission denied", "userns=0"),
        (
            "kernel/apparmor_restrict_unprivileged_userns",
            "1",
            "net: Operation not permitted",
            "AppArmor profile",
        ),
        ("kernel/unprivileged_userns_clone", "0", "user: not permitted", "userns_clone=1"),
        (
            "kernel/unprivileged_userns_clone",
            "1",
            "user: not permitted",
            "outside of the container",
        ),
        ("user/max_net_namespaces", "0", "a uid of its own: Invalid argument", "outside of the container"),
    ],
)
def test_the_setting_that_forbids_namespaces_is_named(
    tmp_path: Path, setting: str, value: str, told: str, way: str
) -> None:
    """Ubuntu's and Debian's own switches too, which this kernel may not have."""
    (tmp_path / setting).parent.mkdir(parents=True)
    (tmp_path / setting).write_text(f"{value}\n")
    assert told in explained(told, tmp_path)
    assert way in explained(told, tmp_path)


def _told(vmm: Vmm, identity: str) -> dict[str, Any]:
    """What a guest printed as JSON."""
    log = (vmm.state / "vms" / identity / "serial.log").read_text()
    found: dict[str, Any] = json.loads(next(line for line in log.splitlines() if line.startswith("{")))
    return found


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])
