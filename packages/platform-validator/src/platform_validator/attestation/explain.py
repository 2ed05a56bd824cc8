"""Explains a quote that somebody holds in a file: what it says, and which of it is proved."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from platform_protocol.event_log import EventLogInvalid, parse_event_log, replay
from platform_validator.attestation.checks import Check
from platform_validator.attestation.collateral import CollateralInvalid, read_collateral
from platform_validator.attestation.event_log import EventLogRefused, Identity, check_event_log
from platform_validator.attestation.lite import LiteInvalid, carries_document, lite_measurements
from platform_validator.attestation.mr_config import BoundApp, check_mr_config_id
from platform_validator.attestation.quote import QuoteBody, QuoteInvalid, parse_quote, verify_quote
from platform_validator.errors import ValidatorError

_RAW = (b"\x04\x00", b"\x05\x00")
"""How quotes of versions 4 and 5 begin."""
MAX_FILE = 8 * 1024 * 1024
_MAX_CONFIG = 256 * 1024


class NothingToExplain(ValidatorError):
    """The file holds no quote in any form that is known."""


@dataclass(frozen=True, slots=True)
class QuoteFile:
    """A quote and what came with it; `form` is `raw`, `hex`, `base64` or `dstack`."""

    form: str
    quote: bytes
    event_log: str | None = None
    report_data: str | None = None
    vm_config: str = ""


def read_quote_file(data: bytes) -> QuoteFile:
    """Find the quote: raw bytes, hex, base64, or what dstack's GetQuote answers.

    Raises:
        NothingToExplain: None of these.
    """
    if len(data) > MAX_FILE:
        raise NothingToExplain(f"expected at most {MAX_FILE} bytes, got {len(data)}")
    text = data.decode("ascii", "replace").strip() if data[:2] not in _RAW else ""
    if text.startswith("{"):
        return _from_dstack(data)
    for form, decoded in (("hex", _hex(text)), ("base64", _base64(text))):
        if decoded:
            return QuoteFile(form, decoded)
    return QuoteFile("raw", data)


def explain(
    file: QuoteFile, *, now: datetime, collateral: str | None = None, compose: bytes | None = None
) -> dict[str, Any]:
    """What the quote says, as JSON; `proved` says which of it holds, and what could not be judged.

    Args:
        file: The quote.
        now: When it is judged.
        collateral: dcap-qvl's JSON; None: the signature is not judged.
        compose: The app-compose that it should be of, exactly.

    Raises:
        NothingToExplain: It is no TDX quote.
    """
    try:
        body = parse_quote(file.quote)
    except QuoteInvalid as error:
        raise NothingToExplain(f"{error.check}: {error}") from error
    found: dict[str, Any] = {"form": file.form, "bytes": len(file.quote), "quote": _body(body)}
    proved: dict[str, Any] = {"signature": _signature(file, body, now, collateral)}
    proved["report_data"] = _same(file.report_data, body.report_data)
    identity = None
    if file.event_log is not None:
        found["event_log"], identity = _log(file.event_log, body)
        proved["event_log"] = found["event_log"].pop("judged")
    if identity is not None:
        app = BoundApp(
            identity.compose_hash,
            identity.app_id,
            identity.instance_id,
            identity.key_provider,
            identity.key_provider_id,
        )
        proved["mr_config_id"] = _judged(
            check_mr_config_id(body.mr_config_id, app, file.vm_config),
            Check.MR_CONFIG_ID,
            good="zero: it binds nothing" if not any(body.mr_config_id) else "binds this app",
        )
        if compose is not None:
            ours = hashlib.sha256(compose).hexdigest()
            wrong = None if ours == identity.compose_hash else f"the file's is {ours}"
            proved["compose_hash"] = _judged(wrong, Check.COMPOSE_HASH, good="the file's")
    config = _config(file.vm_config)
    if config:
        found["vm_config"] = {
            key: value for key, value in config.items() if isinstance(value, str | int | bool | None)
        }
    if identity is not None and carries_document(file.vm_config):
        proved["os_image"] = _image(file.vm_config, identity, body, config)
    return found | {"proved": proved, "judged_at": now.isoformat().replace("+00:00", "Z")}


def _body(body: QuoteBody) -> dict[str, Any]:
    return {
        "version": body.version,
        "td_version": body.td_version,
        "fmspc": body.fmspc,
        "ca": body.authority,
        "tee_tcb_svn": body.tee_tcb_svn.hex(),
        "mr_seam": body.mr_seam.hex(),
        "mr_signer_seam": body.mr_signer_seam.hex(),
        "td_attributes": body.td_attributes.hex(),
        "debug": body.debug,
        "xfam": body.xfam.hex(),
        "mrtd": body.mrtd.hex(),
        **{f"rtmr{number}": value.hex() for number, value in enumerate(body.rtmrs)},
        "mr_config_id": body.mr_config_id.hex(),
        "mr_owner": body.mr_owner.hex(),
        "mr_owner_config": body.mr_owner_config.hex(),
        "mr_service_td": body.mr_service_td.hex(),
        "report_data": body.report_data.hex(),
    }


def _signature(file: QuoteFile, body: QuoteBody, now: datetime, collateral: str | None) -> dict[str, Any]:
    if collateral is None:
        return {"holds": None, "detail": "not judged: no collateral was given"}
    try:
        read = read_collateral(collateral, fmspc=body.fmspc, authority=body.authority, now=now)
        verified = verify_quote(file.quote, collateral, now, None)
    except CollateralInvalid as error:
        return {"holds": None, "detail": f"not judged: {error}"}
    except QuoteInvalid as error:
        return {"holds": False, "check": error.check.value, "detail": str(error)}
    return {
        "holds": True,
        "detail": f"under Intel's root; the platform's TCB is {verified.status}",
        "tcb_status": verified.status,
        "advisories": list(verified.advisories),
        "collateral_until": read.valid_until.isoformat().replace("+00:00", "Z"),
    }


def _log(text: str, body: QuoteBody) -> tuple[dict[str, Any], Identity | None]:
    try:
        events = parse_event_log(text)
        registers = {f"rtmr{n}": replay(events, n) == body.rtmrs[n] for n in range(4)}
    except EventLogInvalid as error:
        return {"judged": {"holds": False, "check": Check.EVENT_LOG.value, "detail": str(error)}}, None
    shown: dict[str, Any] = {
        "events": len(events),
        "replays": registers,
        "runtime": [
            {"event": event.event[:128], "payload": event.event_payload[:512]}
            for event in events
            if event.is_runtime
        ],
    }
    try:
        identity = check_event_log(text, body.rtmrs)
    except EventLogRefused as error:
        judged = {"holds": False, "check": error.check.value, "detail": str(error)}
        return shown | {"judged": judged}, None
    shown["identity"] = {
        "compose_hash": identity.compose_hash,
        "app_id": identity.app_id,
        "instance_id": identity.instance_id,
        "key_provider": identity.key_provider,
    }
    return shown | {"judged": {"holds": True, "detail": "all four registers replay"}}, identity


def _image(vm_config: str, identity: Identity, body: QuoteBody, config: dict[str, Any]) -> dict[str, Any]:
    memory = config.get("memory_size")
    if not isinstance(memory, int):
        return {"holds": None, "detail": "not judged: vm_config has no memory_size"}
    try:
        computed = lite_measurements(vm_config, identity.events, memory_mb=memory // 1024**2)
    except LiteInvalid as error:
        return {"holds": None, "detail": f"not judged: {error}"}
    holds = body.mrtd in computed.mrtds and body.rtmrs[:3] == (
        computed.rtmr0,
        computed.rtmr1,
        computed.rtmr2,
    )
    detail = f"boots as os_image_hash {computed.os_image_hash} does; ACPI contents are not verified"
    return {
        "holds": holds,
        "os_image_hash": computed.os_image_hash,
        "detail": detail if holds else "does not " + detail,
    }


def _same(given: str | None, bound: bytes) -> dict[str, Any]:
    if given is None:
        return {"holds": None, "detail": "not judged: what it should bind is not known here"}
    try:
        expected = bytes.fromhex(given.removeprefix("0x")).ljust(64, b"\x00")
    except ValueError:
        return {"holds": None, "detail": "not judged: report_data in the file is no hex"}
    wrong = None if expected == bound else f"the file says {given[:128]}"
    return _judged(wrong, Check.REPORT_DATA, good="what the file says")


def _judged(wrong: str | None, check: Check, *, good: str) -> dict[str, Any]:
    if wrong is None:
        return {"holds": True, "detail": good}
    return {"holds": False, "check": check.value, "detail": wrong}


def _from_dstack(data: bytes) -> QuoteFile:
    try:
        value = json.loads(data)
        quote = bytes.fromhex(str(value["quote"]).removeprefix("0x"))
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise NothingToExplain("expected JSON with quote (hex), as dstack's GetQuote answers") from error
    log = value.get("event_log")
    config = value.get("vm_config")
    return QuoteFile(
        "dstack",
        quote,
        event_log=log if isinstance(log, str) else None if log is None else json.dumps(log),
        report_data=value["report_data"] if isinstance(value.get("report_data"), str) else None,
        vm_config=config if isinstance(config, str) else "",
    )


def _hex(text: str) -> bytes:
    try:
        return bytes.fromhex(text.removeprefix("0x"))
    except ValueError:
        return b""


def _base64(text: str) -> bytes:
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (ValueError, binascii.Error):
        return b""


def _config(vm_config: str) -> dict[str, Any]:
    try:
        value = json.loads(vm_config) if len(vm_config) <= _MAX_CONFIG else None
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
