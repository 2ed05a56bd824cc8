"""Attestation over real TDX quotes (`data/tdx`), with the clock put where their collateral was valid."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import quote as percent

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from platform_protocol.event_log import parse_event_log, replay, runtime_digest
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_validator.attestation.checks import Check, Outcome, Outcomes
from platform_validator.attestation.collateral import CollateralUnavailable, Fetch
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.attestation.errors import AttestationRefused, AttestationUnavailable
from platform_validator.attestation.event_log import EventLogRefused, check_event_log
from platform_validator.attestation.os_image import KnownImages, Pinned, Shape
from platform_validator.attestation.policy import (
    Accepted,
    AttestationPolicy,
    AttestationRules,
    Expected,
    find_faults,
)
from platform_validator.attestation.quote import (
    QuoteChecker,
    QuoteInvalid,
    VerifiedQuote,
    verify_quote,
)
from platform_validator.clock import SystemClock

DATA = Path(__file__).parent / "data" / "tdx"
REPORT = json.loads((DATA / "dstack_quote_report.json").read_text())
QUOTE = bytes.fromhex(REPORT["quote"])
EVENT_LOG = str(REPORT["event_log"])
COLLATERAL = (DATA / "dstack_collateral.json").read_text()
VALID = datetime(2026, 3, 1, tzinfo=UTC)
COMPOSE_HASH = "3763bc34552cf3a27ff71ad5f7a90471562a1a2df552dfc1998cba2d60da27e7"
INSTANCE = "c3714eb66990eace777b4e664c16e09375dec4c9"
REPORT_DATA = bytes.fromhex("1234").ljust(64, b"\x00")
SHAPE = Shape(16, 65536, 1)
EXPECTED = Expected(COMPOSE_HASH, REPORT_DATA, image="dstack-nvidia", shape=SHAPE, key_provider="local-sgx")


class At(SystemClock):
    """A clock that stands still."""

    def __init__(self, moment: datetime) -> None:
        self.moment = moment
        self.elapsed = 0.0

    def now(self) -> datetime:
        return self.moment

    def monotonic(self) -> float:
        return self.elapsed


class Pccs:
    """A collateral service made of the vector's own collateral."""

    def __init__(self, text: str = COLLATERAL) -> None:
        self.held = json.loads(text)
        self.asked: list[str] = []
        self.down = False

    async def fetch(self, path: str) -> tuple[bytes, dict[str, str]]:
        self.asked.append(path)
        if self.down:
            raise CollateralUnavailable("no answer")
        held = self.held
        if "pckcrl" in path:
            return bytes.fromhex(held["pck_crl"]), {
                "SGX-PCK-CRL-Issuer-Chain": percent(held["pck_crl_issuer_chain"])
            }
        if "rootcacrl" in path:
            return held["root_ca_crl"].encode(), {}
        if "/tcb?" in path:
            body = f'{{"tcbInfo":{held["tcb_info"]},"signature":"{held["tcb_info_signature"]}"}}'
            return body.encode(), {"tcb-info-issuer-chain": percent(held["tcb_info_issuer_chain"])}
        body = f'{{"enclaveIdentity":{held["qe_identity"]},"signature":"{held["qe_identity_signature"]}"}}'
        return body.encode(), {"SGX-Enclave-Identity-Issuer-Chain": percent(held["qe_identity_issuer_chain"])}


def verified() -> VerifiedQuote:
    return verify_quote(QUOTE, COLLATERAL, VALID, None)


def known() -> KnownImages:
    """What the machine of the vector booted to."""
    body = verified().body
    rtmr0, rtmr1, rtmr2, _ = (one.hex() for one in body.rtmrs)
    pinned = Pinned("dstack-nvidia", SHAPE, body.mrtd.hex(), rtmr0, rtmr1, rtmr2, "the vector")
    return KnownImages((pinned,))


RULES = AttestationRules(images=known)


def checker(
    fetch: Fetch | None = None, *, clock: At | None = None, root: bytes | None = None
) -> QuoteChecker:
    clock = clock or At(VALID)
    cache = CollateralCache(fetch=fetch or Pccs().fetch, clock=clock, root=root)
    return QuoteChecker(collateral=cache, clock=clock, root=root)


def policy(fetch: Fetch | None = None) -> AttestationPolicy:
    return AttestationPolicy(
        level=IsolationLevel.TEE,
        allow_simulated=False,
        checker=checker(fetch),
        rules=RULES,
        clock=At(VALID),
    )


def faults_of(quote: VerifiedQuote, log: str = EVENT_LOG) -> list[str]:
    """The names of the checks that fail."""
    return [check.value for check, _ in find_faults(quote, log, EXPECTED, RULES, now=VALID)[1]]


def another_root() -> bytes:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Intel SGX Root CA")])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(VALID - timedelta(days=1))
        .not_valid_after(VALID + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate.public_bytes(Encoding.DER)


# The chain


def test_a_real_quote_verifies_while_its_collateral_is_valid() -> None:
    """Two platforms, each with its own collateral and moment."""
    first = verify_quote(
        (DATA / "tdx_quote.bin").read_bytes(),
        (DATA / "tdx_quote_collateral.json").read_text(),
        datetime.fromtimestamp(1750331763, UTC),
        None,
    )
    assert (first.status, first.body.debug) == ("UpToDate", False)
    second = verified()
    assert second.status == "UpToDate"
    assert second.body.report_data == REPORT_DATA


@pytest.mark.parametrize("moment", [VALID + timedelta(days=60), VALID - timedelta(days=60)])
def test_a_quote_does_not_verify_outside_the_time_of_its_collateral(moment: datetime) -> None:
    """Expired, or not valid yet."""
    with pytest.raises(QuoteInvalid):
        verify_quote(QUOTE, COLLATERAL, moment, None)


@pytest.mark.parametrize("offset", [20, 48, 184, 528, 568, 640, 700, 800])
def test_a_flipped_bit_breaks_the_chain(offset: int) -> None:
    """Header, body, report data, signature, key, quoting enclave."""
    changed = bytearray(QUOTE)
    changed[offset] ^= 1
    with pytest.raises(QuoteInvalid):
        verify_quote(bytes(changed), COLLATERAL, VALID, None)


def test_another_root_is_not_believed() -> None:
    """Intel's quote under a root that is not Intel's, though it has its name."""
    with pytest.raises(QuoteInvalid):
        verify_quote(QUOTE, COLLATERAL, VALID, another_root())


def test_collateral_of_another_platform_does_not_verify() -> None:
    """FMSPC B0C06F000000's for a quote of 90C06F000000."""
    other = (DATA / "tdx_quote_collateral.json").read_text()
    with pytest.raises(QuoteInvalid):
        verify_quote(QUOTE, other, datetime.fromtimestamp(1750331763, UTC), None)


@pytest.mark.parametrize("raw", [b"", b"NOT A QUOTE platform-validator".ljust(1024, b"\x00"), QUOTE[:700]])
async def test_what_is_no_quote_is_refused(raw: bytes) -> None:
    """Without asking for collateral."""
    pccs = Pccs()
    with pytest.raises(AttestationRefused) as refused:
        await policy(pccs.fetch).judge(raw, EVENT_LOG, EXPECTED)
    assert refused.value.check == "quote_format"
    assert pccs.asked == []


# The policy at Tee


async def test_tee_accepts_a_verified_quote_that_binds_this_handshake_and_this_compose() -> None:
    """And says which instance it is."""
    accepted = await policy().judge(QUOTE, EVENT_LOG, EXPECTED)
    assert accepted == Accepted(AttestationKind.TDX, INSTANCE)


async def test_a_replayed_quote_is_refused() -> None:
    """Another nonce, or swapped session keys: the quote binds another handshake."""
    with pytest.raises(AttestationRefused) as refused:
        await policy().judge(QUOTE, EVENT_LOG, replace(EXPECTED, report_data=bytes(64)))
    assert refused.value.check == "report_data"


async def test_the_quote_of_another_app_is_refused() -> None:
    """The right chain with another compose hash; both are named."""
    with pytest.raises(AttestationRefused) as refused:
        await policy().judge(QUOTE, EVENT_LOG, replace(EXPECTED, compose_hash="ab" * 32))
    assert refused.value.check == "compose_hash"
    assert "ab" * 32 in str(refused.value)
    assert COMPOSE_HASH in str(refused.value)


async def test_no_quote_at_tee_is_never_accepted() -> None:
    """Whatever else it says."""
    with pytest.raises(AttestationUnavailable):
        await policy().judge(None, EVENT_LOG, EXPECTED)


async def test_tee_without_a_checker_accepts_nothing() -> None:
    """A fault of ours must not open the door."""
    bare = AttestationPolicy(level=IsolationLevel.TEE, allow_simulated=False, checker=None)
    for raw in (None, QUOTE):
        with pytest.raises(AttestationUnavailable):
            await bare.judge(raw, EVENT_LOG, EXPECTED)


async def test_tee_ignores_allow_simulated() -> None:
    """What verifies is tdx, and a simulated root is no way in."""
    simulated = AttestationPolicy(
        level=IsolationLevel.TEE, allow_simulated=True, checker=checker(root=another_root()), rules=RULES
    )
    with pytest.raises(AttestationRefused) as refused:
        await simulated.judge(QUOTE, EVENT_LOG, EXPECTED)
    assert refused.value.check == "pck_chain"


async def test_a_collateral_service_that_is_down_judges_nothing() -> None:
    """Unavailable, which is no refusal of the CVM."""
    pccs = Pccs()
    pccs.down = True
    with pytest.raises(AttestationUnavailable):
        await policy(pccs.fetch).judge(QUOTE, EVENT_LOG, EXPECTED)


async def test_a_check_that_only_warns_accepts_and_says_so() -> None:
    """An unknown image: refused by default, accepted with a warning, or not looked at."""
    found: dict[Outcome, tuple[int, list[tuple[str, str]]]] = {}
    for outcome in Outcome:
        heard: list[tuple[str, str]] = []
        rules = AttestationRules(outcomes=Outcomes({Check.OS_IMAGE: outcome}))
        lax = AttestationPolicy(
            level=IsolationLevel.TEE,
            allow_simulated=False,
            checker=checker(),
            rules=rules,
            clock=At(VALID),
        )
        lax.heard = lambda answer, check, heard=heard: heard.append((answer, check))  # type: ignore[misc] # its own list
        warnings = -1
        with contextlib.suppress(AttestationRefused):
            warnings = len((await lax.judge(QUOTE, EVENT_LOG, EXPECTED)).warnings)
        found[outcome] = warnings, heard
    assert found == {
        Outcome.REQUIRED: (-1, [("refused", "os_image")]),
        Outcome.WARN: (1, [("accepted", "")]),
        Outcome.OFF: (0, [("accepted", "")]),
    }


# The policy below Tee


@pytest.mark.parametrize("level", [level for level in IsolationLevel if level is not IsolationLevel.TEE])
async def test_below_tee_no_quote_is_asked_for_without_allow_simulated(level: IsolationLevel) -> None:
    """Attestation none, whatever comes."""
    plain = AttestationPolicy(level=level, allow_simulated=False, checker=None)
    for raw in (None, b"anything"):
        assert await plain.judge(raw, "", EXPECTED) == Accepted(AttestationKind.NONE, None)


async def test_a_simulated_quote_is_asked_for_and_must_be_there() -> None:
    """With allow_simulated a missing one is refused, and an accepted one is marked simulated."""
    below = AttestationPolicy(
        level=IsolationLevel.VM, allow_simulated=True, checker=checker(), clock=At(VALID)
    )
    with pytest.raises(AttestationRefused) as refused:
        await below.judge(None, "", EXPECTED)
    assert refused.value.check == "quote_missing"
    assert (await below.judge(QUOTE, EVENT_LOG, EXPECTED)).kind is AttestationKind.SIMULATED


# What a verified quote must say besides


@pytest.mark.parametrize(
    ("change", "check"),
    [
        ({"td_attributes": b"\x01".ljust(8, b"\x00")}, "debug"),
        ({"mr_signer_seam": b"\x01".rjust(48, b"\x00")}, "seam_signer"),
        ({"mr_service_td": b"\x01".rjust(48, b"\x00")}, "service_td"),
        ({"mr_config_id": b"\x01".ljust(48, b"\x00")}, "mr_config_id"),
        ({"rtmrs": (bytes(48),) * 4}, "rtmr0"),
    ],
)
def test_each_check_has_its_name(change: dict[str, Any], check: str) -> None:
    """So that logs and the reason of a failed challenge say what was wrong."""
    quote = verified()
    assert faults_of(replace(quote, body=replace(quote.body, **change)))[0] == check


def test_a_config_id_that_binds_our_compose_is_accepted() -> None:
    """Form 1 of dstack: 01, the compose hash, zeros."""
    bound = (b"\x01" + bytes.fromhex(COMPOSE_HASH)).ljust(48, b"\x00")
    quote = verified()
    assert faults_of(replace(quote, body=replace(quote.body, mr_config_id=bound))) == []


# The event log


def events() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(EVENT_LOG)
    return found


def index(log: list[dict[str, Any]], name: str) -> int:
    return next(place for place, event in enumerate(log) if event["event"] == name)


def retell(log: list[dict[str, Any]], name: str, payload: str) -> None:
    """A lie that is consistent in itself: payload and digest."""
    event = log[index(log, name)]
    event["event_payload"] = payload
    event["digest"] = runtime_digest(name, bytes.fromhex(payload)).hex()


def test_the_four_registers_replay_and_the_identity_is_read() -> None:
    """From the log of a real CVM, which carries an app's own event after system-ready."""
    identity = check_event_log(EVENT_LOG, verified().body.rtmrs)
    assert identity.compose_hash == COMPOSE_HASH
    assert identity.app_id == COMPOSE_HASH[:40]
    assert identity.instance_id == INSTANCE


def test_a_log_without_runtime_digests_replays_too() -> None:
    """The agent strips them from v0.5.6 on: they are recomputed from the payloads in any case."""
    log = events()
    for event in log:
        if event["imr"] == 3:
            event["digest"] = ""
    assert check_event_log(json.dumps(log), verified().body.rtmrs).instance_id == INSTANCE


def _compose(log: list[dict[str, Any]]) -> None:
    retell(log, "compose-hash", "ab" * 32)


def _stated_digest(log: list[dict[str, Any]]) -> None:
    log[index(log, "compose-hash")]["event_payload"] = "ab" * 32


def _dropped(log: list[dict[str, Any]]) -> None:
    del log[index(log, "instance-id")]


def _swapped(log: list[dict[str, Any]]) -> None:
    one, two = index(log, "app-id"), index(log, "compose-hash")
    log[one], log[two] = log[two], log[one]


def _appended(log: list[dict[str, Any]]) -> None:
    log.append(log[index(log, "compose-hash")])


def _firmware(log: list[dict[str, Any]]) -> None:
    log[0]["digest"] = "00" * 48


@pytest.mark.parametrize(
    ("tamper", "check"),
    [
        (_compose, "rtmr3"),
        (_stated_digest, "event_log"),
        (_dropped, "rtmr3"),
        (_swapped, "rtmr3"),
        (_appended, "rtmr3"),
        (_firmware, "rtmr0"),
    ],
)
def test_a_tampered_log_does_not_replay(tamper: Callable[[list[dict[str, Any]]], None], check: str) -> None:
    """Changed, left out, reordered, repeated."""
    log = events()
    tamper(log)
    with pytest.raises(EventLogRefused) as refused:
        check_event_log(json.dumps(log), verified().body.rtmrs)
    assert refused.value.check == check


RUNTIME = [
    ("system-preparing", ""),
    ("app-id", COMPOSE_HASH[:40]),
    ("compose-hash", COMPOSE_HASH),
    ("instance-id", INSTANCE),
    ("boot-mr-done", ""),
    ("key-provider", "7b7d"),
    ("system-ready", ""),
]


def a_log(runtime: list[tuple[str, str]]) -> tuple[str, tuple[bytes, bytes, bytes, bytes]]:
    """A log of those runtime events alone, and registers to which it replays: an honest machine's lie."""
    text = json.dumps(
        [
            {"imr": 3, "event_type": 0x08000001, "digest": "", "event": name, "event_payload": payload}
            for name, payload in runtime
        ]
    )
    parsed = parse_event_log(text)
    return text, (bytes(48), bytes(48), bytes(48), replay(parsed, 3))


@pytest.mark.parametrize("name", ["app-id", "compose-hash", "instance-id", "system-ready", "boot-mr-done"])
def test_each_identity_event_must_be_there_once(name: str) -> None:
    """Missing, or twice before system-ready: even where the registers replay."""
    missing = [event for event in RUNTIME if event[0] != name]
    place = [event[0] for event in RUNTIME].index(name)
    twice = [*RUNTIME[:place], RUNTIME[place], *RUNTIME[place:]]
    for runtime in (missing, twice):
        text, rtmrs = a_log(runtime)
        with pytest.raises(EventLogRefused) as refused:
            check_event_log(text, rtmrs)
        assert refused.value.check == "event_order"


@pytest.mark.parametrize("name", ["app-id", "compose-hash", "instance-id"])
def test_an_identity_event_after_system_ready_is_refused(name: str) -> None:
    """An agent of v0.5.x lets an app extend RTMR3: it cannot become another app that way."""
    text, rtmrs = a_log([*RUNTIME, (name, "ab" * 20)])
    with pytest.raises(EventLogRefused, match="after system-ready"):
        check_event_log(text, rtmrs)


def test_a_true_identity_cannot_be_hidden_under_another_event_type() -> None:
    """The evil boot's events by their digests alone, then a good identity that the app extended itself."""
    evil = [(name, "ab" * 32 if name == "compose-hash" else payload) for name, payload in RUNTIME]
    text, rtmrs = a_log([*evil, *RUNTIME])
    log = json.loads(text)
    for event, (name, payload) in zip(log, evil, strict=False):
        digest = runtime_digest(name, bytes.fromhex(payload)).hex()
        event |= {"event_type": 1, "digest": digest, "event": "firmware", "event_payload": ""}
    with pytest.raises(EventLogRefused, match="no runtime measured"):
        check_event_log(json.dumps(log), rtmrs)


def test_a_true_identity_cannot_be_hidden_in_an_event_s_name() -> None:
    """A compose hash that begins with a colon would let the name swallow a part of it."""
    evil = "3a" + "ab" * 31
    early = [*RUNTIME[:2], ("compose-hash", evil), *RUNTIME[2:]]
    text, rtmrs = a_log(early)
    log = json.loads(text)
    log[2] |= {"event": "compose-hash:", "event_payload": evil[2:]}
    assert replay(parse_event_log(json.dumps(log)), 3) == rtmrs[3]
    with pytest.raises(EventLogRefused, match="colon"):
        check_event_log(json.dumps(log), rtmrs)


def test_events_of_the_app_after_system_ready_are_its_own_affair() -> None:
    """They replay, and say nothing."""
    text, rtmrs = a_log([*RUNTIME, ("anything", "ab")])
    assert check_event_log(text, rtmrs).compose_hash == COMPOSE_HASH


def test_an_identity_after_boot_mr_done_is_refused() -> None:
    """It was not measured when the keys were asked for."""
    late = [event for event in RUNTIME if event[0] != "compose-hash"]
    late.insert(5, ("compose-hash", COMPOSE_HASH))
    text, rtmrs = a_log(late)
    with pytest.raises(EventLogRefused, match="boot-mr-done"):
        check_event_log(text, rtmrs)


def test_a_log_without_an_instance_is_refused() -> None:
    """An app made without one could not be told from its twin."""
    nameless = [(name, "" if name == "instance-id" else payload) for name, payload in RUNTIME]
    text, rtmrs = a_log(nameless)
    quote = verified()
    found = faults_of(replace(quote, body=replace(quote.body, rtmrs=rtmrs)), text)
    assert found[0] == "instance_id"


@pytest.mark.parametrize(
    "text", ["", "{}", "[1]", '[{"imr":9}]', "[" * 20_000, '[{"imr":3,"event_type":-1}]']
)
def test_what_is_no_log_is_refused_as_such(text: str) -> None:
    """Never with another error."""
    with pytest.raises(EventLogRefused) as refused:
        check_event_log(text, verified().body.rtmrs)
    assert refused.value.check == "event_log"
