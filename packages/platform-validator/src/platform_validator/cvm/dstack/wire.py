"""pRPC in JSON over http, https or a Unix socket: one request, one answer, bounded in time and size.

Facts that shape it: errors are 400 with `{"error"}`; Empty answers are `null` or no body at all; 401 comes
only from newer versions, or from a proxy in front of older ones.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import aiohttp

from platform_validator.cvm.dstack.refusals import refusal
from platform_validator.cvm.vmm import VmmUnauthorized, VmmUnavailable

CALL = 15.0
MAX_ANSWER = 32 * 1024 * 1024
OK, REFUSED, NOT_FOUND = 200, 400, 404
_UNAUTHORIZED = (401, 403)
_CONNECTIONS = 64


class Answer(NamedTuple):
    """What came back."""

    status: int
    body: bytes
    headers: Mapping[str, str]


class Wire:
    """Connections to one VMM.

    Args:
        url: http, https, or `unix:` and a path.
        token: Sent as Bearer and as X-Admin-Token: versions and proxies differ in what they read.
        user: For Basic authentication, with `password`, where there is no token.
        password: See `user`.
    """

    def __init__(
        self, url: str, *, token: str | None = None, user: str | None = None, password: str | None = None
    ) -> None:
        self._socket = url.removeprefix("unix:") if url.startswith("unix:") else None
        self._base = "http://vmm" if self._socket else url.rstrip("/")
        self._headers = {"Content-Type": "application/json"}
        if token is not None:
            self._headers |= {"X-Admin-Token": token, "Authorization": f"Bearer {token}"}
        elif user is not None:
            pair = base64.b64encode(f"{user}:{password or ''}".encode()).decode("ascii")
            self._headers["Authorization"] = f"Basic {pair}"
        self._client: aiohttp.ClientSession | None = None

    async def call(
        self, method: str, message: Mapping[str, Any], *, limit: float | None = None
    ) -> dict[str, Any]:
        """The answer's fields; none where it is Empty.

        Args:
            method: Without a service's name.
            message: Its fields.
            limit: Seconds for the whole exchange; None: 15.

        Raises:
            VmmUnavailable: No answer, or not a VMM's: the call may have been done.
            VmmUnauthorized: Without credentials that it takes.
            VmmRefused: It refused; see `refusal`.
        """
        body = json.dumps(message).encode()
        answer = await self.exchange("POST", f"/prpc/{method}?json", body, limit=limit)
        if answer.status not in (OK, REFUSED):
            raise VmmUnavailable(f"{method}: expected HTTP 200 or 400, got {answer.status}: is this a VMM?")
        if answer.status == OK and not answer.body.strip():
            return {}
        try:
            value = json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise VmmUnavailable(
                f"{method}: HTTP {answer.status}, and the answer is not JSON: is this a VMM?"
            ) from error
        if answer.status == OK:
            return value if isinstance(value, dict) else {}
        raise refusal(method, str(value.get("error", "")) if isinstance(value, dict) else "")

    async def exchange(
        self,
        verb: str,
        path: str,
        body: bytes | None = None,
        *,
        limit: float | None = None,
        most: int | None = None,
    ) -> Answer:
        """Any request. Redirects are not followed: credentials stay with the one they are for.

        Args:
            verb: HTTP's.
            path: With its query.
            body: Bytes of a JSON message.
            limit: Seconds for the whole exchange; None: 15.
            most: Bytes of the answer's body that are taken; None: 32 MiB.

        Raises:
            VmmUnavailable: No answer within the limits.
            VmmUnauthorized: 401 or 403.
        """
        most = MAX_ANSWER if most is None else most
        try:
            async with self._session().request(
                verb,
                self._base + path,
                data=None if body is None else io.BytesIO(body),
                headers=self._headers,
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=CALL if limit is None else limit),
            ) as response:
                data = await response.content.read(most + 1)
                while len(data) <= most and (more := await response.content.read(most + 1 - len(data))):
                    data += more
                answer = Answer(response.status, data, response.headers)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            where = self._socket or self._base
            raise VmmUnavailable(
                f"no answer from the VMM at {where}: {str(error) or type(error).__name__}"
            ) from error
        if len(data) > most:
            raise VmmUnavailable(f"{path}: the VMM's answer is over {most} bytes")
        if answer.status in _UNAUTHORIZED:
            raise VmmUnauthorized(
                f"the VMM answered {answer.status}: set DSTACK_VMM_TOKEN, "
                "or DSTACK_VMM_AUTH_USER and _PASSWORD"
            )
        return answer

    async def close(self) -> None:
        """Close connections."""
        if self._client is not None:
            await self._client.close()
            self._client = None

    def _session(self) -> aiohttp.ClientSession:
        if self._client is None:
            connector = (
                aiohttp.UnixConnector(self._socket)
                if self._socket
                else aiohttp.TCPConnector(limit=_CONNECTIONS)
            )
            self._client = aiohttp.ClientSession(connector=connector)
        return self._client
