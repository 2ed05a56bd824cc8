"""What the level in force accepts: pure, but for the quote's chain, which a checker verifies.

| level | accepts |
|---|---|
| Tee | a verified TDX quote, nothing else |
| below, with allow_simulated | a quote under the named simulated root; a missing one is refused |
| below, without | no quote is asked for: attestation none |
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Protocol

from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_validator.attestation.errors import AttestationRefused, AttestationUnavailable
from platform_validator.attestation.event_log import EventLogRefused, check_event_log
from platform_validator.attestation.quote import CollateralUnavailable, QuoteInvalid, VerifiedQuote

_ACCEPTED = frozenset({"UpToDate", "SWHardeningNeeded"})
_CONFIG_V1 = 0x01


@dataclass(frozen=True, slots=True)
class Expected:
    """What we made: the compose hash of the bytes that we sent, and the report data of this handshake."""

    compose_hash: str
    report_data: bytes


@dataclass(frozen=True, slots=True)
class Accepted:
    """The CVM met the policy. `instance` is its event log's instance id, None without a quote."""

    kind: AttestationKind
    instance: str | None


class Checker(Protocol):
    """Verifies a quote's chain: `QuoteChecker`, or what a simulation puts in its place."""

    async def verify(self, raw: bytes) -> VerifiedQuote:
        """Raises QuoteInvalid or CollateralUnavailable."""


class AttestationPolicy:
    """Judges what a CVM shows in its handshake.

    Args:
        level: The level in force.
        allow_simulated: Whether simulated quotes are asked for (below Tee only).
        checker: Verifies chains under the root that the level asks for; None where no quote is asked for.
    """

    def __init__(self, *, level: IsolationLevel, allow_simulated: bool, checker: Checker | None) -> None:
        self._level = level
        self._simulated = allow_simulated and level is not IsolationLevel.TEE
        self._checker = checker

    @property
    def asks_for_quotes(self) -> bool:
        """Whether a CVM must show a quote."""
        return self._level is IsolationLevel.TEE or self._simulated

    async def judge(self, quote: bytes | None, event_log: str, expected: Expected) -> Accepted:
        """Accept or raise.

        Raises:
            AttestationRefused: With the name of the check.
            AttestationUnavailable: No quote at Tee, or no collateral.
        """
        # 1. Nothing is asked for: below Tee the VMM is trusted, and the launch secret authenticates.
        if not self.asks_for_quotes:
            return Accepted(AttestationKind.NONE, None)
        # 2. Asked for, and not there.
        if quote is None:
            if self._simulated:
                raise AttestationRefused(
                    "quote_missing", "allow_simulated asks for a simulated quote, none came"
                )
            raise AttestationUnavailable("the level is Tee and the CVM showed no quote")
        # 3. There: the chain, then what it binds.
        if self._checker is None:
            raise AttestationUnavailable("a quote is asked for, and nothing here can verify one")
        try:
            verified = await self._checker.verify(quote)
        except QuoteInvalid as error:
            raise AttestationRefused("quote_chain", str(error)) from error
        except CollateralUnavailable as error:
            raise AttestationUnavailable(str(error)) from error
        instance = check_quote(verified, event_log, expected)
        return Accepted(AttestationKind.SIMULATED if self._simulated else AttestationKind.TDX, instance)


def check_quote(quote: VerifiedQuote, event_log: str, expected: Expected) -> str:
    """What a verified quote must say besides; returns the instance id (hex).

    Raises:
        AttestationRefused: `tcb_status`, `debug`, `seam_signer`, `service_td`, `report_data`, `rtmr…`,
            `event_log`, `event_order`, `compose_hash`, `app_id`, `instance_id` or `mr_config_id`.
    """
    compose = bytes.fromhex(expected.compose_hash)
    _require(quote.status in _ACCEPTED, "tcb_status", f"the platform's TCB is {quote.status}")
    _require(not quote.debug, "debug", "the TD runs in debug mode: its memory can be read")
    _require(not any(quote.mr_signer_seam), "seam_signer", "the TDX module is not signed by Intel")
    _require(not any(quote.mr_service_td), "service_td", "a service TD is bound to it, which we do not know")
    _require(quote.report_data == expected.report_data, "report_data", "the quote binds another handshake")
    try:
        identity = check_event_log(event_log, quote.rtmrs)
    except EventLogRefused as error:
        raise AttestationRefused(error.check, str(error)) from error
    _require(
        identity.compose_hash == expected.compose_hash,
        "compose_hash",
        f"expected {expected.compose_hash}, the CVM measured {identity.compose_hash}",
    )
    _require(
        identity.app_id == expected.compose_hash[:40],
        "app_id",
        f"expected {expected.compose_hash[:40]}, the CVM measured {identity.app_id}",
    )
    _require(bool(identity.instance_id), "instance_id", "the event log names no instance")
    if quote.mr_config_id[0] == _CONFIG_V1:
        _require(quote.mr_config_id[1:33] == compose, "mr_config_id", "it binds another compose hash")
    return identity.instance_id


def _require(holds: bool, check: str, detail: str) -> None:
    if not holds:
        raise AttestationRefused(check, detail)


def quote_summary(quote: VerifiedQuote) -> str:
    """For logs: status and registers, JSON."""
    registers = {f"rtmr{n}": value.hex() for n, value in enumerate(quote.rtmrs)}
    return json.dumps({"status": quote.status, "mrtd": quote.mrtd.hex(), **registers})
