"""The parts of the policy, each a pure function: TCB, known images, MRCONFIGID, computed measurements."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from platform_protocol.event_log import Event, parse_event_log
from platform_validator.attestation.cbor import CborInvalid, read_cbor
from platform_validator.attestation.checks import ADJUSTABLE, Check, Outcome, Outcomes
from platform_validator.attestation.event_log import Identity
from platform_validator.attestation.gate import FIRST_PAUSE, LONGEST_PAUSE, QuoteGate
from platform_validator.attestation.keccak import SHA3_PAD, keccak_256
from platform_validator.attestation.lite import LiteInvalid, lite_measurements
from platform_validator.attestation.mr_config import BoundApp, check_mr_config_id, mr_config_id
from platform_validator.attestation.os_image import (
    ImagesFile,
    ImagesInvalid,
    ImageTrust,
    KnownImages,
    Pinned,
    Published,
    Shape,
    Trust,
    check_os_image,
    read_images,
)
from platform_validator.attestation.quote import QuoteBody, parse_quote
from platform_validator.attestation.tcb import TcbRules, judge_tcb
from platform_validator.config import ConfigFaults, load_settings
from platform_validator.daemon.parts import make_rules

DATA = Path(__file__).parent / "data" / "tdx"
LITE = json.loads((DATA / "dstack_lite_quote.json").read_text())
EVENTS = parse_event_log(LITE["event_log"])
BODY = parse_quote(bytes.fromhex(LITE["quote"]))
CONFIG = json.loads(LITE["vm_config"])
NOW = datetime(2026, 6, 1, tzinfo=UTC)
HOTKEY = {
    "VALIDATOR_HOTKEY": "5H728gLgx4yuCSVEwGCAfLo3RtzTau9F6cTNqNJtrqqjACWq",
    "PLATFORM_BASE_API": "http://nowhere",
}


# TCB


@pytest.mark.parametrize(
    ("status", "advisories", "rules", "found"),
    [
        ("UpToDate", [], TcbRules(), []),
        ("SWHardeningNeeded", [], TcbRules(), ["tcb_status"]),
        ("SWHardeningNeeded", [], TcbRules(statuses=("UpToDate", "SWHardeningNeeded")), []),
        ("UpToDate", ["INTEL-SA-1"], TcbRules(), ["advisories"]),
        ("UpToDate", ["INTEL-SA-1"], TcbRules(advisories=("INTEL-SA-1",)), []),
        ("UpToDate", ["INTEL-SA-1", "INTEL-SA-2"], TcbRules(advisories=("INTEL-SA-1",)), ["advisories"]),
        ("UpToDate", ["INTEL-SA-1"], TcbRules(advisories=("any",)), []),
        ("OutOfDate", ["INTEL-SA-1"], TcbRules(), ["tcb_status", "advisories"]),
        ("Revoked", [], TcbRules(grace=timedelta(days=999)), ["tcb_status"]),
        ("", [], TcbRules(), ["tcb_status"]),
    ],
)
def test_a_status_and_its_advisories_are_accepted_by_name(
    status: str, advisories: list[str], rules: TcbRules, found: list[str]
) -> None:
    since = NOW - timedelta(days=1)
    assert [check for check, _ in judge_tcb(status, advisories, since, rules=rules, now=NOW)] == found


@pytest.mark.parametrize(
    ("days", "accepted"), [(29, True), (30, False), (31, False)], ids=["within", "at its end", "after"]
)
@pytest.mark.parametrize("status", ["OutOfDate", "OutOfDateConfigurationNeeded"])
def test_grace_counts_from_when_the_missing_level_was_published(
    status: str, days: int, accepted: bool
) -> None:
    rules = TcbRules(grace=timedelta(days=30))
    found = judge_tcb(status, [], NOW - timedelta(days=days), rules=rules, now=NOW)
    assert (found == []) is accepted


def test_without_that_time_there_is_no_grace() -> None:
    """Nor for a status that is not for its age."""
    rules = TcbRules(grace=timedelta(days=30))
    assert judge_tcb("OutOfDate", [], None, rules=rules, now=NOW)
    assert judge_tcb("ConfigurationNeeded", [], NOW, rules=rules, now=NOW)


# Outcomes


def test_everything_is_required_at_tee_by_default() -> None:
    """Strictest; below it, only a simulated image's measurements are not asked for."""
    assert {Outcomes(tee=True).of(check) for check in Check} == {Outcome.REQUIRED}
    below = {check: Outcomes(tee=False).of(check) for check in Check}
    assert [check for check, outcome in below.items() if outcome is not Outcome.REQUIRED] == ["os_image"]


def test_only_some_outcomes_can_be_chosen() -> None:
    """Whatever is handed in for another check is not heard."""
    chosen = Outcomes(dict.fromkeys(Check, Outcome.OFF), tee=True)
    assert {check for check in Check if chosen.of(check) is Outcome.OFF} == ADJUSTABLE


def test_the_configuration_becomes_the_policy(tmp_path: Path) -> None:
    """Each setting, under its own name."""
    (tmp_path / "config.toml").write_text(
        '[attestation]\ntcb_statuses = ["UpToDate", "OutOfDate"]\nadvisories = ["any"]\ntcb_grace = "7d"\n'
        f'images_file = "{tmp_path / "known.toml"}"\n[attestation.checks]\n'
        'os_image = "warn"\nadvisories = "off"\n'
    )
    rules = make_rules(load_settings(HOTKEY, folder=tmp_path))
    assert rules.tcb == TcbRules(("UpToDate", "OutOfDate"), ("any",), timedelta(days=7))
    assert rules.outcomes.of(Check.OS_IMAGE) is Outcome.WARN
    assert rules.outcomes.of(Check.ADVISORIES) is Outcome.OFF
    assert rules.outcomes.of(Check.TCB_STATUS) is Outcome.REQUIRED
    before = rules.fingerprint()
    ImagesFile(tmp_path / "known.toml").add(PINNED)
    assert rules.images().pinned == (PINNED,)
    assert rules.fingerprint() != before


@pytest.mark.parametrize(
    "text",
    [
        '[attestation]\ntcb_statuses = ["Revoked"]\n',
        '[attestation]\ntcb_statuses = "Fine"\n',
        '[attestation.checks]\nos_image = "perhaps"\n',
        '[attestation.checks]\nreport_data = "off"\n',
        '[attestation]\ntcb_grace = "soon"\n',
    ],
)
def test_what_is_no_policy_is_a_fault_of_the_configuration(tmp_path: Path, text: str) -> None:
    """Also a check that cannot be turned off."""
    (tmp_path / "config.toml").write_text(text)
    with pytest.raises(ConfigFaults) as caught:
        load_settings(HOTKEY, folder=tmp_path)
    assert len(caught.value.faults) == 1
    assert "attestation." in caught.value.faults[0]


# The gate


def test_a_host_without_quotes_is_tried_ever_less_often() -> None:
    """30 s, doubled, up to ten minutes; the first quote opens."""
    gate, pauses = QuoteGate(), []
    assert gate.admits(0)
    now = 1000.0
    for _ in range(8):
        gate = gate.without(now)
        assert not gate.admits(now)
        assert gate.without(now + 1) == gate
        pauses.append(gate.closed_until - now)
        now = gate.closed_until
        assert gate.admits(now)
    assert pauses[:3] == [FIRST_PAUSE.total_seconds() * factor for factor in (1, 2, 4)]
    assert pauses[-1] == LONGEST_PAUSE.total_seconds()
    assert gate.shown().admits(1000.0)


# Known images

PINNED = Pinned("dstack-0.5.5", Shape(4, 8192), "aa" * 48, "00" * 48, "11" * 48, "22" * 48, "by hand")


def body(**fields: Any) -> QuoteBody:
    registers = bytes(48), b"\x11" * 48, b"\x22" * 48, b"\x33" * 48
    return replace(BODY, mrtd=b"\xaa" * 48, rtmrs=registers, **fields)


def identity(events: list[Event] | None = None) -> Identity:
    return Identity("", "", "", "none", "", tuple(EVENTS if events is None else events))


def trusted(
    known: KnownImages, found: QuoteBody, image: str = "dstack-0.5.5", shape: Shape = PINNED.shape
) -> ImageTrust | str:
    return check_os_image(known, found, identity(), image=image, shape=shape, vm_config="{}")


def judged(
    known: KnownImages, found: QuoteBody, image: str = "dstack-0.5.5", shape: Shape = PINNED.shape
) -> str:
    """What is wrong with it, if anything is."""
    trust = trusted(known, found, image, shape)
    return trust if isinstance(trust, str) else "trusted"


def test_what_was_pinned_is_known_and_nothing_else() -> None:
    """Another shape or image names the command; another register is named with both values."""
    known = KnownImages((PINNED,))
    assert judged(known, body()) == "trusted"
    assert "--image dstack-0.5.5 --cpu 8 --memory 8192" in judged(known, body(), shape=Shape(8, 8192))
    assert "--gpus 1" in judged(known, body(), shape=Shape(4, 8192, 1))
    assert "--image other" in judged(known, body(), image="other")
    wrong = judged(known, replace(body(), mrtd=b"\xbb" * 48))
    assert wrong.startswith(
        "image dstack-0.5.5 at 4 vCPUs, 8192 MB booted to something else: MRTD: pinned aaaa"
    )
    assert "RTMR" not in wrong


def test_entries_of_one_shape_are_alternatives() -> None:
    """Another QEMU adds pages in another order."""
    other = replace(PINNED, mrtd="bb" * 48)
    known = KnownImages((other, PINNED))
    assert judged(known, body()) == "trusted"
    assert "something else" in judged(KnownImages((other,)), body())


FIRST_USE = replace(PINNED, origin="first use (measured)", first_use="2026-11-25T12:00:00Z")


@pytest.mark.parametrize(
    ("entries", "trust"),
    [
        ((PINNED,), ImageTrust(Trust.PINNED, "dstack-0.5.5", Shape(4, 8192), "by hand")),
        (
            (FIRST_USE,),
            ImageTrust(
                Trust.FIRST_USE,
                "dstack-0.5.5",
                Shape(4, 8192),
                "first use (measured)",
                "2026-11-25T12:00:00Z",
            ),
        ),
        ((FIRST_USE, PINNED), ImageTrust(Trust.PINNED, "dstack-0.5.5", Shape(4, 8192), "by hand")),
    ],
    ids=["by hand", "first use", "first use, then vouched for"],
)
def test_how_an_image_came_to_be_trusted_is_told(entries: tuple[Pinned, ...], trust: ImageTrust) -> None:
    """First use is called that, until somebody vouches for the same values."""
    assert trusted(KnownImages(entries), body()) == trust


def test_what_an_earlier_pin_wrote_is_first_use_too(tmp_path: Path) -> None:
    """Its origin begins so; entries of today say so in a line of its own, what is no time is refused."""
    file = ImagesFile(tmp_path / "images.toml")
    file.add(FIRST_USE)
    assert file.known().pinned == (FIRST_USE,)
    assert 'first_use = "2026-11-25T12:00:00Z"' in file.path.read_text()
    for word in ("", "simulated, "):
        old = f"first use ({word}measured 2026-06-01T12:00:00Z on unix:/vmm.sock, platform 00)"
        file = ImagesFile(tmp_path / f"{len(word)}.toml")
        file.add(replace(PINNED, origin=old))
        [read] = file.known().pinned
        assert read.first_use == "2026-06-01T12:00:00Z"
    with pytest.raises(ImagesInvalid, match="first_use"):
        ImagesFile(tmp_path / "wrong.toml").add(replace(PINNED, first_use="yesterday"))


def test_registers_are_not_mixed_from_two_entries() -> None:
    known = KnownImages((replace(PINNED, mrtd="bb" * 48), replace(PINNED, rtmr1="bb" * 48)))
    assert "something else" in judged(known, body())


def test_a_file_of_images_is_written_and_read_again(tmp_path: Path) -> None:
    """What an operator wrote stays, comments too; an origin cannot break out of its line."""
    file = ImagesFile(tmp_path / "folder" / "images.toml")
    assert file.known() == KnownImages()
    file.add(PINNED)
    assert file.known().pinned == (PINNED,)
    file.path.write_text(file.path.read_text() + "\n# a note\n")
    file.add(replace(PINNED, origin='x"\n[[pinned]]\n'))
    known = file.known()
    assert [one.origin for one in known.pinned] == ["by hand", "x??[[pinned]]?"]
    assert "# a note" in file.path.read_text()
    assert oct(file.path.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[pinned]\n", "not TOML"),
        ("images = 1\n", "expected [[pinned]] and [[published]]"),
        ("pinned = 1\n", "expected [[pinned]] tables"),
        ('[[pinned]]\nimage = "i"\n', "[[pinned]] 1: expected cpu"),
        ('[[published]]\nimage = "i"\nos_image_hash = "xyz"\norigin = ""\n', "os_image_hash: expected"),
        (
            '[[published]]\nimage = "../i"\nos_image_hash = "' + "0" * 64 + '"\norigin = ""\n',
            "image: expected",
        ),
    ],
)
def test_a_file_that_cannot_be_used_knows_nothing_and_is_left_alone(
    tmp_path: Path, text: str, says: str
) -> None:
    """The check fails with the fault; an entry is not added to what cannot be read."""
    with pytest.raises(ImagesInvalid) as caught:
        read_images(text)
    assert says in str(caught.value)
    file = ImagesFile(tmp_path / "images.toml")
    file.path.write_text(text)
    assert says in str(file.known().fault)
    assert judged(file.known(), body()) == file.known().fault
    with pytest.raises(ImagesInvalid):
        file.add(PINNED)
    assert file.path.read_text() == text


def test_a_changed_file_is_read_again_and_a_removed_one_knows_nothing(tmp_path: Path) -> None:
    file = ImagesFile(tmp_path / "images.toml")
    file.add(PINNED)
    first = file.known()
    assert file.known() is first
    file.add(replace(PINNED, shape=Shape(8, 8192)))
    assert len(file.known().pinned) == 2
    file.path.unlink()
    assert file.known() == KnownImages()


# Published images, over a real quote


def published(vm_config: str, shape: Shape = Shape(2, 2048), found: QuoteBody = BODY) -> str:  # noqa: B008 - a value
    known = KnownImages((), (Published("dstack-0.6.0", CONFIG["os_image_hash"], "its publisher"),))
    trust = check_os_image(known, found, identity(), image="dstack-0.6.0", shape=shape, vm_config=vm_config)
    if isinstance(trust, str):
        return trust
    # Its document goes with it, so that whoever reads the receipt can compute the same.
    expected = ImageTrust(
        Trust.PUBLISHED, "dstack-0.6.0", shape, "its publisher", vm_config=LITE["vm_config"]
    )
    assert trust == expected
    return "trusted"


def test_a_published_image_is_computed_from_its_own_document() -> None:
    """MRTD and RTMR0 to 2 of a real machine of 2 GiB; a register that is not so is named."""
    assert published(LITE["vm_config"]) == "trusted"
    other = replace(BODY, rtmrs=(bytes(48), *BODY.rtmrs[1:]))
    assert (
        published(LITE["vm_config"], found=other) == "the published image does not boot to the measured RTMR0"
    )
    assert "RTMR0" in published(LITE["vm_config"], Shape(2, 4096))
    assert "must be pinned" in published(LITE["vm_config"], Shape(2, 2304))


def test_a_document_of_another_image_does_not_count() -> None:
    """Whatever the guest says of its hash."""
    known = KnownImages((), (Published("dstack-0.6.0", "0" * 64, "its publisher"),))
    found = check_os_image(
        known, BODY, identity(), image="dstack-0.6.0", shape=Shape(2, 2048), vm_config=LITE["vm_config"]
    )
    assert f"the document is of {CONFIG['os_image_hash']}" in str(found)


def test_the_memory_part_of_rtmr0_holds_for_a_real_machine_of_64_gib() -> None:
    """The TD HOB of another vector, whose firmware has the same accepted ranges."""
    from platform_validator.attestation import lite  # noqa: PLC0415 - white-box: one of its steps

    document = read_cbor(base64.b64decode(CONFIG["tdx_measurement"]["measurement"]))
    assert isinstance(document, dict)
    assert isinstance(document["tdvf"], dict)
    witness = document["tdvf"]["td_hob"]
    assert isinstance(witness, bytes)
    report = json.loads((DATA / "dstack_quote_report.json").read_text())
    first = parse_event_log(report["event_log"])[0]
    assert lite._td_hob(witness, 64 * 1024**3).hex() == first.digest


def _measurement(config: dict[str, Any], data: bytes) -> None:
    """Another document, with a checksum file that lists it: the os_image_hash changes, or must."""
    listing = base64.b64decode(config["tdx_measurement"]["checksum_file"]).decode()
    lines = [line for line in listing.splitlines() if "measurement.tdx.cbor" not in line]
    lines.append(f"{hashlib.sha256(data).hexdigest()}  measurement.tdx.cbor")
    config["tdx_measurement"]["checksum_file"] = base64.b64encode("\n".join(lines).encode()).decode()
    config["tdx_measurement"]["measurement"] = base64.b64encode(data).decode()


DOCUMENT = base64.b64decode(CONFIG["tdx_measurement"]["measurement"])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.pop("tdx_measurement"), "carries no tdx_measurement"),
        (lambda c: c.update(tdx_measurement=1), "carries no tdx_measurement"),
        (lambda c: c["tdx_measurement"].pop("measurement"), "cannot be read"),
        (lambda c: c["tdx_measurement"].update(measurement="!"), "cannot be read"),
        (lambda c: c["tdx_measurement"].update(checksum_file=""), "lists another"),
        (lambda c: c["tdx_measurement"].update(measurement="oA=="), "lists another"),
        (lambda c: _measurement(c, b"\x00"), "no map"),
        (lambda c: _measurement(c, b"\xa0"), "no map image"),
        (lambda c: _measurement(c, DOCUMENT.replace(b"pre202505", b"pre209905")), "of version 3 for OVMF"),
        (lambda c: _measurement(c, DOCUMENT.replace(b"td_hob", b"td_hop")), "no td_hob"),
        (lambda c: _measurement(c, DOCUMENT.replace(b"two_pass", b"two_pasz")), "two_pass"),
        (lambda c: _measurement(c, DOCUMENT[:-1]), "cannot be read"),
    ],
)
def test_what_is_not_the_images_document_is_not_computed_with(
    change: Callable[[dict[str, Any]], None], says: str
) -> None:
    config = copy.deepcopy(CONFIG)
    change(config)
    with pytest.raises(LiteInvalid) as caught:
        lite_measurements(json.dumps(config), EVENTS, memory_mb=2048)
    assert says in str(caught.value)


def test_unnamed_acpi_events_are_not_guessed() -> None:
    """Images before 0.6.0 do not name them."""
    unnamed = [event.model_copy(update={"event": ""}) for event in EVENTS]
    with pytest.raises(LiteInvalid, match="acpi-loader"):
        lite_measurements(LITE["vm_config"], unnamed, memory_mb=2048)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x18\x05",
        b"\x5f",
        b"\x43ab",
        b"\xa1\x00\x00",
        b"\xa2\x61a\x00\x61a\x00",
        b"\x80",
        b"\xf5",
        b"\x00\x00",
    ],
)
def test_cbor_of_another_form_is_refused(data: bytes) -> None:
    """Not shortest, indefinite, cut, keys that are no text or twice, lists, booleans, more behind."""
    with pytest.raises(CborInvalid):
        read_cbor(data)


# MRCONFIGID

APP = BoundApp("ab" * 32, "ab" * 20, "cd" * 20, "kms", "00ff")


@pytest.mark.parametrize("form", [1, 2, 3])
def test_each_form_of_mr_config_id_binds_the_app(form: int) -> None:
    value = mr_config_id(form, APP)
    assert (value[0], value[33:]) == (form, bytes(15))
    assert check_mr_config_id(value, APP, "{}") is None
    assert check_mr_config_id(value, replace(APP, compose_hash="ba" * 32), "{}")
    if form > 1:
        assert check_mr_config_id(value, replace(APP, provider_id="00fe"), "{}")
        assert check_mr_config_id(value, replace(APP, provider="tpm"), "{}")


def test_a_real_mr_config_id_binds_its_compose() -> None:
    """Form 1, from a real machine."""
    app = next(event.event_payload for event in EVENTS if event.event == "compose-hash")
    bound = replace(APP, compose_hash=app, app_id=app[:40])
    assert BODY.mr_config_id[0] == 1
    assert check_mr_config_id(BODY.mr_config_id, bound, "{}") is None


def test_keccak_is_keccak() -> None:
    """Two published digests; with the other padding it is hashlib's SHA3-256 at every block's edge."""
    assert keccak_256(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"
    assert keccak_256(b"abc").hex() == "4e03657aea45a94fc7d47ba826c8d667c0d1e6e33a64a036ec44f58fa12d6c45"
    for size in (0, 1, 135, 136, 137, 271, 272, 300):
        data = bytes(one % 251 for one in range(size))
        assert keccak_256(data, pad=SHA3_PAD) == hashlib.sha3_256(data).digest()
