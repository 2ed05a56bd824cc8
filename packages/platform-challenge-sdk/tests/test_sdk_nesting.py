"""Runs in a container that Docker was told to let make namespaces, as an app-compose tells it: nothing falls away."""
# ruff: noqa: E501 - a line of a submission's program stays one line

from __future__ import annotations

from collections.abc import Iterator

import pytest
from fallback_house import House

from platform_challenge_sdk import landlock

pytestmark = pytest.mark.needs("root", why="it plays a container's root")


@pytest.fixture(scope="module", params=["nesting", "nesting user"])
def house(request: pytest.FixtureRequest) -> Iterator[House]:
    """As images of challenges' own mostly run, and as the runtime image does."""
    made = House(request.param)
    yield made
    made.close()


def test_namespaces_are_made(house: House) -> None:
    """Also by a container's root, who may not mount: by a user namespace in which it is root still."""
    assert house.choice == "namespaces and seccomp"


@pytest.mark.skipif(landlock.version() == 0, reason="this kernel has no Landlock to fall back to")
def test_with_covers_over_proc_it_is_less() -> None:
    """`seccomp=unconfined` alone is not enough: the kernel mounts no /proc beside one that is covered."""
    made = House("unmasked")
    assert made.choice.startswith("Landlock ")
    made.close()


def test_a_run_is_as_everywhere(house: House) -> None:
    """Its folders have their own names, it has a /proc and a /dev/shm, and it is nobody."""
    program = (
        "import multiprocessing, os, sys\n"
        "print(os.getpid() < 10, os.getuid(), open(sys.argv[1]).read(), os.listdir('/submission'))\n"
        "print([line.split()[1] for line in open('/proc/self/status') if line.startswith(('CapEff', 'Seccomp:'))])\n"
        "print(open('/proc/self/uid_map').read().split()[::2], multiprocessing.Lock().acquire())\n"
        "sys.exit(3)"
    )
    told = house.run(program, argv=["python3", "/submission/main.py", "/workspace/given"])
    assert told["text"].splitlines() == [
        "True 1000 file ['main.py']",
        "['0000000000000000', '2']",
        "['1000', '1'] True",
    ]
    assert (told["exit"], told["stderr"], told["lost"]) == (3, "", [])
    assert (told["survivors"], told["left"], told["victim"]) == (0, [], True)


ATTEMPTS = {
    "user_config": "print(open('/tmp/user-config').read())",
    "the agent's socket": "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/tmp/agent0'); print('reached')",
    "TCP": "import socket, sys; socket.create_connection(('127.0.0.1', int(sys.argv[2])), 2); print('reached')",
    "a file outside": "open('/tmp/victim', 'r+').write('x'); print('written')",
    "its own submission": "open('main.py', 'a').write('x'); print('written')",
    "the kernel's settings": "open('/proc/sys/kernel/core_pattern', 'w').write('x'); print('written')",
    "a keypress of the kernel's": "open('/proc/sysrq-trigger', 'w').write('h'); print('pressed')",
    "root": "import os; os.setuid(0); print('root')",
    "a namespace": "import ctypes, os\nif ctypes.CDLL(None, use_errno=True).unshare(0x10000000): raise OSError(ctypes.get_errno())\nprint('made')",
}


@pytest.mark.parametrize("attempt", ATTEMPTS)
def test_what_it_must_not_reach_is_not_there(house: House, attempt: str) -> None:
    """Nor is what the container's root could do."""
    told = house.run(ATTEMPTS[attempt])
    assert (told["text"], told["exit"]) == ("", 1)
    assert "Error" in told["stderr"]
    assert (told["survivors"], told["left"], told["victim"]) == (0, [], True)


def test_the_whole_tree_is_killed_when_its_time_is_up(house: House) -> None:
    """Also what ignores signals and has a session of its own."""
    program = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0: os.setsid()\n"
        "time.sleep(60)"
    )
    told = house.run(program, timeout=1.0)
    assert (told["killed_by"], told["survivors"], told["left"]) == ("timeout", 0, [])
