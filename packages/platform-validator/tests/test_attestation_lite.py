"""Published images, over a real quote: measurements computed from the image's own document."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from images_vector import BODY, CONFIG, DATA, EVENTS, LITE, identity

from platform_protocol.event_log import parse_event_log
from platform_validator.attestation import lite
from platform_validator.attestation.cbor import CborInvalid, read_cbor
from platform_validator.attestation.lite import LiteInvalid, lite_measurements
from platform_validator.attestation.os_image import (
    ImageTrust,
    KnownImages,
    Published,
    Shape,
    Trust,
    check_os_image,
)
from platform_validator.attestation.quote import QuoteBody

SMALL = Shape(2, 2048)


def published(vm_config: str, shape: Shape = SMALL, found: QuoteBody = BODY) -> str:
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
        known, BODY, identity(), image="dstack-0.6.0", shape=SMALL, vm_config=LITE["vm_config"]
    )
    assert f"the document is of {CONFIG['os_image_hash']}" in str(found)


def test_the_memory_part_of_rtmr0_holds_for_a_real_machine_of_64_gib() -> None:
    """The TD HOB of another vector, whose firmware has the same accepted ranges; white-box: a step."""
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
