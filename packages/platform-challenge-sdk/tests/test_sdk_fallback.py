"""Runs where namespaces cannot nest: as in a container with Docker's limits, and as an ordinary user.

One process in such an environment plays the SDK; programs are handed to it, and it answers how they ended
and what it found afterwards.
"""
# ruff: noqa: E501 - a line of a submission's program stays one line

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import platform_challenge_sdk
import platform_protocol
from platform_challenge_sdk import landlock
from platform_challenge_sdk.containment import LOST, Containment, Facts, choose
from platform_challenge_sdk.errors import ContainmentUnavailable

SDK = """
import json, os, socket, subprocess, sys, threading
from pathlib import Path
from platform_challenge_sdk.containment import Containment
from platform_challenge_sdk.contained import MIB, Order, run_contained
from platform_challenge_sdk.errors import ContainmentUnavailable
from platform_challenge_sdk.trial import containment

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

def processes():
    return {name for name in os.listdir("/proc") if name.isdigit()}

def run(program, options, place):
    place.mkdir(exist_ok=True)
    (place / "main.py").write_text(program)
    values = {"stdin": b"", "timeout": 20.0, "memory": 192 * MIB, "files": {"given": b"file"}, "disk": 8 * MIB}
    kind = Containment(**options.pop("containment")) if "containment" in options else containment()
    plain = options.pop("plain", False)
    argv = options.pop("argv", ["python3", "main.py", str(os.getpid()), str(tcp.getsockname()[1])])
    if plain:
        user = 61999 if os.getuid() == 0 else None
        folder.parent.chmod(0o711)
        done = subprocess.run(argv, cwd=place, user=user, group=user, extra_groups=None if user is None else [], capture_output=True)
        folder.parent.chmod(0o700)
        Path("/tmp/victim").write_text("whole")
        return {"text": done.stdout.decode(), "stderr": done.stderr.decode(), "exit": done.returncode}
    outcome = run_contained(Order(argv, place, **(values | options)), (), kind)
    return {"text": outcome.text, "stderr": outcome.stderr.decode("utf-8", "replace"), "exit": outcome.exit,
            "killed_by": outcome.killed_by, "lost": outcome.containment.lost, "peak": outcome.usage.memory_peak_bytes}

print(json.dumps(str(containment())), flush=True)
for line in sys.stdin:
    runs = json.loads(line)
    before, told = processes(), [None] * len(runs)
    def one(number):
        place = folder if number == 0 else folder.with_name(f"submission{number}")
        told[number] = run(runs[number][0], runs[number][1], place)
    threads = [threading.Thread(target=one, args=(number,)) for number in range(len(runs))]
    for thread in threads: thread.start()
    for thread in threads: thread.join()
    left = sorted(name for name in os.listdir("/tmp") if name not in {"user-config", "victim", "agent0", "agent1", "private"})
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
    """An environment of one kind, and the SDK in it."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        packages = [
            str(Path(module.__file__ or "").parents[1])
            for module in (platform_challenge_sdk, platform_protocol)
        ]
        words = [
            "bwrap",
            "--unshare-pid",
            "--unshare-ipc",
            "--unshare-net",
            "--die-with-parent",
            "--cap-drop",
            "ALL",
        ]
        words += ["--new-session", "--clearenv", "--setenv", "CANARY", "canary", "--ro-bind", "/usr", "/usr"]
        words += [
            "--symlink",
            "usr/bin",
            "/bin",
            "--symlink",
            "usr/lib",
            "/lib",
            "--symlink",
            "usr/lib64",
            "/lib64",
        ]
        words += [
            "--dir",
            "/etc",
            "--ro-bind-try",
            "/etc/ld.so.cache",
            "/etc/ld.so.cache",
            "--proc",
            "/proc",
            "--dev",
            "/dev",
        ]
        words += ["--perms", "1777", "--tmpfs", "/tmp"]
        for path in dict.fromkeys([sys.base_prefix, sys.prefix, *packages]):
            for parent in reversed(Path(path).parents[:-1]):
                words += ["--perms", "0755", "--dir", str(parent)]
            words += ["--ro-bind", path, path]
        filter_file = os.memfd_create("filter", 0)
        os.write(filter_file, without_namespaces())
        os.lseek(filter_file, 0, os.SEEK_SET)
        words += ["--seccomp", str(filter_file)]
        command = [sys.executable, "-c", SDK]
        if os.getuid() != 0:
            words += ["--unshare-user", "--uid", "1000", "--gid", "1000"]
        elif kind == "docker":
            words += [word for name in DOCKER.split() for word in ("--cap-add", f"CAP_{name}")]
        else:
            words += ["--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
            command = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups", *command]
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


@pytest.fixture(scope="module", params=["docker", "user"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    if request.param == "docker" and os.getuid() != 0:
        pytest.skip("only root can play root in a container without user namespaces")
    if landlock.version() < landlock.SIGNALS:
        pytest.skip(f"the kernel's Landlock is version {landlock.version()}")
    made = House(request.param)
    yield made
    made.close()


def clean(told: dict[str, Any]) -> bool:
    """Whether nothing of the run is left and nothing outside was changed."""
    return (told["survivors"], told["left"], told["victim"]) == (0, [], True)


class TestTheChoice:
    @pytest.mark.parametrize(
        ("facts", "chosen"),
        [
            (Facts("x86_64", root=True, namespaces=None), Containment()),
            (Facts("aarch64", root=False, namespaces=None, landlock=7), Containment()),
            (
                Facts("x86_64", root=True, namespaces="no", own_uid=None, landlock=1),
                Containment("landlock", True, 1),
            ),
            (
                Facts("x86_64", root=False, namespaces="no", same_uid=None, landlock=6),
                Containment("landlock", False, 6),
            ),
        ],
    )
    def test_the_strongest_that_holds_is_used(self, facts: Facts, chosen: Containment) -> None:
        assert choose(facts) == chosen

    @pytest.mark.parametrize(
        ("facts", "reason"),
        [
            (Facts("riscv64", root=True, namespaces=None), "expected an x86_64 or aarch64 machine"),
            (
                Facts("x86_64", root=True, namespaces="refused"),
                "namespaces: refused; the kernel has no Landlock",
            ),
            (
                Facts(
                    "x86_64", root=True, namespaces="no", own_uid="no CAP_SETUID", same_uid=None, landlock=7
                ),
                "under an own uid: no CAP_SETUID",
            ),
            (
                Facts("x86_64", root=False, namespaces="no", same_uid=None, landlock=5),
                "Landlock 5 keeps no signals in: expected 6",
            ),
            (
                Facts("x86_64", root=False, namespaces="no", same_uid="it signals the SDK", landlock=7),
                "under the SDK's uid: it signals the SDK",
            ),
        ],
    )
    def test_where_nothing_holds_nothing_is_run_and_each_reason_is_named(
        self, facts: Facts, reason: str
    ) -> None:
        with pytest.raises(ContainmentUnavailable, match=reason):
            choose(facts)

    def test_what_falls_away_is_named_and_explained(self) -> None:
        assert Containment().lost == ()
        weakest = Containment("landlock", own_uid=False, landlock=2)
        assert set(weakest.lost) == set(LOST)
        assert "lost: network" in str(weakest)

    def test_it_is_made_by_really_trying(self, house: House) -> None:
        uid = {"docker": "an own uid", "user": "the SDK's uid"}[house.kind]
        assert house.choice.startswith(f"Landlock {landlock.version()}, seccomp and {uid}; lost: network")


class TestRuns:
    def test_files_input_output_and_exit_code_are_as_with_namespaces(self, house: House) -> None:
        program = (
            "import os, subprocess, sys, tempfile, threading\n"
            "thread = threading.Thread(target=lambda: print('thread', flush=True)); thread.start(); thread.join()\n"
            "print(sys.argv[1:], open(sys.argv[1]).read(), os.listdir(), sorted(os.environ))\n"
            "print(subprocess.run(['echo', 'child'], capture_output=True, text=True).stdout.strip())\n"
            "with tempfile.TemporaryFile() as file: file.write(b'x')\n"
            "open(os.path.expanduser('~/made'), 'w').close(); sys.exit(3)"
        )
        told = house.run(program, argv=["python3", "/submission/main.py", "/workspace/given"])
        lines = told["text"].splitlines()
        assert (told["exit"], told["killed_by"], told["stderr"]) == (3, None, "")
        assert (lines[0], lines[2]) == ("thread", "child")
        assert lines[1].endswith(
            "/workspace/given'] file ['main.py'] ['HOME', 'LANG', 'PATH', 'PYTHONDONTWRITEBYTECODE', 'TMPDIR']"
        )
        assert clean(told)

    def test_a_missing_command_is_the_submissions_failure(self, house: House) -> None:
        told = house.run("", argv=["nothing-here"])
        assert (told["exit"], told["stderr"]) == (127, "nothing-here: No such file or directory\n")

    def test_it_is_first_in_line_for_the_kernels_killer_and_gains_nothing(self, house: House) -> None:
        program = "import resource; print(resource.getrlimit(resource.RLIMIT_AS)[1] >> 20, resource.getrlimit(resource.RLIMIT_CORE)[1])"
        assert house.run(program)["text"] == "192 0\n"

    def test_two_at_once_know_nothing_of_each_other(self, house: House) -> None:
        victim = "import os, sys, time; open(os.path.expanduser('~/pid'), 'w').write('x'); time.sleep(1); print('whole')"
        attacker = (
            "import os, signal, time\n"
            "time.sleep(.4)\n"
            "for pid in range(2, 400):\n"
            "    if pid not in (os.getpid(), os.getppid()):\n"
            "        try: os.kill(pid, 9); print('killed', pid)\n"
            "        except OSError: pass\n"
            "try: print(os.listdir('/tmp'))\nexcept OSError as error: print(error.strerror)"
        )
        first, second = house.run_all((victim, {}), (attacker, {}))
        assert (first["text"], second["text"]) == ("whole\n", "Permission denied\n")
        assert clean(first)


ATTEMPTS = {
    "user_config": "print(open('/tmp/user-config').read())",
    "another's folder": "import os; print(os.listdir('/tmp'))",
    "the agent's socket": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/tmp/agent0'); print('reached')",
    "a socket of datagrams": "import socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); a.connect('/tmp/agent1'); print('reached')",
    "TCP": "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[2])), 2); print('reached')",
    "UDP": "import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); s.sendto(b'x', ('127.0.0.1', 9)); print('sent')",
    "a listener": "import socket; socket.create_server(('127.0.0.1', 0)); print('made')",
    "netlink": "import socket; socket.socket(16, socket.SOCK_RAW, 0); print('made')",
    "the SDK's limits": "import resource, sys; print(resource.prlimit(int(sys.argv[1]), resource.RLIMIT_NOFILE, (3, 3)))",
    "the SDK's cores": "import os, sys; os.sched_setaffinity(int(sys.argv[1]), {0}); print('set')",
    "a file outside": "open('/tmp/victim', 'a').write('x'); print('written')",
    "a new file outside": "open('/tmp/new', 'w').close(); print('made')",
    "truncation": "import os; os.truncate('/tmp/victim', 0); print('cut')",
    "a hard link": "import os; os.link('/tmp/victim', os.path.expanduser('~/x')); print('linked')",
    "removal": "import os; os.unlink('/tmp/victim'); print('removed')",
    "a device": "import os; os.mknod(os.path.expanduser('~/null'), 0o020666, os.makedev(1, 3)); print('made')",
    "its own submission": "open('main.py', 'a').write('x'); print('written')",
}
LIVE_FOR_ANYONE = {
    "user_config",
    "another's folder",
    "the agent's socket",
    "a socket of datagrams",
    "TCP",
    "UDP",
}
LIVE_FOR_ANYONE |= {"a listener", "netlink", "a file outside", "a new file outside"}


class TestMalice:
    @pytest.mark.parametrize("attempt", ATTEMPTS)
    def test_what_it_must_not_reach_is_refused(self, house: House, attempt: str) -> None:
        told = house.run(ATTEMPTS[attempt])
        assert (told["text"], told["exit"]) == ("", 1)
        # Landlock's own word for a link or move between folders with different rights is EXDEV.
        assert "PermissionError" in told["stderr"] or "[Errno 18]" in told["stderr"]
        assert clean(told)

    @pytest.mark.parametrize("attempt", sorted(LIVE_FOR_ANYONE))
    def test_without_the_walls_the_same_succeeds(self, house: House, attempt: str) -> None:
        told = house.run(
            ATTEMPTS[attempt] + "\nimport os\nif os.path.exists('/tmp/new'): os.unlink('/tmp/new')",
            plain=True,
        )
        assert (told["exit"], told["text"] != "") == (0, True), told["stderr"]

    def test_the_sdks_memory_environment_and_descriptors_cannot_be_read(self, house: House) -> None:
        program = (
            "import ctypes, os, sys\n"
            "for name in ('mem', 'environ', 'maps', 'cmdline', 'fd', 'root/tmp/user-config', 'cwd'):\n"
            "    for pid in (sys.argv[1], '1', str(os.getppid())):\n"
            "        try: print(name, os.listdir(f'/proc/{pid}/{name}') if name in ('fd', 'cwd') else open(f'/proc/{pid}/{name}', 'rb').read(9))\n"
            "        except OSError: pass\n"
            "libc = ctypes.CDLL(None)\n"
            "for call in ((101, 16, int(sys.argv[1])), (101, 16, os.getppid()), (310, int(sys.argv[1]), 0, 0, 0, 0, 0), (438, 3, 0, 0), (425, 8, 0)):\n"
            "    if libc.syscall(*call) != -1: print(call)"
        )
        told = house.run(program)
        assert (told["text"], told["stderr"]) == ("", "")

    @pytest.mark.parametrize("number", [0, 9, 19])
    def test_neither_the_sdk_nor_its_helper_can_be_signalled(self, house: House, number: int) -> None:
        program = (
            f"import os, signal, sys\nnumber = {number}\n"
            "for pid in (int(sys.argv[1]), os.getppid(), 1, -int(sys.argv[1])):\n"
            "    try: os.kill(pid, number); print('signalled', pid)\n"
            "    except (PermissionError, ProcessLookupError): pass\n"
            "try: signal.pidfd_send_signal(os.pidfd_open(int(sys.argv[1])), number); print('signalled')\n"
            "except PermissionError: pass\n"
            "import fcntl\nread, write = os.pipe()\n"
            "try:\n    fcntl.fcntl(read, 10, 9); fcntl.fcntl(read, fcntl.F_SETOWN, int(sys.argv[1])); fcntl.fcntl(read, fcntl.F_SETFL, 0o20000); os.write(write, b'x')\n"
            "except OSError: pass\n"
            "if os.fork() == 0:\n    import time; time.sleep(50)\n"
            "try: os.kill(-1, number)\nexcept PermissionError: pass\n"
            "print('alive')"
        )
        told = house.run(program)
        assert (told["text"], told["exit"], told["killed_by"]) == ("alive\n", 0, None)
        assert clean(told)

    def test_files_that_are_not_its_own_keep_their_modes_owners_and_times(self, house: House) -> None:
        program = (
            "import os\n"
            "calls = (lambda p: os.chmod(p, 0), lambda p: os.chown(p, 1000, 1000), lambda p: os.utime(p, (1, 1)), lambda p: os.setxattr(p, 'user.x', b'x'))\n"
            "for path in ('/tmp/victim', '/tmp', 'main.py', '/tmp/user-config', '/tmp/private'):\n"
            "    for number, call in enumerate(calls):\n"
            "        try: call(path); print(number, path)\n        except OSError: pass"
        )
        told = house.run(program)
        assert (told["text"], told["stderr"], clean(told)) == ("", "", True)

    @pytest.mark.slow(reason="128 processes that fork as they are killed, on the cores that are left")
    def test_a_fork_bomb_ends_with_its_time_and_leaves_nothing(self, house: House) -> None:
        told = house.run(
            "import os, signal\nfor n in range(1, 64):\n    if n not in (9, 19, 32, 33): signal.signal(n, signal.SIG_IGN)\n"
            "while True:\n    try:\n        os.fork(); os.setsid()\n    except OSError: pass",
            timeout=0.5,
        )
        # Where the kernel does not tell what forks share, they may have too much together first.
        assert told["killed_by"] in ({"timeout", "memory"} if house.kind == "docker" else {"timeout"})
        assert clean(told)

    def test_it_may_have_so_many_processes_and_no_more(self, house: House) -> None:
        told = house.run(
            "import os, time\nn = 0\ntry:\n    while True:\n"
            "        if os.fork() == 0: time.sleep(50)\n        n += 1\nexcept OSError as error: print(64 < n < 129, error.strerror)"
        )
        assert told["text"] == "True Resource temporarily unavailable\n"
        assert clean(told)

    def test_a_daemon_does_not_survive_it(self, house: House) -> None:
        told = house.run(
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        os.close(1); os.close(2); time.sleep(50)\n    os._exit(0)\nos.wait(); print('left one')"
        )
        assert told["text"] == "left one\n"
        assert clean(told)

    @pytest.mark.parametrize(
        "program",
        [
            "import os, time\nfor n in range(4):\n    open(os.path.expanduser(f'~/{n}'), 'wb').write(bytes(4 << 20))\ntime.sleep(50)",
            "import os\nos.chdir(os.environ['HOME'])\nn = 0\nwhile True: n += 1; open(str(n), 'w').close()",
            "import os\nos.chdir(os.environ['HOME'])\nwhile True: os.mkdir('d' * 200); os.chdir('d' * 200)",
            "import os, time\nos.chdir(os.environ['HOME']); os.mkdir('d')\nos.chdir('d'); open('x', 'wb').write(bytes(7 << 20)); os.rename('../d', '../e'); open('y', 'wb').write(bytes(7 << 20)); time.sleep(50)",
        ],
        ids=["large files", "many files", "deep folders", "moved folders"],
    )
    def test_files_beyond_its_limit_end_it_and_are_gone(self, house: House, program: str) -> None:
        told = house.run(program)
        assert told["killed_by"] == "disk"
        assert clean(told)

    def test_memory_of_all_its_processes_together_is_limited(self, house: House) -> None:
        told = house.run(
            "import mmap, os, time\nfor n in range(6):\n    if os.fork() == 0:\n"
            "        x = mmap.mmap(-1, 60 << 20); x.write(bytes(60 << 20)); time.sleep(50)\ntime.sleep(50)"
        )
        assert told["killed_by"] == "memory"
        assert clean(told)

    @pytest.mark.parametrize("version", [1, 3, 4, 6])
    def test_each_version_of_landlock_keeps_in_what_it_must(self, house: House, version: int) -> None:
        if house.kind == "user" and version < landlock.SIGNALS:
            with pytest.raises(ContainmentUnavailable):
                choose(Facts("x86_64", root=False, namespaces="no", same_uid=None, landlock=version))
            return
        kind = {"kind": "landlock", "own_uid": house.kind == "docker", "landlock": version}
        attempts = [
            ATTEMPTS[name] for name in ("user_config", "TCP", "truncation", "a file outside", "a hard link")
        ]
        program = "\n".join(
            f"try:\n    {attempt}\nexcept OSError as error: print(type(error).__name__)"
            for attempt in attempts
        )
        program += "\nimport os, sys\ntry: os.kill(int(sys.argv[1]), 0); print('signalled')\nexcept OSError: print('no signal')"
        told = house.run(program, containment=kind)
        assert told["text"].split("\n")[:-3] == ["PermissionError"] * 4
        assert told["text"].split("\n")[-3:] in (
            ["OSError", "no signal", ""],
            ["PermissionError", "no signal", ""],
        )
        assert clean(told)
        assert ("truncation" in told["lost"]) == (version < landlock.TRUNCATION)


KILLED = """
import os, sys
from pathlib import Path
from platform_challenge_sdk import recipe, room
from platform_challenge_sdk.contained import MIB, Order, run_contained
from platform_challenge_sdk.containment import Containment
from platform_challenge_sdk.errors import ContainmentUnavailable

recipe._prefixes = list  # a Python below /root is out of another uid's reach; the shell needs none
room._FIRST_UID, room._UIDS = int(sys.argv[2]), 1
order = Order(["sh", "-c", "setsid sh -c 'trap : TERM; while :; do sleep 1; done' & sleep 50"], Path(sys.argv[1]), b"", 50.0, 64 * MIB, {}, MIB)
try:
    run_contained(order, (), Containment("landlock", True, int(sys.argv[3])))
except ContainmentUnavailable as error:
    print(error)
"""


@pytest.mark.slow(reason="starts Python with the SDK in it")
@pytest.mark.skipif(os.getuid() != 0, reason="only root gives runs a uid of their own")
@pytest.mark.parametrize("killed", ["the SDK", "the stage"])
def test_what_a_run_left_ends_with_whoever_is_killed(tmp_path: Path, killed: str) -> None:
    """`kill -9` of the SDK or of the stage in the middle of a run: a helper or the next in line ends it."""
    uid = 65_100 + os.getpid() % 400
    tmp_path.chmod(0o755)
    rooms = tempfile.mkdtemp()  # not below pytest's, which only root may enter
    Path(rooms).chmod(0o711)

    def of_the_run() -> set[int]:
        found = set()
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if entry.name.isdigit() and entry.stat().st_uid == uid:
                    found.add(int(entry.name))
        return found

    def until(condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 50
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    command = [sys.executable, "-c", KILLED, str(tmp_path), str(uid), str(min(7, landlock.version()))]
    environment = os.environ | {"TMPDIR": rooms}
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as sdk:
        until(lambda: len(of_the_run()) >= 4)
        [stage] = Path(f"/proc/{sdk.pid}/task/{sdk.pid}/children").read_text().split()
        os.kill(sdk.pid if killed == "the SDK" else int(stage), signal.SIGKILL)
        until(lambda: not of_the_run())
        told, _ = sdk.communicate()
    shutil.rmtree(rooms)
    assert (b"the stage died" in told) == (killed == "the stage")
