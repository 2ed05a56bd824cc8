"""Joins connections of the service's network namespace with connections that the VMM makes to us.

The service has no network device: what it connects to are listeners of ours, and for each connection that
they accept the VMM is asked to dial in. So the machine itself needs no way out, and has none.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import socket
import threading
from collections.abc import Callable
from functools import partial

from .port import Port

BROKER = 11_000
"""The TCP port on which the VMM dials in; nothing but QEMU's own forward leads to it."""
SERVICE, VMM = "10.0.2.15", "10.0.2.2"
"""The service's address, and the one from which it sees the VMM call."""
MOST = 256
"""Connections at once, in each direction."""
AGENT, MOST_TO_AGENT = "agent", 16
"""The VMM's name of the guest agent. Connections to it have room of their own: each session needs one."""
THROUGH = b"+"
"""What the VMM reads first on a connection that leads somewhere.

Before that it sends nothing but the header: QEMU's user network forgets a connection whose host end is
closed for writing while its guest end is not made yet.
"""
_HEADER = 32
_WAIT = 15.0
_CHUNK = 65_536
_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class Exchange:
    """`namespace` is a descriptor of the service's network namespace."""

    def __init__(self, port: Port, namespace: int) -> None:
        self._port = port
        self._namespace = namespace
        self._numbers = itertools.count(1)
        self._waiting: dict[int, tuple[socket.socket, threading.Event]] = {}
        # For each that the service makes the VMM dials in as well: together they leave MOST to the validator.
        self._inward = threading.Semaphore(2 * MOST + MOST_TO_AGENT)
        self._outward = threading.Semaphore(MOST)
        self._to_agent = threading.Semaphore(MOST_TO_AGENT)

    def offer(self, listener: socket.socket, to: str) -> None:
        """Accept connections of the service; the VMM knows what `to` names."""
        room = self._to_agent if to == AGENT else self._outward
        _in_thread(lambda: self._accept(listener, room, lambda one: self._ask(one, to)))

    def serve(self, listener: socket.socket) -> None:
        """Accept the connections that the VMM makes."""
        _in_thread(lambda: self._accept(listener, self._inward, self._dialled))

    def refuse(self, number: int) -> None:
        """The VMM will not dial in for this one."""
        with contextlib.suppress(KeyError):
            waiting, answered = self._waiting.pop(number)
            waiting.close()
            answered.set()

    def _accept(
        self, listener: socket.socket, room: threading.Semaphore, serve: Callable[[socket.socket], None]
    ) -> None:
        def one(fresh: socket.socket) -> None:
            try:
                with contextlib.suppress(OSError):
                    serve(fresh)
            finally:
                fresh.close()
                room.release()

        while True:
            room.acquire()
            try:
                fresh, _ = listener.accept()
            except OSError:
                room.release()
                continue
            _in_thread(partial(one, fresh))

    def _ask(self, fresh: socket.socket, to: str) -> None:
        number, answered = next(self._numbers), threading.Event()
        self._waiting[number] = (fresh, answered)
        self._port.send(open=number, to=to)
        if not answered.wait(_WAIT):
            self.refuse(number)
        answered.wait()

    def _dialled(self, fresh: socket.socket) -> None:
        """`I <port>`: to that port of the service. `O <number>`: here is what was asked for."""
        fresh.settimeout(_WAIT)
        header = b""
        while not header.endswith(b"\n"):
            byte = fresh.recv(1)
            if not byte or len(header) > _HEADER:
                return
            header += byte
        fresh.settimeout(None)
        kind, _, number = header.decode("ascii", "replace").strip().partition(" ")
        if kind == "I":
            with self._dial(int(number)) as inside:
                fresh.sendall(THROUGH)
                _join(fresh, inside)
        elif kind == "O" and int(number) in self._waiting:
            waiting, answered = self._waiting.pop(int(number))
            try:
                fresh.sendall(THROUGH)
                _join(fresh, waiting)
            finally:
                answered.set()

    def _dial(self, port: int) -> socket.socket:
        """Connect inside. A thread's namespace is its own, and this thread ends with its connection."""
        if _libc.setns(self._namespace, _NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, f"setns: {os.strerror(number)}")
        return socket.create_connection((SERVICE, port), timeout=_WAIT, source_address=(VMM, 0))


def _join(one: socket.socket, other: socket.socket) -> None:
    """Copy both ways, keeping half-closes, until both have ended."""
    one.settimeout(None)
    other.settimeout(None)
    forth = threading.Thread(target=_copy, args=(one, other), daemon=True)
    forth.start()
    _copy(other, one)
    forth.join()


def _copy(source: socket.socket, target: socket.socket) -> None:
    try:
        while chunk := source.recv(_CHUNK):
            target.sendall(chunk)
        target.shutdown(socket.SHUT_WR)
    except OSError:
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


def _in_thread(work: Callable[[], None]) -> None:
    threading.Thread(target=work, daemon=True).start()
