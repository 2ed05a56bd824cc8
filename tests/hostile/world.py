"""The world around a run: a network namespace in which every address that an attack may want is a trap.

Nothing outside this machine is ever contacted: what looks like a cloud's metadata service, a resolver or a
neighbour is a listener of ours on the namespace's loopback, which notes what arrives and answers with a
canary. What is not an address of the namespace is led to the same listeners by its packet filter, so that a
host of the public internet is there without being this machine's. It is the outer limit of what a widened
guard lets out.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import selectors
import socket
import struct
import subprocess
import threading
from dataclasses import dataclass, field

METADATA = "169.254.169.254"
METADATA_6 = "fd00:ec2::254"
RESOLVER = "8.8.8.8"
NEIGHBOUR = "192.168.77.1"
ABROAD = "203.0.113.7"
ADDRESSES = (METADATA, "100.100.100.200", RESOLVER, "10.0.2.3", NEIGHBOUR, ABROAD, "10.0.2.2", "10.0.2.15")
"""The last two are a guest's own: where it shares the network, it still listens and calls there."""
HTTP, DNS, LOOPBACK = 80, 53, 4799
OUTSIDE = "93.184.215.14"
"""Of the public internet, and of nobody here."""
LISTED, INSIDE, OTHER = (f"{name}.hostile.example" for name in ("listed", "inside", "other"))
"""Names: two that the policy lets out, the second with a private address, and one that it does not."""
_REDIRECT = "/redirect/"
_QUESTION_AT, _A = 12, 1
_NEWNET = 0x40000000
_SIOCADDRT, _RTF_UP = 0x890B, 1
_FILTER = b"""table ip world { chain out { type nat hook output priority -100; policy accept;
fib daddr type != local dnat to 127.0.0.1
}
}
"""
_SIOCSIFADDR, _SIOCSIFFLAGS, _SIOCGIFINDEX, _SIOCSIFNETMASK = 0x8916, 0x8914, 0x8933, 0x891C
_UP = 1
_READ = 4096
_WAIT = 1.0


def enter() -> None:
    """Move this process, and all that it will start, into a network namespace of its own.

    Raises:
        PermissionError: Only root may.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNET) != 0:
        number = ctypes.get_errno()
        raise PermissionError(number, f"a network namespace of its own: {os.strerror(number)}")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as four:
        fcntl.ioctl(four, _SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", _UP))
        for number, address in enumerate(ADDRESSES):
            name = f"lo:{number}".encode()
            for request, what in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, "255.255.255.255")):
                packed = struct.pack("16sHH4s8x", name, socket.AF_INET, 0, socket.inet_aton(what))
                fcntl.ioctl(four, request, packed)
        device = ctypes.create_string_buffer(b"lo")
        every = struct.pack("=H14x", socket.AF_INET)
        numbers = (0, every, every, every, _RTF_UP, *(0,) * 8, ctypes.addressof(device), 0, 0, 0)
        fcntl.ioctl(four, _SIOCADDRT, struct.pack("@L16s16s16sHhLBB3hhPLLH", *numbers))
        index = struct.unpack("16sI", fcntl.ioctl(four, _SIOCGIFINDEX, struct.pack("16sI", b"lo", 0)))[1]
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six:
        packed = socket.inet_pton(socket.AF_INET6, METADATA_6) + struct.pack("=Ii", 128, index)
        fcntl.ioctl(six, _SIOCSIFADDR, packed)
    subprocess.run(["nft", "-f", "-"], input=_FILTER, check=True, capture_output=True, timeout=10)


@dataclass(slots=True)
class Traps:
    """Listeners on every address. `secret` is what they answer; `seen` what arrived, with where."""

    secret: str
    seen: list[tuple[str, bytes]] = field(default_factory=list)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _thread: threading.Thread | None = None
    _end: bool = False

    def start(self) -> None:
        """Listen, and answer in a thread."""
        for family, every in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
            for port in (HTTP, LOOPBACK):
                self._listen(family, socket.SOCK_STREAM, (every, port))
            self._listen(family, socket.SOCK_DGRAM, (every, DNS))
        self._thread = threading.Thread(target=self._serve, name="traps", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """No more."""
        self._end = True
        if self._thread is not None:
            self._thread.join()
        for key in list(self._selector.get_map().values()):
            self._drop(key.fileobj)
        self._selector.close()

    def of(self, token: str) -> tuple[str, ...]:
        """Where an attempt arrived."""
        return tuple(sorted({where for where, data in self.seen if token.encode() in data}))

    def _listen(self, family: int, kind: int, where: tuple[str, int]) -> None:
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(where)
        if kind == socket.SOCK_STREAM:
            listener.listen(64)
        listener.setblocking(False)
        self._selector.register(listener, selectors.EVENT_READ, "listener")

    def _serve(self) -> None:
        while not self._end:
            for key, _ in self._selector.select(_WAIT / 4):
                with contextlib.suppress(OSError):
                    self._heard(key)

    def _heard(self, key: selectors.SelectorKey) -> None:
        if not isinstance(key.fileobj, socket.socket):
            return
        if key.data != "listener":
            self._answer(key.fileobj)
        elif key.fileobj.type == socket.SOCK_DGRAM:
            data, sender = key.fileobj.recvfrom(_READ)
            self.seen.append((f"udp {key.fileobj.getsockname()[1]}", data))
            key.fileobj.sendto(_resolved(data), sender)
        else:
            connection, _ = key.fileobj.accept()
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, "connection")

    def _answer(self, connection: socket.socket) -> None:
        try:
            data = connection.recv(_READ)
            address, port = connection.getsockname()[:2]
            path, host = _asked(data)
            self.seen.append((f"{address} {port} {host}", data))
            body = b"welcome" if host == LISTED else self.secret.encode()
            head = b"200 OK"
            if path.startswith(_REDIRECT):
                head = f"302 Found\r\nLocation: http://{OTHER}/{path.removeprefix(_REDIRECT)}".encode()
            head = b"HTTP/1.1 %b\r\nConnection: close\r\nContent-Length: %d\r\n\r\n" % (head, len(body))
            connection.sendall(head + body)
        finally:
            self._drop(connection)

    def _drop(self, what: object) -> None:
        if isinstance(what, socket.socket):
            self._selector.unregister(what)
            what.close()


def _asked(request: bytes) -> tuple[str, str]:
    """(path, host) of a request."""
    head = request.decode("latin-1").split("\r\n")
    words = head[0].split(" ")
    host = next((line.partition(":")[2].strip() for line in head if line.lower().startswith("host:")), "")
    return (words[1] if len(words) > 1 else ""), host


def _resolved(question: bytes) -> bytes:
    """The answer to a DNS question: one address for every name, and none of IPv6."""
    end = question.find(b"\0", _QUESTION_AT) + 1
    if end <= 0 or len(question) < end + 4:
        return question
    labels, at = [], _QUESTION_AT
    while question[at] and at < end:
        labels.append(question[at + 1 : at + 1 + question[at]].decode("latin-1"))
        at += 1 + question[at]
    kind = struct.unpack_from("!H", question, end)[0]
    address = METADATA if ".".join(labels).lower() == INSIDE else OUTSIDE
    found = b"\xc0\x0c" + struct.pack("!HHIH", _A, 1, 1, 4) + socket.inet_aton(address)
    answers = [found] if kind == _A else []
    head = question[:2] + struct.pack("!HHHHH", 0x8180, 1, len(answers), 0, 0)
    return head + question[_QUESTION_AT : end + 4] + b"".join(answers)
