"""`validator attestation inspect`: explains real quotes in each form, and says what is not proved."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from platform_validator.cli.main import app

DATA = Path(__file__).parent / "data" / "tdx"
REPORT = DATA / "dstack_quote_report.json"
COLLATERAL = ["--collateral", str(DATA / "dstack_collateral.json"), "--at", "2026-03-01T00:00:00Z"]


def inspected(path: Path, *more: str) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(app, ["attestation", "inspect", str(path), *more, "--json"])
    found: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    return done.exit_code, found


def holds(found: dict[str, Any]) -> dict[str, bool | None]:
    return {name: one["holds"] for name, one in found["proved"].items()}


def test_a_dstack_report_is_explained_and_proved() -> None:
    """Signature, report data, all four registers, MRCONFIGID; the identity is read from the log."""
    code, found = inspected(REPORT, *COLLATERAL)
    assert code == 0
    assert holds(found) == {"signature": True, "report_data": True, "event_log": True, "mr_config_id": True}
    assert found["proved"]["signature"]["tcb_status"] == "UpToDate"
    assert found["event_log"]["identity"]["key_provider"] == "local-sgx"
    assert found["vm_config"]["cpu_count"] == 16


def test_without_collateral_the_signature_is_not_judged() -> None:
    """And for people it says that nothing is proved then."""
    code, found = inspected(REPORT)
    assert (code, found["proved"]["signature"]["holds"]) == (0, None)
    shown = CliRunner().invoke(app, ["attestation", "inspect", str(REPORT)]).stdout
    assert "only what the file says" in " ".join(shown.split())


def test_an_image_with_its_own_document_is_computed() -> None:
    """MRTD and RTMR0 to 2 of a real machine."""
    code, found = inspected(DATA / "dstack_lite_quote.json")
    assert (code, found["proved"]["os_image"]["holds"]) == (0, True)


@pytest.mark.parametrize("form", ["raw", "hex", "base64"])
def test_each_form_of_a_quote_is_found(tmp_path: Path, form: str) -> None:
    raw = (DATA / "tdx_quote.bin").read_bytes()
    text = {"raw": raw, "hex": b"0x" + raw.hex().encode() + b"\n", "base64": base64.encodebytes(raw)}
    (tmp_path / "quote").write_bytes(text[form])
    code, found = inspected(tmp_path / "quote")
    assert (code, found["form"], found["quote"]["fmspc"]) == (0, form, "B0C06F000000")


def test_td_1_5_is_named() -> None:
    code, found = inspected(DATA / "tdx_quote_td15.bin")
    assert (code, found["quote"]["version"], found["quote"]["td_version"]) == (0, 5, "1.5")


@pytest.mark.parametrize(
    ("change", "name", "check"),
    [
        (lambda report: report.update(report_data="5678"), "report_data", "report_data"),
        (lambda report: report.update(event_log="[]"), "event_log", "rtmr0"),
        (lambda report: report.update(event_log="nothing"), "event_log", "event_log"),
        (
            lambda report: report.update(quote=report["quote"].replace("b24d3b24", "b24d3b25")),
            "signature",
            None,
        ),
    ],
)
def test_what_fails_is_named_and_ends_with_1(
    tmp_path: Path, change: Any, name: str, check: str | None
) -> None:
    report = json.loads(REPORT.read_text())
    change(report)
    (tmp_path / "report.json").write_text(json.dumps(report))
    code, found = inspected(tmp_path / "report.json", *COLLATERAL)
    assert (code, found["proved"][name]["holds"]) == (1, False)
    assert found["proved"][name]["check"] == (check or "quote_signature")


def test_a_compose_file_is_compared(tmp_path: Path) -> None:
    """Byte for byte."""
    (tmp_path / "app-compose.json").write_text("{}")
    code, found = inspected(REPORT, "--compose", str(tmp_path / "app-compose.json"))
    assert (code, found["proved"]["compose_hash"]["check"]) == (1, "compose_hash")


@pytest.mark.parametrize(
    "content", [b"", b"no quote", b"{}", b"\x04\x00" * 400, b"[" * 5000, b'{"quote":"zz"}']
)
def test_what_is_no_quote_is_refused_with_2(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "file").write_bytes(content)
    done = CliRunner().invoke(app, ["attestation", "inspect", str(tmp_path / "file")])
    assert done.exit_code == 2
    assert "error: " in done.stderr


@pytest.mark.parametrize("arguments", [["/nonexistent"], [str(REPORT), "--at", "yesterday"]])
def test_bad_arguments_are_refused_with_2(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, ["attestation", "inspect", *arguments])
    assert (done.exit_code, done.stdout) == (2, "")
