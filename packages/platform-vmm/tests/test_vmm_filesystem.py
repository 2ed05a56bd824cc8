"""The operator's filesystem policy, as a real guest meets it: what it can write, and what it cannot see."""

from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from guests import Guests, until

PROBE = """
import ctypes, errno, json, os
def name(error): return errno.errorcode.get(error.errno, str(error))
def write(path, mode='w'):
    try:
        with open(path, mode) as file: file.write('x')
        return 'written'
    except OSError as error: return name(error)
def read(path):
    try:
        return sorted(os.listdir(path)) if os.path.isdir(path) else open(path, 'rb').read(4).decode('latin1')
    except OSError as error: return name(error)
def tell(**found): print(json.dumps(found))
def fill(places, size=2**20):
    total = 0
    for number, place in enumerate(places):
        try:
            with open(f'{place}/fill{number}', 'wb', buffering=0) as file:
                while True: total += file.write(bytes(size))
        except OSError as error: assert error.errno == errno.ENOSPC, error
    return total
"""


def policy(**given: Any) -> str:
    """user_config with a filesystem policy."""
    return json.dumps({"filesystem": given})


async def test_by_default_the_root_is_read_only_but_for_the_usual_places(guests: Guests) -> None:
    """With no policy in user_config, as from a validator of before."""
    found = await guests.run(
        PROBE
        + """
tell(no=[write(p) for p in ('/x', '/usr/x', '/etc/x', '/opt/platform/x', '/srv', '/dstack/x')],
     yes=[write(p + '/x') for p in ('/tmp', '/data', '/root', '/var/tmp', '/run', '/dev/shm')])
"""
    )
    assert set(found["no"]) <= {"EROFS", "EACCES"}
    assert set(found["yes"]) == {"written"}


async def test_allowed_paths_are_writable_and_share_the_one_cap(guests: Guests) -> None:
    """tmpfs_size: so many bytes in all places together, the allowed ones included; then no space anywhere."""
    found = await guests.run(
        PROBE
        + """
places = ['/scratch', '/var/lib/model', '/tmp', '/data', '/root', '/var/tmp', '/run', '/dev/shm']
tell(total=fill(places), devices=len({os.stat(p).st_dev for p in places}), beside=write('/var/lib/x'))
""",
        user_config=policy(allowed_paths=["/scratch", "/var/lib/model", "/tmp/inside"], tmpfs_size_mb=24),
    )
    assert 23 * 2**20 < found["total"] <= 24 * 2**20
    assert found["devices"] == 1
    assert found["beside"] == "EROFS"


async def test_tmpfs_size_caps_files_too(guests: Guests) -> None:
    """A file for each 4 KiB: no million of empty ones in 16 MiB."""
    found = await guests.run(
        PROBE
        + """
made = 0
try:
    for made in range(10**6): open(f'/tmp/{made}', 'x').close()
except OSError as error: tell(made=made, why=name(error))
""",
        user_config=policy(tmpfs_size_mb=16),
    )
    assert found["why"] == "ENOSPC"
    assert 3900 < found["made"] < 4096


async def test_denied_paths_show_nothing_whatever_way_they_are_reached(guests: Guests) -> None:
    """Folders and files, links to them, a path that the guest could make; also in a nested sandbox."""
    hidden = ["/usr/share", "/usr/bin/env", "/data", "/etc/passwd", "/srv/models", "/usr/no/such", "/bin/sh"]
    hidden += ["/usr/share/doc", "/data/below"]  # where there is nothing any more
    found = await guests.run(
        PROBE
        + """
import subprocess
inner = ['bwrap', '--unshare-user', '--ro-bind', '/usr', '/usr', '--symlink', 'usr/lib', '/lib', '--symlink',
         'usr/lib64', '/lib64', '--proc', '/proc', '/usr/bin/ls', '/usr/share', '/usr/bin/env']
nested = subprocess.run(inner, capture_output=True, text=True)
libc = ctypes.CDLL(None, use_errno=True)
def undo():
    ready, told = os.pipe()
    if os.fork() == 0:
        done = libc.unshare(0x10020000)
        done = done or libc.umount2(b'/usr/share', 2)
        os.write(told, (errno.errorcode[ctypes.get_errno()] if done else 'undone').encode())
        os._exit(0)
    return os.read(ready, 100).decode()
tell(read=[read(p) for p in ('/usr/share', '/usr/share/doc', '/usr/bin/env', '/data', '/etc/passwd',
                             '/bin/sh', '/srv/models')],
     write=[write(p) for p in ('/data/x', '/srv/models/x', '/usr/bin/env', '/usr/share/x')],
     nested=nested.stdout, undo=undo(),
     kept=[read('/usr/bin/true') == '\\x7fELF', read('/etc/group') != ''])
"""
    , user_config=policy(denied_paths=hidden))  # fmt: skip
    assert set(found["read"]) <= {"EACCES", "ENOENT", ""}
    assert set(found["write"]) <= {"EACCES", "EROFS"}
    assert "doc" not in found["nested"]
    assert found["undo"] == "EINVAL"
    assert found["kept"] == [True, True]


@pytest.mark.needs("root")
async def test_a_writable_root_takes_changes_on_the_one_capped_disk(guests: Guests) -> None:
    """New entries, removed and replaced ones, in /usr, /etc and the runtime; the host's stay as they are.

    What only root may read on the host stays closed, whatever is done around it.
    """
    before = Path("/usr/bin/env").stat().st_size
    secret = Path("/usr/local", f"secret-of-a-test-{os.getpid()}")
    secret.write_text("canary")
    secret.chmod(0o600)
    try:
        found = await guests.run(
            PROBE
            + f"secret = {str(secret)!r}"
            + """
changes = [write(p) for p in ('/x', '/usr/x', '/usr/local/lib/x', '/etc/x', '/opt/platform/x', '/home')]
changes += [write('/etc/passwd', 'a'), write('/opt/platform/etc/passwd', 'a')]
os.unlink('/usr/bin/yes'); os.makedirs('/usr/new/folder'); os.makedirs('/srv2')
os.unlink('/usr/bin/env'); changes.append(write('/usr/bin/env'))
def attempt(action):
    try: return action()
    except OSError as error: return name(error)
moved, linked = '/usr/local/y', '/usr/local/z'
closed = [read(secret), attempt(lambda: os.chmod(secret, 0o644)), attempt(lambda: os.rename(secret, moved)),
          attempt(lambda: os.link(secret, linked)), read(secret), read(moved), read(linked)]
tell(changes=changes, gone=read('/usr/bin/yes'), closed=closed,
     still=[write(p) for p in ('/dev/x', '/dstack/.host-shared/x', '/proc/sys/kernel/core_pattern')],
     kept=write('/usr/bin/true', 'a'), total=fill(['/usr/lib', '/etc', '/opt/platform', '/srv2', '/tmp']))
""",
            user_config=policy(read_only=False, tmpfs_size_mb=48),
        )
    finally:
        secret.unlink()
    assert set(found["changes"]) == {"written"}
    assert found["gone"] == "ENOENT"
    assert found["kept"] == "EACCES"
    assert set(found["closed"]) <= {"EACCES", "EPERM", "ENOENT", "EOVERFLOW"}, found["closed"]
    assert set(found["still"]) <= {"EROFS", "EACCES"}
    assert 20 * 2**20 < found["total"] <= 48 * 2**20
    assert (Path("/usr/bin/env").stat().st_size, Path("/usr/bin/yes").exists()) == (before, True)


async def test_a_writable_root_still_nests_and_still_hides(guests: Guests) -> None:
    """Denied paths in it stay covered; bubblewrap still works inside."""
    found = await guests.run(
        PROBE
        + """
import subprocess
inner = ['bwrap', '--unshare-user', '--ro-bind', '/usr', '/usr', '--symlink', 'usr/lib', '/lib', '--symlink',
         'usr/lib64', '/lib64', '/usr/bin/true']
tell(nested=subprocess.run(inner).returncode,
     hidden=[read('/usr/share'), write('/usr/share/x'), read('/etc/group')])
""",
        user_config=policy(read_only=False, denied_paths=["/usr/share", "/etc/group"]),
    )
    assert found["nested"] == 0
    assert found["hidden"] == ["EACCES", "EACCES", "EACCES"]


async def test_a_policy_that_cannot_be_kept_is_a_boot_error(guests: Guests) -> None:
    """A guest with less than was asked for is not started."""
    for given in ({"denied_paths": ["/proc"]}, {"tmpfs_size_mb": 1}, "strict"):
        machine = guests.create(["sleep", "60"], user_config=json.dumps({"filesystem": given}))
        await until(partial(getattr, machine, "boot_error"), machine)
        assert machine.boot_error.startswith("user_config: filesystem")
        await guests.remove(machine)
