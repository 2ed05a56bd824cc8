"""Signing requests to the Platform API: each try anew, with an offset learned from the API's own clock."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from datetime import datetime, timedelta

from platform_protocol.signing import Keypair, audience_of, sign_request
from platform_validator.clock import Clock

_LARGEST_OFFSET_MS = 24 * 3600 * 1000
_SAME_OFFSET_MS = 1000


class RequestSigner:
    """Makes the headers of signed requests; safe to use from the lease threads as well as from the loop.

    Args:
        keypair: The hotkey.
        base_url: The Platform API's; its origin is the audience.
        instance: The uuid of the state directory.
        clock: Its `now` is corrected by the learned offset, for X-Timestamp only.
        nonce: Makes 32 hex digits.
    """

    def __init__(
        self,
        *,
        keypair: Keypair,
        base_url: str,
        instance: str,
        clock: Clock,
        nonce: Callable[[], str] = lambda: secrets.token_hex(16),
    ) -> None:
        self._keypair = keypair
        self._instance = instance
        self._clock = clock
        self._nonce = nonce
        self._offset_ms = 0
        self.audience = audience_of(base_url)

    @property
    def hotkey(self) -> str:
        """The SS58 address that signs."""
        return str(self._keypair.address)

    @property
    def offset(self) -> timedelta:
        """How far the Platform API's clock is ahead of ours, as learned; shown in /health."""
        return timedelta(milliseconds=self._offset_ms)

    def learn(self, server_time: object) -> bool:
        """Learn the offset from a `clock_skew` answer's time (Unix ms or RFC 3339).

        Returns:
            Whether another try makes sense: not when the time is unreadable, changes the offset by less
            than a second, or is more than 24 h off.
        """
        theirs = _milliseconds(server_time)
        if theirs is None:
            return False
        offset = theirs - self._local_ms()
        if abs(offset) > _LARGEST_OFFSET_MS or abs(offset - self._offset_ms) < _SAME_OFFSET_MS:
            return False
        self._offset_ms = offset
        return True

    def headers(self, method: str, path: str, body: bytes = b"") -> dict[str, str]:
        """Headers for one try; `path` is the full path with its query, as it goes out."""
        return dict(
            sign_request(
                self._keypair,
                method=method,
                path=path,
                body=body,
                audience=self.audience,
                instance=self._instance,
                timestamp_ms=self._local_ms() + self._offset_ms,
                nonce=self._nonce(),
            )
        )

    def _local_ms(self) -> int:
        return int(self._clock.now().timestamp() * 1000)


def _milliseconds(moment: object) -> int | None:
    if isinstance(moment, int) and not isinstance(moment, bool):
        return moment
    if isinstance(moment, str):
        try:
            return int(datetime.fromisoformat(moment).timestamp() * 1000)
        except (ValueError, OverflowError):
            return None
    return None
