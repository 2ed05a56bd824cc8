"""Whether this machine lets a sandbox's namespaces be made: tried, since no setting says so for sure."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SYSCTLS = Path("/proc/sys")
_UID = 300_000
"""As root guests get uids from here on; in a container that maps fewer, none can be had."""
_TIMEOUT = 30.0
_PROBE = """
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
step = "a uid of its own"
def check(result):
    if result != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
try:
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(*[int(sys.argv[1])] * 3)
        os.setresuid(*[int(sys.argv[1])] * 3)
        libc.prctl(4, 1, 0, 0, 0)
    uid, gid = os.getuid(), os.getgid()
    for step, flag in (("user", 0x10000000), ("net", 0x40000000), ("mnt", 0x20000), ("pid", 0x20000000)):
        check(libc.unshare(flag))
        if step == "user":
            open("/proc/self/setgroups", "w").write("deny")
            open("/proc/self/uid_map", "w").write(f"0 {uid} 1")
            open("/proc/self/gid_map", "w").write(f"0 {gid} 1")
    step = "mount"
    check(libc.mount(b"none", b"/", None, ctypes.c_ulong(0x44000), None))
except OSError as error:
    print(f"{step}: {error.strerror}")
"""
_SETTINGS = (
    ("kernel/apparmor_restrict_unprivileged_userns", "1", "0", ("user", "net", "mnt", "pid", "mount")),
    ("kernel/unprivileged_userns_clone", "0", "1", ("user",)),
    ("user/max_user_namespaces", "0", "65536", ("user",)),
    ("user/max_net_namespaces", "0", "65536", ("net",)),
    ("user/max_mnt_namespaces", "0", "65536", ("mnt",)),
    ("user/max_pid_namespaces", "0", "65536", ("pid",)),
)


def namespaces_refused(sysctls: Path = SYSCTLS) -> str | None:
    """Why a sandbox cannot be made here, with what to do; None when it can."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _PROBE, str(_UID)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT,
            check=False,
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"whether namespaces can be made could not be tried: {error}"
    told = done.stdout.strip() or done.stderr.strip()[-200:]
    return explained(told, sysctls) if told else None


def explained(told: str, sysctls: Path) -> str:
    """What the probe told (`step: reason`), with the setting that forbids it where one does."""
    step = told.partition(":")[0]
    ways = [
        f"sysctl -w {name.replace('/', '.')}={good}"
        for name, bad, good, steps in _SETTINGS
        if step in steps and _read(sysctls / name) == bad
    ]
    if any("apparmor" in way for way in ways):
        ways.append("an AppArmor profile for the VMM's Python and bwrap with the rule userns")
    hint = " or ".join(ways) if ways else "run the VMM as root, or outside of the container that forbids it"
    return f"a sandbox's namespaces cannot be made here ({told}): {hint}"


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
