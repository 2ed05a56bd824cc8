"""Tries to read what belongs to the SDK: its memory, its environment, user_config. Exits 1 if it got nothing.

Says only how much it got, never what. Where it did get something, it goes on and stores the text as it is, so
that it would be scored and the leak be seen.
"""

import ctypes
import glob
import os
import socket
import sys

FILES = [
    "/dstack/.host-shared/.user-config",
    "/dstack/.host-shared/.sys-config.json",
    "/dstack/.host-shared/app-compose.json",
    "/dstack/.user-config",
    "/dstack/app-compose.json",
]
SOCKETS = ["/var/run/dstack.sock", "/run/dstack.sock", "/var/run/tappd.sock"]
PTRACE_ATTACH = 16


def others():
    """Processes that are neither this one nor the sandbox's own first process."""
    return {int(name) for name in os.listdir("/proc") if name.isdigit()} - {os.getpid(), 1}


def size_of(path, limit=4096):
    """How much of a file could be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            return len(file.read(limit))
    except OSError:
        return 0


def memory_of(process):
    """How much of a process's first readable, writable pages could be read."""
    try:
        with open(f"/proc/{process}/maps") as maps, open(f"/proc/{process}/mem", "rb", buffering=0) as memory:
            for line in maps:
                if " rw" in line:
                    memory.seek(int(line.split("-")[0], 16))
                    return len(memory.read(4096))
    except (OSError, ValueError, OverflowError):
        pass
    return 0


def attaches(process):
    """Whether a debugger could be attached."""
    return ctypes.CDLL(None).ptrace(PTRACE_ATTACH, process, 0, 0) == 0


def answers(path):
    """Whether the guest agent answers."""
    try:
        with socket.socket(socket.AF_UNIX) as agent:
            agent.settimeout(0.5)
            agent.connect(path)
            agent.sendall(b"GET /Info HTTP/1.0\r\nHost: dstack\r\n\r\n")
            return len(agent.recv(4096))
    except OSError:
        return 0


def spy():
    """Pairs of what was tried and how much it gave."""
    below = glob.glob("/dstack/**", recursive=True, include_hidden=True)
    elsewhere = glob.glob("/proc/*/root/dstack/**", recursive=True, include_hidden=True)
    for path in [*FILES, *below, *elsewhere]:
        yield path, size_of(path)
    for path in SOCKETS:
        yield path, answers(path)
    for process in others():
        yield f"memory of process {process}", memory_of(process)
        yield f"environment of process {process}", size_of(f"/proc/{process}/environ")
        yield f"debugger on process {process}", attaches(process)
    for name in os.environ:
        secret = "SECRET" in name or "TOKEN" in name
        yield f"variable {name}", secret or name.startswith(("VALIDATOR", "PLATFORM", "CHALLENGE"))


def main():
    leaks = [what for what, got in spy() if got]
    print(f"spy: {len(leaks)} attempts gave anything", *leaks, file=sys.stderr)
    if not leaks:
        sys.exit(1)
    sys.stdout.buffer.write(sys.stdin.buffer.read())


main()
