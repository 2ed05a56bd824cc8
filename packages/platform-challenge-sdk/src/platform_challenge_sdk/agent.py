"""The guest agent inside a CVM: quotes. dstack's JSON calls over a Unix socket."""

from __future__ import annotations

import http.client
import json
import socket
from dataclasses import dataclass
from pathlib import Path

from platform_challenge_sdk.worker import in_thread

SOCKETS = (
    "/var/run/dstack.sock",
    "/run/dstack.sock",
    "/var/run/dstack/dstack.sock",
    "/run/dstack/dstack.sock",
)
_TIMEOUT = 30.0
_MAX_ANSWER = 16 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Quote:
    """A quote with its event log. `quote` None: this CVM can make none."""

    quote: bytes | None
    event_log: str
    vm_config: str


NO_QUOTE = Quote(None, "", "")


class Agent:
    """Asks the first agent socket that is there."""

    def __init__(self, sockets: tuple[str, ...] = SOCKETS) -> None:
        self._sockets = sockets

    async def quote(self, report_data: bytes) -> Quote:
        """A quote over 64 bytes of report data; NO_QUOTE where there is no agent, or it makes none."""
        path = next((path for path in self._sockets if Path(path).exists()), None)
        if path is None:
            return NO_QUOTE
        return await in_thread(_ask, path, report_data)


def _ask(path: str, report_data: bytes) -> Quote:
    connection = _UnixConnection(path)
    try:
        body = json.dumps({"report_data": report_data.hex()})
        connection.request("POST", "/GetQuote", body, {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = json.loads(response.read(_MAX_ANSWER))
        if response.status != http.client.OK or not answer.get("quote"):
            return NO_QUOTE
        return Quote(bytes.fromhex(answer["quote"]), answer.get("event_log", ""), answer.get("vm_config", ""))
    except (OSError, ValueError, http.client.HTTPException):
        return NO_QUOTE
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("agent", timeout=_TIMEOUT)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(_TIMEOUT)
        self.sock.connect(self._path)
