"""Whatever is read of a CVM or a collateral service is refused by name, never with another error."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.attestation.evidence import DATA, World, real_dstack, runtime

from platform_protocol.event_log import (
    EventLogInvalid,
    parse_event_log,
    replay,
    runtime_digest,
)
from platform_validator.attestation.cbor import CborInvalid, read_cbor
from platform_validator.attestation.collateral import (
    INTEL_ROOT_SHA256,
    CollateralInvalid,
    read_collateral,
)
from platform_validator.attestation.event_log import EventLogRefused, check_event_log
from platform_validator.attestation.explain import NothingToExplain, explain, read_quote_file
from platform_validator.attestation.lite import LiteInvalid, lite_measurements
from platform_validator.attestation.mr_config import check_mr_config_id
from platform_validator.attestation.os_image import ImagesInvalid, read_images
from platform_validator.attestation.quote import (
    QuoteInvalid,
    check_pck_chain,
    outdated_since,
    parse_quote,
    verify_quote,
)

pytestmark = pytest.mark.slow(reason="dozens of made-up inputs for each parser")

REAL = real_dstack()
QUOTE = REAL.quote or b""
COLLATERAL = json.dumps(REAL.collateral)
SIGNED = 48 + 584 + 4 + int.from_bytes(QUOTE[632:636], "little")
CERTIFICATES = QUOTE.index(b"-----BEGIN CERTIFICATE-----")
WORLD = World()
RTMRS = parse_quote(QUOTE).rtmrs
NOW = datetime(2026, 3, 1, tzinfo=UTC)
EXAMPLES = settings(max_examples=60, deadline=None)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=12), inner, max_size=5),
    max_leaves=25,
)
HEX = st.binary(max_size=60).map(bytes.hex)
EVENT = st.fixed_dictionaries(
    {"imr": st.integers(-1, 4), "event_type": st.sampled_from([0, 1, 0x08000001, -1, 2**32])},
    optional={
        "digest": HEX | st.just("00" * 48) | st.text(max_size=5),
        "event": st.sampled_from(["app-id", "compose-hash", "system-ready", "x:y", ""]) | st.text(max_size=9),
        "event_payload": HEX | st.text(max_size=5),
        "version": st.integers(0, 3),
        "preimage": HEX,
    },
)


# A later cryptography refuses such a serial number with an error; this one says so, and goes on.
@pytest.mark.filterwarnings("ignore:Parsed a serial number which wasn't positive")
@EXAMPLES
@given(at=st.integers(0, SIGNED - 1), bit=st.integers(0, 7))
def test_no_bit_of_a_real_quote_can_be_flipped(at: int, bit: int) -> None:
    """But in the PEM text of its certificates, where some flips mean the same: what it says is signed."""
    changed = bytearray(QUOTE)
    changed[at] ^= 1 << bit
    try:
        check_pck_chain(bytes(changed), INTEL_ROOT_SHA256)
        found = verify_quote(bytes(changed), COLLATERAL, NOW, None)
    except QuoteInvalid:
        return
    assert found.body == parse_quote(QUOTE)
    assert at >= CERTIFICATES


@EXAMPLES
@given(data=st.binary(max_size=3000), begins=st.sampled_from([b"", QUOTE[:48], QUOTE[:636], QUOTE[:1300]]))
def test_bytes_are_no_quote(data: bytes, begins: bytes) -> None:
    for read in (parse_quote, lambda raw: verify_quote(raw, COLLATERAL, NOW, None)):
        with pytest.raises(QuoteInvalid):
            read(begins + data)
    with pytest.raises(QuoteInvalid):
        check_pck_chain(begins + data, "00" * 32)


@EXAMPLES
@given(data=st.binary(max_size=400) | JSON.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_explained_or_refused(data: bytes) -> None:
    with pytest.raises(NothingToExplain):
        explain(read_quote_file(data), now=NOW)


@EXAMPLES
@given(extra=st.dictionaries(st.sampled_from(["event_log", "report_data", "vm_config", "more"]), JSON))
def test_a_real_quote_beside_anything_is_explained(extra: dict[str, Any]) -> None:
    """And can be told as JSON."""
    found = explain(read_quote_file(json.dumps({"quote": QUOTE.hex()} | extra).encode()), now=NOW)
    assert json.loads(json.dumps(found))["quote"]["fmspc"] == "90C06F000000"


@EXAMPLES
@given(log=st.lists(EVENT, max_size=12) | JSON)
def test_a_log_that_somebody_made_up_is_refused(log: Any) -> None:
    """It cannot replay to a real machine's registers."""
    with pytest.raises(EventLogRefused):
        check_event_log(json.dumps(log), RTMRS)
    with pytest.raises(EventLogRefused):
        check_event_log(json.dumps(log)[:-1], RTMRS)


@EXAMPLES
@given(log=st.lists(EVENT, max_size=12))
def test_a_log_that_replays_to_its_own_registers_is_judged_by_its_events(log: Any) -> None:
    """A hostile guest's: registers and log agree, and still the identity is read or refused by name."""
    try:
        events = parse_event_log(json.dumps(log))
        registers = tuple(replay(events, imr) for imr in range(4))
    except EventLogInvalid:
        return
    with pytest.raises(EventLogRefused) as refused:
        check_event_log(json.dumps(log), (registers[0], registers[1], registers[2], registers[3]))
    assert refused.value.check.value == "event_order"


@EXAMPLES
@given(
    name=st.text(max_size=30).filter(lambda text: text.isprintable()),
    payload=st.binary(max_size=60),
    version=st.sampled_from([1, 2]),
    stripped=st.booleans(),
)
def test_a_runtime_event_replays_by_its_name_and_payload(
    name: str, payload: bytes, version: int, stripped: bool
) -> None:
    """Stripped or not; and any other payload under the stated digest is found out."""
    event = runtime(name, payload.hex()) | {"version": version}
    digest = runtime_digest(name, payload, version)
    if not stripped:
        event["digest"] = digest.hex()
    alone = replay(parse_event_log(json.dumps([event])), 3)
    assert alone == replay(parse_event_log(json.dumps([event | {"digest": ""}])), 3)
    lie = event | {"event_payload": (payload + b"x").hex(), "digest": digest.hex()}
    with pytest.raises(EventLogInvalid):
        replay(parse_event_log(json.dumps([lie])), 3)


@EXAMPLES
@given(place=st.integers(0, 10), other=st.binary(min_size=1, max_size=40))
def test_any_change_of_an_honest_log_is_noticed(place: int, other: bytes) -> None:
    """Each event's payload or digest."""
    log = WORLD.events()
    registers = WORLD.td(log).rtmrs
    assert check_event_log(json.dumps(log), registers).compose_hash == WORLD.compose_hash
    event = log[place]
    key = "event_payload" if event["imr"] == 3 else "digest"
    if event[key] == other.hex():
        return
    event[key] = other.hex()
    with pytest.raises(EventLogRefused):
        check_event_log(json.dumps(log), registers)


@EXAMPLES
@given(data=st.binary(max_size=200))
def test_bytes_are_cbor_of_our_kind_or_refused(data: bytes) -> None:
    try:
        read_cbor(data)
    except CborInvalid:
        return
    with pytest.raises(CborInvalid):
        read_cbor(data + b"\x00")


@EXAMPLES
@given(
    value=st.binary(min_size=48, max_size=48), config=JSON | st.fixed_dictionaries({"mr_config": st.text()})
)
def test_no_made_up_mr_config_id_is_accepted(value: bytes, config: Any) -> None:
    """Unless it is zero."""
    for head in (b"", b"\x01", b"\x02", b"\x03"):
        found = (head + value)[:48]
        assert check_mr_config_id(found, WORLD.app, json.dumps(config)) is not None or not any(found)


@EXAMPLES
@given(
    config=JSON | st.fixed_dictionaries({"tdx_measurement": JSON}), memory=st.sampled_from([1, 2048, 4096])
)
def test_no_made_up_document_is_computed_with(config: Any, memory: int) -> None:
    with pytest.raises(LiteInvalid):
        lite_measurements(json.dumps(config), (), memory_mb=memory)


@EXAMPLES
@given(
    change=st.dictionaries(st.sampled_from(sorted(REAL.collateral)), JSON, min_size=1)
    | st.dictionaries(st.sampled_from(sorted(REAL.collateral)), HEX, min_size=1)
)
def test_collateral_with_anything_in_it_is_invalid(change: dict[str, Any]) -> None:
    with pytest.raises(CollateralInvalid):
        read_collateral(
            json.dumps(REAL.collateral | change), fmspc="90C06F000000", authority="platform", now=NOW
        )


@EXAMPLES
@given(info=JSON, identity=JSON, claims=JSON)
def test_grace_is_never_taken_from_nonsense(info: Any, identity: Any, claims: Any) -> None:
    held = {"tcb_info": json.dumps(info), "qe_identity": json.dumps(identity)}
    assert outdated_since(held, claims, bytes(16)) is None


@EXAMPLES
@given(text=st.text(max_size=200))
def test_a_file_of_images_is_read_or_refused(text: str) -> None:
    try:
        known = read_images(text)
    except ImagesInvalid:
        return
    assert (known.pinned, known.published) == ((), ())


def test_the_vectors_are_where_the_table_says() -> None:
    """Each file of real data has its origin and licence."""
    table = (DATA / "README.md").read_text()
    files = {path.name for path in DATA.iterdir()} - {"README.md"}
    assert {name for name in files if f"`{name}`" in table} == files
