"""Runs where namespaces cannot nest: as in a container with Docker's limits, and as an ordinary user."""
# ruff: noqa: E501 - a line of a submission's program stays one line

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from fallback_house import House

from platform_challenge_sdk import landlock
from platform_challenge_sdk.containment import Facts, choose
from platform_challenge_sdk.errors import ContainmentUnavailable

DOCKER = pytest.param("docker", marks=pytest.mark.needs("root", why="root in a container is played by root"))


@pytest.fixture(scope="module", params=[DOCKER, "user"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    if landlock.version() < landlock.SIGNALS:
        pytest.skip(f"the kernel's Landlock is version {landlock.version()}")
    made = House(request.param)
    yield made
    made.close()


def clean(told: dict[str, Any]) -> bool:
    """Whether nothing of the run is left and nothing outside was changed."""
    return (told["survivors"], told["left"], told["victim"]) == (0, [], True)


@pytest.mark.parametrize("version", [1, 5])
def test_under_an_older_landlock_an_ordinary_user_runs_nothing_and_kills_nobody(version: int) -> None:
    """Without a fence around signals the end of a run would be the end of all that have its uid."""
    house = House("user", landlock=version)
    assert f"Landlock {version} keeps no signals in" in house.choice
    unfenced = {"kind": "landlock", "own_uid": False, "landlock": version}
    told = house.run("print('ran')", containment=unfenced)
    assert "expected a fence around signals" in told["refused"]
    assert house.run("print('here')", plain=True)["text"] == "here\n"
    house.close()


class TestRuns:
    def test_it_is_made_by_really_trying(self, house: House) -> None:
        uid = {"docker": "an own uid", "user": "the SDK's uid"}[house.kind]
        assert house.choice.startswith(f"Landlock {landlock.version()}, seccomp and {uid}; lost: network")

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
        assert house.run(program)["text"] == "192 1\n"

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
        # A bomb may leave the helper that asks what forks share no time: then they count in full.
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

    def test_memory_that_forks_share_counts_once(self, house: House) -> None:
        told = house.run(
            "import os, time\nx = bytearray(60 << 20)\nfor n in range(5):\n    if os.fork() == 0:\n"
            "        time.sleep(.3); os._exit(0)\ntime.sleep(.4); print('done')"
        )
        assert (told["text"], told["killed_by"]) == ("done\n", None)
        assert told["peak"] < 192 << 20

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
