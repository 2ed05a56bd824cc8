"""What must be accepted: without these, a policy that refuses everything would pass for a good one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

from tests.attestation import forge
from tests.attestation.evidence import DATA, Evidence, World, real_dstack, runtime

from platform_protocol.event_log import parse_event_log, replay, runtime_digest
from platform_validator.attestation.lite import lite_measurements
from platform_validator.attestation.mr_config import config_document, mr_config_id
from platform_validator.attestation.quote import parse_quote, verify_quote
from platform_validator.attestation.tcb import TcbRules


def honest(world: World) -> Iterator[tuple[str, Evidence]]:
    """Evidence with its name, each to be accepted."""
    yield "a real dstack CVM's, under Intel's root", real_dstack()
    yield "version 4, TD 1.0", world.evidence()
    yield "version 5, TD 1.5", world.evidence(td={"service_td": bytes(48)})
    yield "an event log with its digests", world.evidence(shown=[_full(one) for one in world.events()])
    yield "an event log of version 2", _second_version(world)
    yield (
        "events of the app's own after system-ready",
        world.evidence(events=[*world.events(), runtime("own", "ab")]),
    )
    for form in (1, 2):
        yield f"MRCONFIGID form {form}", world.evidence(td={"mr_config_id": mr_config_id(form, world.app)})
    yield (
        "MRCONFIGID form 3, with the instance",
        world.evidence(td={"mr_config_id": mr_config_id(3, world.app)}),
    )
    yield "MRCONFIGID form 3, with its document in vm_config", _documented(world)
    yield "a zero-filled quote buffer", _padded(world)
    yield from _tolerated(world)


def _tolerated(world: World) -> Iterator[tuple[str, Evidence]]:
    """What the operator allows."""
    info = forge.tcb_info()
    info["tcbLevels"] = [forge.tcb_level("SWHardeningNeeded", advisories=("INTEL-SA-00001",))]
    rules = TcbRules(statuses=("UpToDate", "SWHardeningNeeded"), advisories=("INTEL-SA-00001",))
    yield "a status and an advisory that are accepted", world.evidence(info=info, tcb=rules)
    info = forge.tcb_info()
    newer = forge.tcb_level("UpToDate", date="2026-05-20T00:00:00Z", svn=2)
    info["tcbLevels"] = [newer, forge.tcb_level("OutOfDate")]
    yield "out of date, within the grace", world.evidence(info=info, tcb=TcbRules(grace=timedelta(days=30)))


def _full(event: dict[str, Any]) -> dict[str, Any]:
    if event["imr"] != 3:
        return event
    return event | {"digest": runtime_digest(event["event"], bytes.fromhex(event["event_payload"])).hex()}


def _second_version(world: World) -> Evidence:
    log = world.events()
    for event in log:
        if event["imr"] == 3:
            said = {"name": event["event"], "payload": event["event_payload"], "type": event["event_type"]}
            preimage = json.dumps(said, separators=(",", ":")).encode()
            event |= {
                "version": 2,
                "preimage": preimage.hex(),
                "digest": hashlib.sha384(preimage).hexdigest(),
            }
    return world.evidence(events=log)


def _documented(world: World) -> Evidence:
    document = " " + config_document(world.app, with_instance=False)
    bound = hashlib.sha256(b"dstack-mr-config-v3:\x00" + document.encode()).digest()
    return world.evidence(
        td={"mr_config_id": (b"\x03" + bound).ljust(48, b"\x00")},
        vm_config=json.dumps({"mr_config": document}),
    )


def _padded(world: World) -> Evidence:
    good = world.evidence()
    return replace(good, quote=(good.quote or b"").ljust(5006, b"\x00"))


# Real vectors beyond the whole chain of checks; each returns how many held.


def real_chains() -> int:
    """Real quotes whose signature chain verifies under Intel's root, at the time of their collateral."""
    found = verify_quote(
        (DATA / "tdx_quote.bin").read_bytes(),
        (DATA / "tdx_quote_collateral.json").read_text(),
        datetime.fromtimestamp(1750331763, UTC),
        None,
    )
    dstack = real_dstack()
    other = verify_quote(dstack.quote or b"", json.dumps(dstack.collateral), dstack.now, None)
    return [found.status, other.status].count("UpToDate")


def real_replays() -> int:
    """RTMRs of real quotes that replay from their event logs."""
    held = 0
    for name in ("dstack_quote_report.json", "dstack_lite_quote.json"):
        report = json.loads((DATA / name).read_text())
        events = parse_event_log(report["event_log"])
        registers = parse_quote(bytes.fromhex(report["quote"])).rtmrs
        held += sum(replay(events, imr) == registers[imr] for imr in range(4))
    return held


def real_measurements() -> int:
    """Registers of a real quote that follow from its image's own measurement document: MRTD, RTMR0 to 2."""
    report = json.loads((DATA / "dstack_lite_quote.json").read_text())
    body = parse_quote(bytes.fromhex(report["quote"]))
    events = parse_event_log(report["event_log"])
    computed = lite_measurements(report["vm_config"], events, memory_mb=2048)
    registers = (computed.rtmr0, computed.rtmr1, computed.rtmr2)
    return (body.mrtd in computed.mrtds) + sum(
        one == two for one, two in zip(registers, body.rtmrs, strict=False)
    )
