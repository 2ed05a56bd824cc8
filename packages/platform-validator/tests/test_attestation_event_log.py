"""The event log of a real CVM: the four registers replay, and no other identity can be read from it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from tdx_vector import (
    COMPOSE_HASH,
    EVENT_LOG,
    INSTANCE,
    faults_of,
    verified,
)

from platform_protocol.event_log import parse_event_log, replay, runtime_digest
from platform_validator.attestation.event_log import EventLogRefused, check_event_log


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
