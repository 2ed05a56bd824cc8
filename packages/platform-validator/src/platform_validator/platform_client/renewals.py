"""Lease renewals over a blocking HTTP client, for the lease threads: nothing of the event loop is touched."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from datetime import timedelta
from urllib.parse import quote, urlsplit

from pydantic import ValidationError

from platform_protocol.ids import JobId, LeaseToken
from platform_protocol.platform_messages import Renewal
from platform_validator.clock import Clock
from platform_validator.platform_client.answers import Call, problem_code, read_json, refusal
from platform_validator.platform_client.port import PlatformUnavailable
from platform_validator.platform_client.retries import TABLE, Kind
from platform_validator.platform_client.signer import RequestSigner

_MAX_ANSWER = 64 * 1024
_HTTP_OK = 200


class BlockingRenewals:
    """`POST /jobs/{id}/renew`, one connection a call: no state is shared between threads but the signer."""

    def __init__(
        self,
        *,
        base_url: str,
        signer: RequestSigner,
        clock: Clock,
        timeout: timedelta = TABLE[Kind.RENEWAL].deadline,
    ) -> None:
        parts = urlsplit(base_url)
        self._https = parts.scheme == "https"
        self._host = parts.hostname or ""
        self._port = parts.port
        self._prefix = parts.path.rstrip("/")
        self._signer = signer
        self._clock = clock
        self._timeout = timeout

    def renew(self, job_id: JobId, token: LeaseToken) -> timedelta:
        """Renew; returns the term from now. Blocks for at most about the timeout.

        Raises:
            PlatformUnavailable: No answer.
            LeaseRefused: `lease_lost`, `job_cancelled`, `attempt_expired`.
            PlatformRefused: Any other definite no.
        """
        path = f"{self._prefix}/jobs/{quote(job_id, safe='')}/renew"
        body = json.dumps({"lease_token": token}).encode()
        status, headers, answer = self._post(path, body)
        code, _, problem = problem_code(answer) if status != _HTTP_OK else ("", "", {})
        if code == "clock_skew" and self._signer.learn(problem.get("server_time")):
            status, headers, answer = self._post(path, body)
        if status != _HTTP_OK:
            raise refusal(Call.LEASE, status, headers, answer, self._clock.now())
        try:
            return timedelta(seconds=Renewal.model_validate(read_json(answer)).term_s)
        except ValidationError as error:
            raise PlatformUnavailable("the answer to a renewal is not the Platform API's") from error

    def _post(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        kind = http.client.HTTPSConnection if self._https else http.client.HTTPConnection
        seconds = self._timeout.total_seconds()
        connection = kind(self._host, self._port, timeout=seconds)
        # Each operation has the timeout; all of them together, an answer byte by byte, have it too.
        opened: list[socket.socket] = []
        deadline = threading.Timer(seconds, _break_off, [opened])
        deadline.daemon = True
        deadline.start()
        headers = {"Content-Type": "application/json", **self._signer.headers("POST", path, body)}
        try:
            connection.connect()
            opened.append(connection.sock)
            connection.request("POST", path, body=body, headers=headers)
            answer = connection.getresponse()
            content = answer.read(_MAX_ANSWER)
            return answer.status, dict(answer.getheaders()), content
        except (OSError, http.client.HTTPException) as error:
            raise PlatformUnavailable(f"a renewal got no answer: {error}") from error
        finally:
            deadline.cancel()
            connection.close()


def _break_off(opened: list[socket.socket]) -> None:
    for each in opened:
        with contextlib.suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
