"""The sandbox inside the sandbox: what `ctx.submission.run` needs of this driver."""

from __future__ import annotations

from guests import Guests

NEST = """
import json, os, subprocess
inner = (
    "import json,os;"
    "pids=sorted(int(p) for p in os.listdir('/proc') if p.isdigit());"
    "cannot='';\\n"
    "try: os.stat('/dstack')\\n"
    "except OSError as error: cannot=type(error).__name__\\n"
    "import ctypes;libc=ctypes.CDLL(None,use_errno=True);"
    "again=libc.unshare(0x10000000);"
    "print(json.dumps({'uid':os.getuid(),'pids':pids,'dstack':cannot,'again':again}))"
)
words = ['bwrap', '--unshare-user', '--unshare-pid', '--unshare-ipc', '--unshare-net', '--uid', '0']
words += ['--gid', '0', '--disable-userns']
words += ['--die-with-parent', '--new-session', '--cap-drop', 'ALL', '--ro-bind', '/usr', '/usr']
for name in ('bin', 'lib', 'lib64', 'sbin'):
    if os.path.islink('/' + name):
        words += ['--symlink', 'usr/' + name, '/' + name]
words += ['--ro-bind', '/opt/platform', '/opt/platform', '--proc', '/proc', '--dev', '/dev']
words += ['--ro-bind-try', '/etc/ld.so.cache', '/etc/ld.so.cache']
words += ['/opt/platform/bin/python3.11', '-I', '-c', inner]
done = subprocess.run(words, capture_output=True, text=True)
print(json.dumps({'outer_uid': os.getuid(), 'code': done.returncode, 'error': done.stderr,
                  'inner': json.loads(done.stdout or '{}')}))
"""


async def test_a_sandbox_nests_in_the_sandbox_with_a_pid_view_of_its_own(guests: Guests) -> None:
    """As uid 1000 without capabilities the SDK makes a stricter sandbox, which can make none itself."""
    found = await guests.run(NEST.replace("/opt/platform/bin/python3.11", guests.runtime.boot[0]))
    assert found["error"] == ""
    assert found["code"] == 0
    assert found["outer_uid"] == 1000
    assert found["inner"]["uid"] == 0
    assert found["inner"]["pids"] in ([1, 2], [1])
    assert found["inner"]["dstack"] == "FileNotFoundError"
    assert found["inner"]["again"] == -1
