"""The submission's system call filter: each verdict by an interpreter, and ordinary programs under it."""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from pathlib import Path

import pytest
from static_program import two_threads

from platform_challenge_sdk.contained import MIB, Order, Outcome, run_contained
from platform_challenge_sdk.seccomp import AUDIT, Walls, submission_filter
from platform_challenge_sdk.syscalls import MACHINES, numbers

ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
OPEN, CLOSED = Walls(), Walls(network=False, mounts=False, identity=False, truncation=False)


def verdict(program: bytes, number: int, *arguments: int, audit: int) -> int:
    """What the kernel would decide: the classic BPF instructions that a filter may have."""
    data = struct.pack("=iIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator, at = 0, 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", program, at * 8)
        at += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        elif code == 0x54:
            accumulator &= value
        else:
            holds = {
                0x15: accumulator == value,
                0x25: accumulator > value,
                0x35: accumulator >= value,
                0x45: bool(accumulator & value),
            }[code]
            at += yes if holds else no


@pytest.mark.parametrize("machine", MACHINES)
class TestVerdicts:
    def test_what_the_table_does_not_name_does_not_exist(self, machine: str) -> None:
        program, known = submission_filter(machine=machine), set(numbers(machine).values())
        for number in {*range(600), 2**30 - 1} - known:
            found = verdict(program, number, audit=AUDIT[machine])
            assert found == REFUSE | errno.ENOSYS, number

    def test_what_it_names_is_allowed_with_arguments_that_are_zero_or_ordinary(self, machine: str) -> None:
        program = submission_filter(machine=machine)
        for name, number in numbers(machine).items():
            arguments = (1, 1, 0) if name in {"socket", "socketpair"} else ()
            assert verdict(program, number, *arguments, audit=AUDIT[machine]) == ALLOW, name

    def test_another_machines_calls_and_x32s_kill(self, machine: str) -> None:
        program = submission_filter(machine=machine)
        others = (0x40000003, 0x40000028, *(AUDIT[other] for other in MACHINES if other != machine))
        for other in others:
            assert verdict(program, 1, audit=other) == KILL
        assert verdict(program, 0x40000001, audit=AUDIT[machine]) == KILL

    def test_what_makes_namespaces_reaches_devices_or_other_processes_is_not_named(
        self, machine: str
    ) -> None:
        dangerous = (
            "ptrace mount umount2 pivot_root chroot setns unshare bpf io_uring_setup keyctl userfaultfd "
            "perf_event_open process_vm_readv process_vm_writev pidfd_getfd kexec_load init_module reboot "
            "open_by_handle_at clone3 memfd_create shmget semget msgget mq_open seccomp personality"
        )
        assert not set(dangerous.split()) & set(numbers(machine))

    def test_arguments_decide_about_clone_sockets_and_terminals(self, machine: str) -> None:
        program, known, audit = submission_filter(machine=machine), numbers(machine), AUDIT[machine]
        for flag in (0x20000, 0x2000000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000):
            assert verdict(program, known["clone"], flag | 17, audit=audit) == REFUSE | errno.EPERM
        assert verdict(program, known["clone"], 0x3D0F00, audit=audit) == ALLOW
        for family, protocol, allowed in ((2, 0, True), (16, 0, True), (16, 12, False), (40, 0, False)):
            wanted = ALLOW if allowed else REFUSE | errno.EAFNOSUPPORT
            assert verdict(program, known["socket"], family, 3, protocol, audit=audit) == wanted
        for walls in (OPEN, CLOSED):
            pairs = submission_filter(walls, machine)
            for family in (2, 10, 16, 30, 40):
                found = verdict(pairs, known["socketpair"], family, 1, audit=audit)
                assert found == REFUSE | errno.EAFNOSUPPORT, family
            assert verdict(pairs, known["socketpair"], 1, 1, audit=audit) == ALLOW
        assert verdict(program, known["ioctl"], 0, 0x5412, audit=audit) == REFUSE | errno.EPERM
        assert verdict(program, known["fcntl"], 3, 1024, 1, audit=audit) == REFUSE | errno.EPERM

    def test_the_limit_of_core_files_can_be_read_and_not_set(self, machine: str) -> None:
        known, audit = numbers(machine), AUDIT[machine]
        for walls in (OPEN, CLOSED):
            program = submission_filter(walls, machine)
            for limit in (0x1000, 0x7F00_0000_0000):
                assert verdict(program, known["prlimit64"], 0, 4, limit, audit=audit) == REFUSE
                assert verdict(program, known["prlimit64"], 0, 7, limit, audit=audit) == ALLOW
            assert verdict(program, known["prlimit64"], 0, 4, 0, audit=audit) == ALLOW
            assert verdict(program, known["setrlimit"], 4, 1, audit=audit) == REFUSE

    def test_each_missing_wall_closes_what_it_kept_in(self, machine: str) -> None:
        program, known, audit = submission_filter(CLOSED, machine), numbers(machine), AUDIT[machine]
        closed: dict[str, tuple[int, ...]] = {
            "socket": (1, 1, 0),
            "connect": (),
            "socketpair": (1, 2, 0),
            "inotify_add_watch": (),
            "fsetxattr": (),
            "truncate": (),
            "prlimit64": (77,),
            "sched_setaffinity": (77,),
            "setpriority": (),
            "fchmodat": (),
            "utimensat": (),
        }
        for name, arguments in closed.items():
            found = verdict(program, known[name], *arguments, audit=audit)
            assert found in {REFUSE | errno.EACCES, REFUSE | errno.EPERM}, name
        opened: dict[str, tuple[int, ...]] = {"socketpair": (1, 0x80801, 0), "prlimit64": (0, 7), "read": ()}
        for name, arguments in opened.items():
            assert verdict(program, known[name], *arguments, audit=audit) == ALLOW, name


def test_a_machine_without_a_table_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"expected one of x86_64, aarch64 .*, got riscv64"):
        submission_filter(machine="riscv64")


@pytest.mark.needs("libseccomp.so.2")
def test_the_tables_numbers_are_those_that_libseccomp_has() -> None:
    """Of both machines; the calls that its version is too old to know are left out."""
    libseccomp = ctypes.CDLL("libseccomp.so.2")
    for machine in MACHINES:
        found = {
            name: libseccomp.seccomp_syscall_resolve_name_arch(ctypes.c_uint32(AUDIT[machine]), name.encode())
            for name in numbers(machine)
        }
        known = {name: number for name, number in found.items() if number >= 0}
        assert known == {name: number for name, number in numbers(machine).items() if name in known}
        assert {name for name, number in numbers(machine).items() if number < 450} <= known.keys()


PYTHON = """
import asyncio, concurrent.futures, ctypes, multiprocessing, os, shutil, sqlite3, subprocess
from multiprocessing import shared_memory

def square(x):
    return x * x

async def talk():
    async def answer(reader, writer):
        writer.write((await reader.readline()).upper())
        writer.close()
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    reader, writer = await asyncio.open_connection(*server.sockets[0].getsockname())
    writer.write(b"tcp\\n")
    print((await reader.readline()).decode().strip())
    writer.close()
    process = await asyncio.create_subprocess_exec("echo", "child", stdout=subprocess.PIPE)
    print((await process.communicate())[0].decode().strip(), await asyncio.to_thread(square, 4))

if __name__ == "__main__":
    with multiprocessing.Pool(2) as pool:
        print(pool.map(square, range(3)))
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=spawn) as pool:
        print(pool.submit(square, 3).result())
    segment = shared_memory.SharedMemory(create=True, size=100)
    segment.close(); segment.unlink()
    asyncio.run(talk())
    database = sqlite3.connect("/workspace/data")
    print(database.execute("pragma journal_mode=wal").fetchone()[0])
    os.mkfifo("/tmp/fifo")
    shutil.copy2(__file__, "/tmp/copy"); os.utime("/tmp/copy", (1, 1)); os.chmod("/tmp/copy", 0o700)
    print(ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int)(square)(5))
"""

BASH = """set -o pipefail
seq 100 | sort -rn | head -1
cat <(echo substituted)
for n in 1 2; do (echo "job $n" >> "/tmp/job$n") & done; wait; cat /tmp/job*
mkfifo /tmp/queue; echo queued > /tmp/queue & cat /tmp/queue
tar cf - -C / submission | gzip | gzip -d | tar tf - | wc -l
touch -d @1 /tmp/old; cp -a /tmp/old /tmp/new; ln -s new /tmp/link; stat -Lc %Y /tmp/link
"""

NODE = """
const { Worker } = require("worker_threads");
console.log(require("child_process").execSync("echo child").toString().trim());
new Worker("console.log('worker')", { eval: true });
const server = require("net").createServer((c) => c.end("tcp")).listen(0, "127.0.0.1", () =>
  require("net").connect(server.address().port, "127.0.0.1").on("data", (d) => {
    console.log(`${d}`);
    server.close();
  }));
"""


class TestOrdinaryPrograms:
    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        made = tmp_path / "submission"
        made.mkdir()
        made.chmod(0o755)
        return made

    @staticmethod
    def run(folder: Path, *argv: str, memory: int = 512 * MIB) -> Outcome:
        return run_contained(Order(argv, folder, b"", 60.0, memory, {}, 32 * MIB))

    @pytest.mark.slow(reason="three pools of Python processes")
    def test_python_with_pools_threads_asyncio_sqlite_and_callbacks(self, folder: Path) -> None:
        (folder / "main.py").write_text(PYTHON)
        outcome = self.run(folder, "python3", "main.py")
        assert (outcome.stderr, outcome.exit) == (b"", 0)
        assert outcome.text.splitlines() == ["[0, 1, 4]", "9", "TCP", "child 16", "wal", "25"]

    def test_a_static_binary_of_glibcs(self, folder: Path) -> None:
        """Such as ldconfig, which must work where libraries are broken."""
        outcome = self.run(folder, "/sbin/ldconfig", "--version")
        assert outcome.exit == 0
        assert outcome.text.startswith("ldconfig (")

    @pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86-64")
    def test_a_static_binary_that_makes_its_threads_itself(self, folder: Path) -> None:
        """As Go's runtime does, past any libc."""
        (folder / "main").write_bytes(two_threads())
        (folder / "main").chmod(0o755)
        assert self.run(folder, "./main").text == "thread\nmain\n"

    def test_bash_with_pipelines_jobs_fifos_and_archives(self, folder: Path) -> None:
        outcome = self.run(folder, "bash", "-c", BASH)
        assert (outcome.stderr, outcome.exit) == (b"", 0)
        expected = ["100", "substituted", "job 1", "job 2", "queued", "1", "1"]
        assert outcome.text.splitlines() == expected

    @pytest.mark.needs("node")
    def test_node_with_workers_children_and_sockets(self, folder: Path) -> None:
        (folder / "main.js").write_text(NODE)
        outcome = self.run(folder, "node", "main.js", memory=4096 * MIB)
        assert (outcome.stderr, outcome.exit) == (b"", 0)
        assert sorted(outcome.text.split()) == ["child", "tcp", "worker"]
