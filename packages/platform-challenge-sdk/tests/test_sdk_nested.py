"""Contained runs inside a sandbox like the local VMM's."""
# ruff: noqa: E501 - a line of a submission's program stays one line

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

import platform_challenge_sdk
import platform_protocol
from platform_challenge_sdk import stage
from platform_challenge_sdk.contained import MIB

NESTED = """
import json, os, sys
from pathlib import Path
from platform_challenge_sdk.contained import MIB, Order, run_contained

folder = Path("/tmp/submission")
folder.mkdir()
Path("/tmp/user-config").write_text("canary")
told = [os.getuid()]
for program, memory in json.loads(sys.argv[1]):
    (folder / "main.py").write_text(program)
    outcome = run_contained(Order(["python3", "main.py"], folder, b"", 5.0, memory * MIB, {}, 16 * MIB))
    told.append([outcome.text, outcome.killed_by])
print(json.dumps(told))
"""


@pytest.mark.slow  # three processes deep, three times
@pytest.mark.needs("root", why="it makes the outer sandbox")
class TestNested:
    def test_it_works_as_uid_1000_without_capabilities_inside_the_vmms_sandbox(self) -> None:
        programs = [
            (
                "import os; print(os.path.exists('/tmp/user-config'), sorted(map(int, filter(str.isdigit, os.listdir('/proc')))))",
                128,
            ),
            (
                "import os\nn = 0\ntry:\n    while os.fork(): n += 1\n    import time; time.sleep(50)\nexcept OSError: print(64 < n < 128)",
                512,
            ),
            (
                "import os, time\nfor n in range(6):\n    if os.fork() == 0:\n        x = bytearray(40 << 20); time.sleep(50)\ntime.sleep(50)",
                128,
            ),
            (
                "import os, time\nx = bytearray(60 << 20)\nfor n in range(5):\n    if os.fork() == 0:\n        time.sleep(.3); os._exit(0)\ntime.sleep(.4); print('done')",
                128,
            ),
        ]
        told = self.in_a_sandbox(NESTED, json.dumps(programs))
        assert told == [1000, ["False [1, 2]\n", None], ["True\n", None], ["", "memory"], ["done\n", None]]

    def test_its_way_out_works_inside_the_vmms_sandbox_too(self) -> None:
        program = (
            "import json, os, socket, threading\nfrom pathlib import Path\n"
            "from platform_challenge_sdk import Submission\n"
            "from platform_challenge_sdk.means import Means, read_egress\n"
            "proxy = socket.create_server(('127.0.0.1', 0))\n"
            "def answer():\n    connection, _ = proxy.accept()\n    head = connection.recv(9999)\n"
            "    connection.sendall(b'HTTP/1.1 200 OK\\r\\n\\r\\n' + head); connection.close()\n"
            "threading.Thread(target=answer, daemon=True).start()\n"
            "url = f'http://vm:secret@127.0.0.1:{proxy.getsockname()[1]}'\n"
            "Path('/tmp/submission').mkdir()\n"
            "submission = Submission(Path('/tmp/submission'), '', means=Means(None, read_egress(url, 'http://v:1')))\n"
            "ask = \"import urllib.request; print(urllib.request.urlopen('http://a.example/').read().decode())\"\n"
            "print(json.dumps(submission.run_sync(['python3', '-c', ask], network=True, disk=1 << 20).text))"
        )
        told = self.in_a_sandbox(program, "")
        assert told.startswith("GET http://a.example/ HTTP/1.1")
        assert "Proxy-Authorization: Basic dm06c2VjcmV0" in told

    def test_where_namespaces_are_refused_it_falls_back_and_tells_once_what_is_lost(self) -> None:
        program = (
            "import json, os\nfrom pathlib import Path\n"
            "from platform_challenge_sdk import Submission\n"
            "Path('/tmp/submission').mkdir()\ntold = []\n"
            "submission = Submission(Path('/tmp/submission'), '', warn=told.append)\n"
            "found = [submission.run_sync(['sh', '-c', 'true < /tmp/submission/../../etc/ld.so.cache && echo ran'], disk=1 << 20).text for _ in range(2)]\n"
            "print(json.dumps([told, found]))"
        )
        told, found = self.in_a_sandbox(program, "", "--disable-userns")
        assert found == ["ran\n", "ran\n"]
        assert len(told) == 1
        assert "contained by Landlock" in told[0]
        assert "lost: network, paths" in told[0]

    @staticmethod
    def in_a_sandbox(program: str, argument: str, *more: str) -> Any:
        """What a program prints, as JSON, as uid 1000 in the sandbox of the local VMM's recipe."""
        room = Path(tempfile.mkdtemp())
        packages = [
            str(Path(module.__file__ or "").parents[1])
            for module in (platform_challenge_sdk, platform_protocol)
        ]
        binds = [(path, f"b{index}") for index, path in enumerate([sys.base_prefix, sys.prefix, *packages])]
        words = ["--unshare-user", "--uid", "1000", "--gid", "1000", "--unshare-pid", "--unshare-ipc", *more]
        words += ["--unshare-net", "--cap-drop", "ALL", "--die-with-parent", "--new-session", "--clearenv"]
        words += ["--ro-bind", "/usr", "/usr", "--symlink", "usr/bin", "/bin", "--symlink", "usr/lib", "/lib"]
        words += ["--symlink", "usr/lib64", "/lib64", "--dir", "/etc"]
        words += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
        # /tmp first: a checkout below it must stay visible.
        words += [
            "--proc",
            "/proc",
            "--dev",
            "/dev",
            "--remount-ro",
            "/dev",
            "--bind",
            f"{room}/disk/tmp",
            "/tmp",
        ]
        for path, name in binds:
            words += ["--ro-bind", f"{room}/{name}", path]
        words += ["--remount-ro", "/", "--", sys.executable, "-c", program, argument]
        ours, theirs = socket.socketpair()
        config = {
            "bwrap": "/usr/bin/bwrap",
            "arguments": words,
            "inherit": [],
            "room": str(room),
            "binds": binds,
            "disk": 64 * MIB,
            "memory": 1024 * MIB,
            "timeout": 40,
            "rlimits": {"NPROC": 256},
            "uid": 61_999,
            "control": theirs.fileno(),
        }
        read, write = os.pipe()
        os.write(write, json.dumps(config).encode())
        os.close(write)
        with ours, theirs:
            done = subprocess.run(
                [sys.executable, "-I", "-S", str(stage.__file__), str(read)],
                pass_fds=[read, theirs.fileno()],
                capture_output=True,
                timeout=50,
                check=True,
            )
            report = ours.recv(65536)
        os.close(read)
        room.rmdir()
        assert done.stdout, (done.stderr, report)
        return json.loads(done.stdout)
