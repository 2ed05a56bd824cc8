"""The guest's system call filter: its verdicts by an interpreter, and programs under it in real guests."""

from __future__ import annotations

import errno
import json
import os
import struct
import sys

import pytest
from guests import Guests

from platform_challenge_sdk import syscalls as submission
from platform_vmm.sandbox.syscall_table import MACHINES, allowed, refused
from platform_vmm.sandbox.syscalls import AUDIT, guest_filter

ALLOW, KILL, REFUSE = 0x7FFF0000, 0x80000000, 0x00050000
MOST_STEPS = 4096


def verdict(program: bytes, number: int, *arguments: int, audit: int) -> int:
    """What the kernel would decide; a jump out of the program, or no end, is an error here as there."""
    data = struct.pack("=iIQ6Q", number, audit, 0, *arguments, *[0] * (6 - len(arguments)))
    accumulator, at = 0, 0
    while True:
        code, yes, no, value = struct.unpack_from("=HBBI", program, at * 8)
        at += 1
        if code == 0x06:
            return int(value)
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, value)
        else:
            holds = {0x15: accumulator == value, 0x25: accumulator > value, 0x35: accumulator >= value}[code]
            at += yes if holds else no


@pytest.mark.parametrize("machine", MACHINES)
class TestVerdicts:
    def test_each_number_up_to_a_thousand_is_as_the_tables_say(self, machine: str) -> None:
        """Allowed, refused by name, or not there; tomorrow's calls are not there."""
        program, audit = guest_filter(machine) or b"", AUDIT[machine]
        assert 0 < len(program) // 8 < MOST_STEPS
        good, bad = set(allowed(machine).values()), set(refused(machine).values())
        assert not good & bad
        for number in range(1000):
            of_a_family = {allowed(machine)[name] for name in ("socket", "socketpair")}
            arguments = (1, 1, 0) if number in of_a_family else ()
            found = verdict(program, number, *arguments, audit=audit)
            expected = REFUSE | errno.EPERM if number in bad else REFUSE | errno.ENOSYS
            assert found == (ALLOW if number in good else expected), number

    def test_what_reaches_past_the_guest_is_on_no_list_of_what_is_allowed(self, machine: str) -> None:
        dangerous = (
            "ptrace process_vm_readv process_vm_writev pidfd_getfd bpf io_uring_setup io_uring_enter keyctl "
            "userfaultfd perf_event_open kexec_load init_module reboot open_by_handle_at clone3 personality "
            "fsopen fsmount move_mount open_tree mount_setattr syslog acct swapon clock_settime iopl "
            "vmsplice io_setup io_submit"  # the kernel has 65,536 events for all of its users together
        )
        assert not set(dangerous.split()) & set(allowed(machine))

    def test_all_that_a_submission_may_do_its_sdk_may_do_by_the_same_numbers(self, machine: str) -> None:
        """Two tables, for two parts that know nothing of each other: they must not drift apart."""
        assert submission.numbers(machine).items() <= allowed(machine).items()

    def test_sockets_are_unix_internet_and_route_netlink(self, machine: str) -> None:
        program, audit, call = guest_filter(machine) or b"", AUDIT[machine], allowed(machine)["socket"]
        for family in range(64):
            found = verdict(program, call, family, 1, 0, audit=audit)
            assert found == (ALLOW if family in {1, 2, 10, 16} else REFUSE | errno.EAFNOSUPPORT), family
        for protocol in (4, 12, 15, 16):
            found = verdict(program, call, 16, 3, protocol, audit=audit)
            assert found == REFUSE | errno.EAFNOSUPPORT, protocol

    def test_pairs_of_sockets_are_unix(self, machine: str) -> None:
        """TIPC has pairs too, and for any family the kernel would load a module before it says no."""
        program, audit, call = guest_filter(machine) or b"", AUDIT[machine], allowed(machine)["socketpair"]
        for family in range(64):
            found = verdict(program, call, family, 1, 0, audit=audit)
            assert found == (ALLOW if family == 1 else REFUSE | errno.EAFNOSUPPORT), family

    def test_words_cannot_be_put_into_a_terminal(self, machine: str) -> None:
        program, audit, call = guest_filter(machine) or b"", AUDIT[machine], allowed(machine)["ioctl"]
        assert verdict(program, call, 0, 0x5401, audit=audit) == ALLOW
        for request in (0x5412, 0x541C, 0x5412 | 1 << 32):
            assert verdict(program, call, 0, request, audit=audit) == REFUSE | errno.EPERM

    def test_no_lease_keeps_others_from_opening_a_file(self, machine: str) -> None:
        program, audit, call = guest_filter(machine) or b"", AUDIT[machine], allowed(machine)["fcntl"]
        assert verdict(program, call, 3, 1024, 1, audit=audit) == REFUSE | errno.EPERM
        assert {verdict(program, call, 3, known, audit=audit) for known in (0, 6, 1025, 1030)} == {ALLOW}

    def test_the_limit_of_core_dumps_can_be_asked_for_and_not_changed(self, machine: str) -> None:
        """Said to be done, so that a program that sets it to 0 goes on; another limit is really set."""
        program, audit, calls = guest_filter(machine) or b"", AUDIT[machine], allowed(machine)
        for limit in (1, 2**32, 2**40 + 8):
            assert verdict(program, calls["prlimit64"], 0, 4, limit, audit=audit) == REFUSE
        assert verdict(program, calls["prlimit64"], 0, 4, 0, 8, audit=audit) == ALLOW
        assert verdict(program, calls["prlimit64"], 0, 7, 8, audit=audit) == ALLOW
        assert verdict(program, calls["setrlimit"], 4, 8, audit=audit) == REFUSE
        assert verdict(program, calls["setrlimit"], 7, 8, audit=audit) == ALLOW

    def test_other_calling_conventions_kill(self, machine: str) -> None:
        program, audit = guest_filter(machine) or b"", AUDIT[machine]
        others = (0x40000003, 0x40000028, *(AUDIT[other] for other in MACHINES if other != machine))
        assert {verdict(program, 39, audit=other) for other in others} == {KILL}
        assert verdict(program, 0x40000000 + 39, audit=audit) == KILL


def test_an_unknown_machine_has_no_filter() -> None:
    """The driver then says so."""
    assert guest_filter("riscv64") is None


CALLS = """
import ctypes, errno, json, mmap, os
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
def call(number, *arguments):
    ctypes.set_errno(0)
    done = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(one) for one in arguments))
    return 'ok' if done >= 0 else errno.errorcode.get(ctypes.get_errno(), '?')
def dies(action):
    pid = os.fork()
    if pid == 0:
        action()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
"""


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="numbers and machine code of x86-64")
async def test_in_a_guest_what_is_refused_is_refused_and_what_is_unknown_is_not_there(guests: Guests) -> None:
    """By number, past any libc; and code that uses the 32-bit gate is killed by SIGSYS."""
    numbers = list(refused("x86_64").values())
    found = await guests.run(
        CALLS
        + f"""
def gate():
    code = mmap.mmap(-1, 4096, prot=7)
    code.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')
    ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))()
print(json.dumps({{
    'refused': sorted({{call(number, -1, -1, -1, -1, -1) for number in {numbers}}}),
    'absent': [call(number, 0, 0, 0, 0, 0) for number in (206, 425, 428, 430, 432, 435, 467, 999)],
    'lease': [call(72, os.open('/tmp/own', os.O_CREAT | os.O_RDONLY), 1024, kind) for kind in (0, 1)],
    'pairs': [call(53, family, 1, 0, 0) for family in (2, 16, 30, 40)],
    'gate': dies(gate),
    'tty': [call(16, 0, 0x5412, 0), call(16, 0, 0x541C, 0)],
    'personality': call(135, 0xFFFFFFFF),
}}))
"""
    )
    assert found == {
        "refused": ["EPERM"],
        "absent": ["ENOSYS"] * 8,
        "lease": ["EPERM"] * 2,
        "pairs": ["EAFNOSUPPORT"] * 4,
        "gate": -31,
        "tty": ["EPERM", "EPERM"],
        "personality": "EPERM",
    }


ORDINARY = """
import asyncio, json, mmap, multiprocessing, os, select, shutil, signal, socket, sqlite3, subprocess
import sys, tempfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import shared_memory

def square(number):
    return number * number

def threads():
    with ThreadPoolExecutor(8) as pool:
        return sum(pool.map(square, range(100)))

async def gather():
    server = await asyncio.start_server(lambda r, w: w.close(), '127.0.0.1', 0)
    port = server.sockets[0].getsockname()[1]
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    end = await reader.read()
    writer.close()
    child = await asyncio.create_subprocess_exec('/bin/echo', 'x', stdout=-1)
    out, _ = await child.communicate()
    server.close()
    return [end.decode(), out.decode(), await asyncio.to_thread(square, 3)]

def processes():
    context = multiprocessing.get_context('fork')
    with context.Pool(2) as pool:
        found = pool.map(square, range(5))
    spawned = multiprocessing.get_context('spawn').get_start_method()
    words = context.Queue()
    child = context.Process(target=words.put, args=(7,))
    child.start()
    found.append(words.get(timeout=10))
    child.join()
    block = shared_memory.SharedMemory(create=True, size=4096)
    block.buf[0] = 9
    found.append(block.buf[0])
    block.close()
    block.unlink()
    return found

def database():
    with tempfile.TemporaryDirectory() as folder, sqlite3.connect(folder + '/db') as base:
        base.execute('pragma journal_mode=wal')
        base.execute('create table t (x)')
        base.executemany('insert into t values (?)', [(n,) for n in range(1000)])
        base.commit()
        return base.execute('select sum(x) from t').fetchone()[0]

def memory():
    big = mmap.mmap(-1, 64 * 2**20)
    big.madvise(mmap.MADV_HUGEPAGE)
    big[::4096] = b'x' * (len(big) // 4096)
    big.madvise(mmap.MADV_DONTNEED)
    shared = os.memfd_create('x')
    os.ftruncate(shared, 8192)
    mmap.mmap(shared, 8192)[0:1] = b'y'
    return [big[0], os.pread(shared, 1, 0).decode()]

def files():
    os.chdir(tempfile.mkdtemp())
    os.mkfifo('fifo'), os.symlink('a', 'link'), os.mkdir('d')
    with open('a', 'wb') as one:
        os.posix_fallocate(one.fileno(), 0, 100)
    shutil.copyfile('/usr/bin/env', 'b')
    return [sorted(os.listdir('.')), os.statvfs('.').f_bsize > 0]

def signals():
    seen = []
    signal.signal(signal.SIGALRM, lambda *_: seen.append('alarm'))
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    signal.pause()
    watch = os.pidfd_open(os.getpid())
    poll = select.epoll()
    poll.register(socket.socketpair()[0])
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
    os.kill(os.getpid(), signal.SIGUSR1)
    return [*seen, signal.sigtimedwait({signal.SIGUSR1}, 1).si_signo == signal.SIGUSR1]

if __name__ == '__main__':
    print(json.dumps({
        'threads': threads(), 'asyncio': asyncio.run(gather()), 'processes': processes(),
        'sqlite': database(), 'memory': memory(), 'files': files(), 'signals': signals(),
        'version': sys.version,
        'shell': subprocess.check_output(['sh', '-c', 'echo a b | tr a-z A-Z | sort -r; ls /usr >/dev/null'],
                                         text=True),
    }))
"""


async def test_ordinary_programs_run_under_the_filter(guests: Guests) -> None:
    """Threads, asyncio, processes, shared memory, SQLite with its log, large maps, timers, a shell."""
    found = await guests.run(ORDINARY)
    assert found == {
        "threads": 328350,
        "asyncio": ["", "x\n", 9],
        "processes": [0, 1, 4, 9, 16, 7, 9],
        "sqlite": 499500,
        "memory": [120, "y"],
        "files": [["a", "b", "d", "fifo", "link"], True],
        "signals": ["alarm", True],
        "version": sys.version,
        "shell": "A B\n",
    }


BOTH = """
import json, pathlib
from platform_challenge_sdk.contained import MIB, Order, run_contained

inner = '''
import ctypes, json, os, subprocess, threading
libc = ctypes.CDLL(None, use_errno=True)
worker = threading.Thread(target=print); worker.start(); worker.join()
status = dict(line.split(':', 1) for line in open('/proc/self/status'))
print(json.dumps([libc.unshare(0x10000000), status['Seccomp_filters'].strip(), os.getuid(),
                  subprocess.check_output(['echo', 'x']).decode()]))
'''
order = Order(argv=['python3', '-c', inner], submission=pathlib.Path('/tmp'), stdin=b'', timeout=30,
              memory=256 * MIB, files={}, disk=16 * MIB)
outcome = run_contained(order)
print(json.dumps([outcome.exit, outcome.stdout.decode(), outcome.stderr.decode(), outcome.killed_by]))
"""


async def test_a_submission_runs_under_both_filters(guests: Guests) -> None:
    """The SDK makes its sandbox under the first filter and loads the second; the run's threads work."""
    exit_code, out, err, killed = await guests.run([guests.runtime.boot[0], "-c", BOTH], memory=512)
    assert (exit_code, killed) == (0, None), err
    assert json.loads(out.splitlines()[-1]) == [-1, "2", 1000, "x\n"]
