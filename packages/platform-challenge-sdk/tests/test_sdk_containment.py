"""What a submission can and cannot do in a contained run."""
# ruff: noqa: E501 - a line of a submission's program stays one line

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from platform_challenge_sdk import ContainmentUnavailable, Outcome, Submission
from platform_challenge_sdk.contained import MIB, Order, describe_end, run_contained
from platform_challenge_sdk.recipe import OUTPUT_BYTES

Run = Callable[..., Outcome]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A submission's folder, which anyone may read as the SDK's is."""
    made = tmp_path / "submission"
    made.mkdir()
    made.chmod(0o755)
    return made


@pytest.fixture
def run(folder: Path) -> Run:
    """Runs a Python program as a submission."""

    def run_program(program: str, **options: Any) -> Outcome:
        (folder / "main.py").write_text(program)
        settings: dict[str, Any] = {
            "stdin": b"",
            "timeout": 20.0,
            "memory": 256 * MIB,
            "files": {},
            "disk": 16 * MIB,
        } | options
        return run_contained(Order(argv=["python3", "main.py"], submission=folder, **settings))

    return run_program


def children() -> set[str]:
    """Our children."""
    return {
        pid for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    }


class TestRuns:
    def test_it_sees_its_files_its_input_and_its_exit_code(self, run: Run) -> None:
        outcome = run(
            "import sys; print(open('/workspace/a.txt').read() + sys.stdin.read()); sys.exit(3)",
            stdin=b"in",
            files={"a.txt": b"file "},
        )
        assert (outcome.text, outcome.exit, outcome.killed_by, outcome.ok) == ("file in\n", 3, None, False)
        assert describe_end(outcome) == "the submission ended with exit code 3"

    def test_usage_is_measured_over_the_whole_tree(self, run: Run) -> None:
        outcome = run(
            "import os, time\nif os.fork() == 0:\n    os.setsid(); end = time.process_time() + .2\n"
            "    x = bytearray(64 << 20)\n    while time.process_time() < end: pass\n    os._exit(0)\nos.wait()"
        )
        assert outcome.ok
        assert outcome.usage.cpu_time_ms >= 200
        assert outcome.usage.wall_ms >= 200
        assert outcome.usage.memory_peak_bytes >= 64 * MIB

    @pytest.mark.robustness(22, "tmpfs-filler")
    def test_its_folder_is_read_only_and_what_it_writes_elsewhere_is_small_and_gone(self, run: Run) -> None:
        outcome = run(
            "import os\n"
            "for path in ('/submission/x', '/usr/x', '/x', '/dev/x', '/etc/x', '/proc/sys/kernel/core_pattern'):\n"
            "    try: open(path, 'w'); print('wrote', path)\n    except OSError: pass\n"
            "count = 0\n"
            "try:\n    for name in ('/workspace/a', '/tmp/a', '/dev/shm/a'):\n"
            "        with open(name, 'wb') as file:\n            while True: count += file.write(bytes(1 << 20))\n"
            "except OSError as error: print(error.strerror, count >> 20)",
            disk=4 * MIB,
        )
        assert outcome.text.startswith("File too large") or outcome.text.startswith("No space left")
        assert int(outcome.text.split()[-1]) <= 4
        assert run("import os; print(os.listdir('/workspace'), os.listdir('/tmp'))").text == "[] []\n"

    @pytest.mark.parametrize(
        "step", ["open(f'/tmp/{n}', 'w').close()", "os.mkdir('d'); os.chdir('d')"], ids=["files", "folders"]
    )
    @pytest.mark.robustness(22, "small-files", "deep-directories")
    def test_a_million_small_files_or_folders_in_folders_do_not_fit(self, run: Run, step: str) -> None:
        outcome = run(
            f"import os\nos.chdir('/tmp')\ntry:\n    for n in range(10**6): {step}\n"
            "except OSError as error: print(error.strerror, n)"
        )
        assert outcome.text.startswith("No space left")

    def test_threads_processes_and_locks_work(self, run: Run) -> None:
        program = (
            "import multiprocessing, subprocess, threading\n"
            "lock = multiprocessing.Lock()\n"
            "thread = threading.Thread(target=lambda: print('thread', flush=True)); thread.start(); thread.join()\n"
            "print(subprocess.run(['echo', 'process'], capture_output=True, text=True).stdout)"
        )
        assert run(program).text == "thread\nprocess\n\n"

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({"files": {"../a": b""}}, "plain file name"),
            ({"files": {"a": bytes(17 * MIB)}}, "at most disk"),
            ({"timeout": 0}, "more than 0"),
        ],
    )
    def test_orders_that_make_no_sense_are_refused(
        self, run: Run, wrong: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            run("", **wrong)

    def test_a_command_that_is_not_there_is_the_submissions_failure(self, folder: Path) -> None:
        outcome = Submission(folder, "0" * 64).run_sync(["nothing-here"])
        assert (outcome.exit, outcome.killed_by) == (127, None)
        assert b"nothing-here: No such file" in outcome.stderr

    async def test_network_is_refused_rather_than_forgotten(self, folder: Path) -> None:
        with pytest.raises(ContainmentUnavailable, match="nothing may go out"):
            await Submission(folder, "0" * 64).run(["true"], network=True)

    async def test_cancelling_a_run_kills_it(self, folder: Path) -> None:
        before = children()
        running = asyncio.ensure_future(Submission(folder, "0" * 64).run(["sleep", "50"]))
        await until(lambda: children() != before)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            async with asyncio.timeout(60):
                await running
        assert children() <= before

    def test_the_end_of_its_job_kills_it(self, folder: Path) -> None:
        ended = threading.Event()
        ended.set()
        outcome = Submission(folder, "0" * 64, ended=ended).run_sync(["sleep", "50"])
        assert outcome.killed_by == "cancelled"


class TestMalice:
    @pytest.mark.slow  # 128 processes that fork as they are killed, on the cores that are left
    @pytest.mark.robustness(22, "fork-bomb", "ignored-sigterm", "cpu-spin")
    def test_a_fork_bomb_ends_with_its_time_and_leaves_nothing(self, run: Run) -> None:
        before = children()
        outcome = run(
            "import os, signal\nfor n in range(1, 64):\n    if n not in (9, 19, 32, 33): signal.signal(n, signal.SIG_IGN)\n"
            "while True:\n    try:\n        os.fork(); os.setsid()\n    except OSError: pass",
            timeout=0.5,
        )
        assert outcome.killed_by == "timeout"
        assert describe_end(outcome) == "the submission did not end in time and was killed"
        assert children() <= before

    @pytest.mark.robustness(22, "fork-bomb", "thread-bomb")
    def test_it_may_have_so_many_processes_and_no_more(self, run: Run) -> None:
        outcome = run(
            "import os, time\nn = 0\ntry:\n    while True:\n"
            "        if os.fork() == 0: time.sleep(50)\n        n += 1\nexcept OSError as error: print(n, error.strerror)"
        )
        count, why = outcome.text.split(" ", 1)
        assert 64 < int(count) < 128
        assert why == "Resource temporarily unavailable\n"

    @pytest.mark.robustness(22, "memory-hog")
    def test_it_may_have_so_many_terminals_and_no_more(self, run: Run) -> None:
        """They work, and the kernel's few thousand are not one submission's."""
        outcome = run(
            "import os\n"
            "main, worker = os.openpty()\n"
            "os.write(main, b'line\\n'); print(os.read(worker, 100), os.ttyname(worker))\n"
            "count = 1\n"
            "try:\n"
            "    while True: os.open('/dev/ptmx', os.O_RDWR | os.O_NOCTTY); count += 1\n"
            "except OSError as error: print(count, error.strerror)"
        )
        assert outcome.text == "b'line\\n' /dev/pts/0\n32 No space left on device\n", outcome.stderr

    def test_one_process_cannot_have_more_than_its_memory(self, run: Run) -> None:
        outcome = run("x = bytearray(300 << 20)")
        assert outcome.exit == 1
        assert b"MemoryError" in outcome.stderr

    @pytest.mark.robustness(22, "memory-hog")
    def test_many_processes_together_cannot_have_more_memory(self, run: Run) -> None:
        outcome = run(
            "import os, time\nfor n in range(6):\n    if os.fork() == 0:\n"
            "        x = bytearray(40 << 20); time.sleep(50)\ntime.sleep(50)",
            memory=128 * MIB,
        )
        assert outcome.killed_by == "memory"

    def test_memory_that_forks_share_counts_once(self, run: Run) -> None:
        outcome = run(
            "import os, time\nx = bytearray(60 << 20)\nfor n in range(5):\n    if os.fork() == 0:\n"
            "        time.sleep(.3); os._exit(0)\ntime.sleep(.4); print('done')",
            memory=128 * MIB,
        )
        assert outcome.text == "done\n"

    @pytest.mark.robustness(24, "10-gb")
    def test_a_flood_of_output_ends_it_and_is_kept_up_to_the_limit(self, run: Run) -> None:
        outcome = run("import os\nwhile True: os.write(1, b'x' * 65536); os.write(2, b'y' * 65536)")
        assert outcome.killed_by == "output"
        assert len(outcome.stdout) + len(outcome.stderr) == OUTPUT_BYTES

    def test_closing_its_outputs_does_not_hide_that_it_never_returns(self, run: Run) -> None:
        outcome = run("import os, time\nos.close(1); os.close(2)\ntime.sleep(50)", timeout=0.3)
        assert outcome.killed_by == "timeout"

    def test_input_that_it_does_not_read_holds_nobody_up(self, run: Run) -> None:
        assert run("print('early')", stdin=bytes(8 * MIB)).text == "early\n"

    @pytest.mark.robustness(22, "double-fork")
    def test_a_daemon_does_not_survive_it(self, run: Run) -> None:
        before = children()
        outcome = run(
            "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n"
            "        os.close(1); os.close(2); time.sleep(50)\n    os._exit(0)\nos.wait(); print('left one')"
        )
        assert outcome.text == "left one\n"
        assert outcome.usage.wall_ms < 10_000
        assert children() <= before

    @pytest.mark.parametrize("number", [9, 11, 15])
    def test_a_signal_is_named(self, run: Run, number: int) -> None:
        outcome = run(f"import os; os.kill(os.getpid(), {number})")
        assert (outcome.killed_by, outcome.exit) == (f"signal:{number}", 128 + number)

    @pytest.mark.robustness(23, "metadata", "raw-sockets")
    def test_there_is_no_network_and_no_vsock(self, run: Run) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            outcome = run(
                "import socket\n"
                f"for address in (('127.0.0.1', {listener.getsockname()[1]}), ('10.0.2.2', 80), ('1.1.1.1', 53), ('169.254.169.254', 80)):\n"
                "    try: socket.create_connection(address, 1); print('reached', address)\n    except OSError: pass\n"
                "for family in (40, 38, 17, 44):\n"
                "    try: socket.socket(family, socket.SOCK_RAW); print('made', family)\n    except OSError: pass\n"
            )
        assert (outcome.stdout, outcome.stderr) == (b"", b"")

    def test_the_kernels_odd_corners_are_closed(self, run: Run) -> None:
        outcome = run(
            "import ctypes\nlibc = ctypes.CDLL(None)\n"
            "calls = dict(unshare=(272, 0x10000000), clone=(56, 0x10000011), ptrace=(101, 16, 1), bpf=(321, 0),\n"
            "  keyctl=(250, 0), uring=(425, 8, 0), mount=(165, b'', b'/tmp', b'tmpfs'), chroot=(161, b'/tmp'),\n"
            "  userfault=(323, 0), personality=(135, 0), clone3=(435, 0, 0), unknown=(467, 0))\n"
            "for name, call in calls.items():\n    if libc.syscall(*call) != -1: print(name)"
        )
        assert (outcome.stdout, outcome.stderr, outcome.killed_by) == (b"", b"", None)

    def test_neither_the_sdk_nor_user_config_nor_its_environment_can_be_read(
        self, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secret = tmp_path / "user-config"
        secret.write_text("canary")
        monkeypatch.setenv("CANARY", "canary")
        outcome = run(
            "import os\n"
            f"for path in ({str(secret)!r}, '/dstack/.host-shared/.user-config', '/var/run/dstack.sock', '/run', '/root/.ssh'):\n"
            "    if os.path.exists(path): print(path)\n"
            "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
            "    for name in ('environ', 'cmdline', 'mem', 'maps', 'cwd', 'root'):\n"
            "        try:\n            with open(f'/proc/{pid}/{name}', 'rb') as file: data = file.read(65536)\n"
            "        except OSError: continue\n"
            "        if b'canary' in data or b'contained-' in data: print(pid, name, data)\n"
            "print(sorted(map(int, filter(str.isdigit, os.listdir('/proc')))), os.listdir('/proc/self/fd'))\n"
        )
        assert outcome.text == "[1, 2] ['0', '1', '2', '3']\n"

    def test_no_core_file_and_no_handler_of_one_sees_it_crash(self, run: Run) -> None:
        outcome = run(
            "import os, resource\n"
            "for limits in ((0, 0), (0, 1), (-1, -1)):\n"
            "    try: resource.setrlimit(resource.RLIMIT_CORE, limits)\n    except ValueError: pass\n"
            "print(resource.getrlimit(resource.RLIMIT_CORE), flush=True)\n"
            "os.chdir('/tmp')\nif os.fork() == 0: os.abort()\nprint(os.wait()[1], os.listdir())"
        )
        # Bit 7 of the status would say that a core was written, or handed over.
        assert outcome.text == "(1, 1)\n6 []\n"

    def test_its_namespaces_are_its_own(self, run: Run) -> None:
        """But for two in which there is nothing to do: clocks, and the names of control groups."""
        outcome = run(
            "import os\nfor name in sorted(os.listdir('/proc/self/ns')): print(name, os.readlink('/proc/self/ns/' + name))"
        )
        inside = dict(line.split() for line in outcome.text.splitlines())
        outside = {name: str(Path("/proc/self/ns", name).readlink()) for name in inside}
        shared = {name for name in inside if inside[name] == outside[name]}
        assert {"user", "pid", "mnt", "net", "ipc", "uts"} <= set(inside)
        assert shared <= {"time", "time_for_children", "cgroup"}

    def test_it_runs_without_capabilities_and_first_in_line_for_the_kernels_killer(self, run: Run) -> None:
        outcome = run(
            "print(open('/proc/self/oom_score_adj').read().strip())\n"
            "for line in open('/proc/self/status'):\n"
            "    if line.startswith(('CapEff', 'CapBnd', 'NoNewPrivs', 'Seccomp:')): print(line.split()[1])"
        )
        assert outcome.text.split() == ["1000", "0" * 16, "0" * 16, "1", "2"]

    @pytest.mark.needs("root", why="only root's number is left behind")
    def test_it_is_not_the_kernels_uid_0_even_when_we_are(self, run: Run) -> None:
        seen = run("import os; print(os.stat('/usr').st_uid)").text
        assert seen == "65534\n"
