"""What the level in force accepts.

| level | accepts |
|---|---|
| Tee | a verified TDX quote, nothing else |
| below, with allow_simulated | a quote under the named simulated root; a missing one is refused |
| below, without | no quote is asked for: attestation none |

`find_faults` is pure: it names every check that a verified quote and its event log fail. `AttestationPolicy`
has the chain verified before it, and applies the outcomes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, NamedTuple, Protocol

import structlog

from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_validator.attestation.checks import Check, Outcome, Outcomes
from platform_validator.attestation.collateral import CollateralUnavailable
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.attestation.errors import AttestationRefused, AttestationUnavailable
from platform_validator.attestation.event_log import EventLogRefused, Identity, check_event_log
from platform_validator.attestation.gate import QuoteGate
from platform_validator.attestation.mr_config import BoundApp, check_mr_config_id
from platform_validator.attestation.os_image import ImageTrust, KnownImages, Shape, Trust, check_os_image
from platform_validator.attestation.quote import QuoteInvalid, VerifiedQuote
from platform_validator.attestation.tcb import TcbRules, judge_tcb
from platform_validator.clock import Clock, SystemClock

_log = structlog.get_logger(__name__)

_TURN = timedelta(seconds=15)

Fault = tuple[Check, str]
"""A check that failed, and why."""


@dataclass(frozen=True, slots=True)
class Expected:
    """What we made, and what this handshake bound.

    Args:
        compose_hash: Of the bytes that we sent, hex.
        report_data: Of this handshake, 64 bytes.
        image: The image that was asked for.
        shape: At this size.
        vm_config: As the guest gave it: untrusted.
        key_provider: The one that the app-compose asks for.
        pins: It is booted to see what its image measures.
    """

    compose_hash: str
    report_data: bytes
    image: str = ""
    shape: Shape = field(default_factory=lambda: Shape(0, 0))
    vm_config: str = ""
    key_provider: str = "none"
    pins: bool = False


@dataclass(frozen=True, slots=True)
class Accepted:
    """The CVM met the policy.

    Attributes:
        kind: What proved it.
        instance: Its event log's instance id, None without a quote.
        quote: The verified quote, None without one.
        warnings: Checks that failed and only warn.
        image: How its OS image came to be trusted, None without a quote.
    """

    kind: AttestationKind
    instance: str | None
    quote: VerifiedQuote | None = field(default=None, compare=False, repr=False)
    warnings: tuple[Fault, ...] = field(default=(), compare=False)
    image: ImageTrust | None = field(default=None, compare=False)


@dataclass(frozen=True, slots=True)
class AttestationRules:
    """The operator's side of the policy; without arguments the strictest.

    Args:
        outcomes: Of each check.
        tcb: What a platform's TCB may be.
        images: The known OS images, as they are now.
    """

    outcomes: Outcomes = field(default_factory=Outcomes)
    tcb: TcbRules = field(default_factory=TcbRules)
    images: Callable[[], KnownImages] = KnownImages

    def fingerprint(self) -> str:
        """Changes with anything that could change a refusal."""
        known = self.images()
        said = repr((sorted(self.outcomes.chosen.items()), self.outcomes.tee, self.tcb, known.digest))
        return hashlib.sha256(said.encode()).hexdigest()


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
        rules: The operator's side; None: the strictest of the level.
        collateral: What the checker takes from; None: it needs none.
        clock: Its wall clock judges grace, its monotonic one how long no claims are made without quotes.
    """

    def __init__(
        self,
        *,
        level: IsolationLevel,
        allow_simulated: bool,
        checker: Checker | None,
        rules: AttestationRules | None = None,
        collateral: CollateralCache | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.collateral = collateral
        self._level = level
        self._simulated = allow_simulated and level is not IsolationLevel.TEE
        self._checker = checker
        self.rules = rules or AttestationRules(Outcomes(tee=level is IsolationLevel.TEE))
        self._clock = clock or SystemClock()
        self._gate = QuoteGate()
        self.beat: Callable[[], None] = lambda: None
        self.heard: Callable[[str, str], None] = lambda _answer, _check: None

    @property
    def asks_for_quotes(self) -> bool:
        """Whether a CVM must show a quote."""
        return self._level is IsolationLevel.TEE or self._simulated

    def trouble(self) -> str | None:
        """Why CVMs cannot be attested now, or None."""
        if self._gate.missing:
            return "a CVM showed no quote: is the VMM's host a TDX host, and its guest agent up?"
        return self.collateral.trouble() if self.collateral is not None else None

    def view(self) -> dict[str, Any]:
        """For `validator status`: whether quotes are asked for, what is known, which collateral is held."""
        known = self.rules.images()
        return {
            "quotes": self.asks_for_quotes,
            "tcb_statuses": list(self.rules.tcb.statuses),
            "known_images": len(known.pinned) + len(known.published),
            "collateral": self.collateral.views() if self.collateral is not None else [],
        }

    def warnings(self) -> list[str]:
        """What an operator should know though quotes can be judged."""
        if not self.asks_for_quotes:
            return []
        found = [
            f"attestation.checks.{check.value} is {outcome.value}: it refuses no CVM"
            for check, outcome in sorted(self.rules.outcomes.chosen.items())
            if outcome is not Outcome.REQUIRED
        ]
        stale = self.collateral.stale() if self.collateral is not None else None
        return [*found, *(one for one in (self.rules.images().fault, stale) if one is not None)]

    def can_attest(self) -> bool:
        """Whether jobs may be claimed: collateral is held for every platform that was seen, and quotes come.

        A host that shows none is tried again after a while.
        """
        if not self.asks_for_quotes:
            return True
        covered = self.collateral is None or self.collateral.trouble() is None
        return covered and self._gate.admits(self._clock.monotonic())

    async def run(self) -> None:
        """Keep collateral fresh, until cancelled."""
        while True:
            if self.collateral is not None:
                await self.collateral.refresh_due()
            self.beat()
            await self._clock.sleep(_TURN.total_seconds())

    async def judge(self, quote: bytes | None, event_log: str, expected: Expected) -> Accepted:
        """Accept or raise.

        Raises:
            AttestationRefused: With the name of the check.
            AttestationUnavailable: No quote at Tee, or no collateral.
        """
        try:
            accepted = await self._judge(quote, event_log, expected)
        except AttestationRefused as error:
            self.heard("refused", error.check)
            raise
        except AttestationUnavailable:
            self.heard("unavailable", "")
            raise
        if accepted.quote is not None:
            self.heard("accepted", "")
        return accepted

    async def _judge(self, quote: bytes | None, event_log: str, expected: Expected) -> Accepted:
        # 1. Nothing is asked for: below Tee the VMM is trusted, and the launch secret authenticates.
        if not self.asks_for_quotes:
            return Accepted(AttestationKind.NONE, None)
        # 2. Asked for, and not there; 3. there: the chain, then what it says.
        verified = await self.verify(quote)
        identity, faults, image = find_faults(
            verified, event_log, expected, self.rules, now=self._clock.now()
        )
        warnings = self._applied(faults)
        for check, detail in warnings:
            _log.warning("attestation_check_failed", check=check.value, detail=detail, outcome="warn")
        kind = AttestationKind.SIMULATED if self._simulated else AttestationKind.TDX
        return Accepted(kind, identity.instance_id, verified, warnings, image)

    async def verify(self, quote: bytes | None) -> VerifiedQuote:
        """A quote's chain alone.

        Raises:
            AttestationRefused: Its chain does not verify; or it is missing where the VMM promised one.
            AttestationUnavailable: No quote at Tee, or no collateral.
        """
        if quote is None:
            if self._simulated:
                raise AttestationRefused(
                    Check.QUOTE_MISSING, "allow_simulated asks for a simulated quote, none came"
                )
            self._gate = self._gate.without(self._clock.monotonic())
            raise AttestationUnavailable("the level is Tee and the CVM showed no quote", passing=True)
        self._gate = self._gate.shown()
        if self._checker is None:
            raise AttestationUnavailable("a quote is asked for, and nothing here can verify one")
        try:
            return await self._checker.verify(quote)
        except QuoteInvalid as error:
            raise AttestationRefused(error.check, str(error)) from error
        except CollateralUnavailable as error:
            raise AttestationUnavailable(str(error), passing=True) from error

    def _applied(self, faults: Iterable[Fault]) -> tuple[Fault, ...]:
        """The warnings among them. Raises AttestationRefused for the first that is required."""
        warnings = []
        for check, detail in faults:
            outcome = self.rules.outcomes.of(check)
            if outcome is Outcome.REQUIRED:
                raise AttestationRefused(check, detail)
            if outcome is Outcome.WARN:
                warnings.append((check, detail))
        return tuple(warnings)


class Findings(NamedTuple):
    """What a verified quote shows. Where the event log proves no identity, it is empty."""

    identity: Identity
    faults: list[Fault]
    image: ImageTrust


def find_faults(
    quote: VerifiedQuote, event_log: str, expected: Expected, rules: AttestationRules, *, now: datetime
) -> Findings:
    """Every check that a verified quote fails, in the order of the table in `checks`."""
    body = quote.body
    faults: list[Fault] = judge_tcb(
        quote.status, quote.advisories, quote.outdated_since, rules=rules.tcb, now=now
    )

    def check(holds: bool, name: Check, detail: str) -> None:
        if not holds:
            faults.append((name, detail))

    check(not body.debug, Check.DEBUG, "the TD runs in debug mode: its memory can be read")
    check(not any(body.mr_signer_seam), Check.SEAM_SIGNER, "the TDX module is not signed by Intel")
    check(not any(body.mr_service_td), Check.SERVICE_TD, "a service TD is bound to it, which we do not know")
    check(body.report_data == expected.report_data, Check.REPORT_DATA, "the quote binds another handshake")
    try:
        identity = check_event_log(event_log, body.rtmrs)
    except EventLogRefused as error:
        faults.append((error.check, str(error)))
        nobody = Identity("", "", "", "", "", ())
        return Findings(nobody, faults, ImageTrust(Trust.UNKNOWN, expected.image, expected.shape))
    ours = expected.compose_hash
    check(
        identity.compose_hash == ours,
        Check.COMPOSE_HASH,
        f"expected {ours}, the CVM measured {identity.compose_hash}",
    )
    check(
        identity.app_id == ours[:40],
        Check.APP_ID,
        f"expected {ours[:40]}, the CVM measured {identity.app_id}",
    )
    check(bool(identity.instance_id), Check.INSTANCE_ID, "the event log names no instance")
    check(
        identity.key_provider == expected.key_provider,
        Check.KEY_PROVIDER,
        f"expected {expected.key_provider!r}, the CVM measured {identity.key_provider!r}",
    )
    app = BoundApp(ours, ours[:40], identity.instance_id, identity.key_provider, identity.key_provider_id)
    bound = check_mr_config_id(body.mr_config_id, app, expected.vm_config)
    check(bound is None, Check.MR_CONFIG_ID, str(bound))
    if rules.outcomes.of(Check.OS_IMAGE) is Outcome.OFF or expected.pins:
        return Findings(identity, faults, ImageTrust(Trust.NOT_CHECKED, expected.image, expected.shape))
    image = check_os_image(
        rules.images(),
        body,
        identity,
        image=expected.image,
        shape=expected.shape,
        vm_config=expected.vm_config,
    )
    if isinstance(image, str):
        faults.append((Check.OS_IMAGE, image))
        image = ImageTrust(Trust.UNKNOWN, expected.image, expected.shape)
    return Findings(identity, faults, image)
