"""Simulated attestation: quotes that verify under our own root and no other, with logs that replay."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path

import dcap_qvl
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from running_vmm import compose

from platform_protocol.event_log import parse_event_log, replay
from platform_vmm.app_compose import read_app_compose
from platform_vmm.images import Runtime
from platform_vmm.simulation.measured import boot_event_log, measurements
from platform_vmm.simulation.pki import Pki, load_pki
from platform_vmm.simulation.quote import collateral, make_quote


@pytest.fixture
def quoted(runtime: Runtime, pki: Pki) -> tuple[bytes, str]:
    app = read_app_compose(compose(runtime, ["true"]))
    log = boot_event_log(app, app_id=app.app_id, instance_id="ab" * 20, runtime_digest_text=runtime.digest)
    return make_quote(pki, measurements(log, app), b"r" * 64), log


def _verify(raw: bytes, pki: Pki, root: Pki | None = None) -> object:
    parsed = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(collateral(pki, datetime.now(UTC))))
    der = (root or pki).root.public_bytes(Encoding.DER)
    return dcap_qvl.verify_with_root_ca(raw, parsed, der, int(time.time()))


def test_a_simulated_quote_verifies_under_its_own_root(quoted: tuple[bytes, str], pki: Pki) -> None:
    assert str(_verify(quoted[0], pki).status) == "UpToDate"  # type: ignore[attr-defined]  # dcap-qvl has no stubs


def test_it_does_not_verify_under_intels_root(quoted: tuple[bytes, str], pki: Pki) -> None:
    parsed = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(collateral(pki, datetime.now(UTC))))
    with pytest.raises(ValueError, match=r"erif|CRL|parse|expected|nvalid|quote"):
        dcap_qvl.verify(quoted[0], parsed, int(time.time()))


def test_it_does_not_verify_under_another_simulated_root(
    quoted: tuple[bytes, str], pki: Pki, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"erif|CRL|parse|expected|nvalid|quote"):
        _verify(quoted[0], pki, load_pki(tmp_path))


@pytest.mark.parametrize("offset", [60, 200, 400, 570, 700, 1300])
def test_one_changed_byte_is_refused(quoted: tuple[bytes, str], pki: Pki, offset: int) -> None:
    raw = bytearray(quoted[0])
    raw[offset] ^= 1
    with pytest.raises(ValueError, match=r"erif|CRL|parse|expected|nvalid|quote"):
        _verify(bytes(raw), pki)


def test_the_event_log_replays_to_the_quotes_registers(quoted: tuple[bytes, str]) -> None:
    report = dcap_qvl.parse_quote(quoted[0]).report
    events = parse_event_log(quoted[1])
    assert [replay(events, n) for n in range(4)] == [
        report.rt_mr0,
        report.rt_mr1,
        report.rt_mr2,
        report.rt_mr3,
    ]
    assert bytes(report.report_data) == b"r" * 64


def test_every_certificate_says_that_it_is_simulated(pki: Pki) -> None:
    for certificate in (pki.root, pki.platform_ca, pki.pck, pki.signer):
        assert "SIMULATED" in certificate.subject.rfc4514_string()


def test_keys_are_private(image_state: Path, pki: Pki) -> None:
    del pki
    modes = {path.stat().st_mode & 0o777 for path in (image_state / "simulation").iterdir()}
    assert modes == {0o600}
