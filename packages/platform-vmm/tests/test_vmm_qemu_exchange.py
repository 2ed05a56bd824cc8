"""The exchange inside a virtual machine, on this machine's sockets: who may hold how many connections."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
from collections.abc import Iterator
from typing import Any

import pytest

from platform_vmm.qemu.guest.exchange import AGENT, MOST, MOST_TO_AGENT, THROUGH, Exchange

WITHIN = 20.0


class Asked:
    """The control port in the test's hands: what the VMM is asked for."""

    def __init__(self) -> None:
        self.messages: queue.Queue[dict[str, Any]] = queue.Queue()

    def send(self, **message: Any) -> None:
        self.messages.put(message)


@pytest.fixture
def held() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.robustness(26, "slow-loris")
def test_what_the_service_holds_keeps_neither_validator_nor_agent_out(held: contextlib.ExitStack) -> None:
    """All its connections to the proxy, each dialled by the VMM: a session still comes in and has a quote."""
    port: Any = Asked()
    namespace = os.open("/proc/self/ns/net", os.O_RDONLY)
    held.callback(os.close, namespace)
    exchange = Exchange(port, namespace)
    proxy, agent, broker = (held.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(3))
    exchange.offer(proxy, "3128")
    exchange.offer(agent, AGENT)
    exchange.serve(broker)

    def connect(to: socket.socket) -> socket.socket:
        return held.enter_context(socket.create_connection(to.getsockname(), timeout=WITHIN))

    for _ in range(MOST):
        connect(proxy)
        dialled = connect(broker)
        dialled.sendall(b"O %d\n" % port.messages.get(timeout=WITHIN)["open"])
        assert dialled.recv(1) == THROUGH
    connect(proxy)
    validator = connect(broker)
    validator.sendall(b"I 1\n")
    assert validator.recv(1) == b""  # it was taken; nobody listens on that port
    for _ in range(MOST_TO_AGENT):
        connect(agent)
        assert port.messages.get(timeout=WITHIN)["to"] == AGENT
    assert port.messages.empty()
