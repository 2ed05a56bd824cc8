"""Tampering with what a guest binds and measures: the transcript, event log, compose, OS image."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from tests.attestation import evidence as ev
from tests.attestation.case import Case, Make, td
from tests.attestation.evidence import Evidence, World, runtime

from platform_protocol.compose import compose_hash
from platform_protocol.ids import Hotkey, VmName
from platform_protocol.session.v2 import report_data
from platform_validator.attestation.mr_config import BoundApp, mr_config_id
from platform_validator.attestation.os_image import KnownImages, Shape


def guests() -> Iterator[Case]:
    """All of them."""
    yield from _transcript()
    yield from _event_log()
    yield from _compose()
    yield from _image()


# What the handshake binds


def _transcript() -> Iterator[Case]:
    bound = {
        "replayed: another nonce": (b"m" * 32, ev.VALIDATOR_KEY, ev.GUEST_KEY, ev.VALIDATOR, ev.VM),
        "the validator's key swapped": (ev.NONCE, b"x" * 32, ev.GUEST_KEY, ev.VALIDATOR, ev.VM),
        "the guest's key swapped": (ev.NONCE, ev.VALIDATOR_KEY, b"x" * 32, ev.VALIDATOR, ev.VM),
        "both keys swapped with each other": (ev.NONCE, ev.GUEST_KEY, ev.VALIDATOR_KEY, ev.VALIDATOR, ev.VM),
        "another validator's": (ev.NONCE, ev.VALIDATOR_KEY, ev.GUEST_KEY, Hotkey("5DDother"), ev.VM),
        "another VM's": (ev.NONCE, ev.VALIDATOR_KEY, ev.GUEST_KEY, ev.VALIDATOR, VmName("pv-0123456789-2")),
    }
    for name, parts in bound.items():
        yield td("transcript", name, "report_data", report_data=report_data(*parts))
    yield td("transcript", "nothing bound", "report_data", report_data=bytes(64))


# The event log


def _event_log() -> Iterator[Case]:
    def shown(change: Callable[[list[dict[str, Any]]], None]) -> Make:
        """The log is changed after the boot."""

        def make(world: World) -> Evidence:
            log = world.events()
            change(log)
            return world.evidence(shown=log)

        return make

    def measured(change: Callable[[list[dict[str, Any]]], None]) -> Make:
        """The boot itself was another: log and registers agree."""

        def make(world: World) -> Evidence:
            log = world.events()
            change(log)
            return world.evidence(events=log)

        return make

    for imr in range(3):
        yield Case("event log", f"a digest of RTMR{imr} changed", f"refused rtmr{imr}", shown(_digest(imr)))
    kinds: list[tuple[str, Callable[[list[dict[str, Any]]], None], str]] = [
        ("an event of RTMR3 left out", lambda log: _drop(log, "storage-fs"), "rtmr3"),
        ("events of RTMR3 swapped", _swap, "rtmr3"),
        ("an event of RTMR3 added", lambda log: log.append(runtime("anything", "00")), "rtmr3"),
        ("the compose hash changed", lambda log: _say(log, "compose-hash", "ab" * 32), "rtmr3"),
        ("the app id changed", lambda log: _say(log, "app-id", "ab" * 20), "rtmr3"),
        ("the instance changed", lambda log: _say(log, "instance-id", "ab" * 20), "rtmr3"),
        ("the key provider changed", lambda log: _say(log, "key-provider", "7b7d"), "rtmr3"),
        ("a stated digest contradicts its payload", _contradict, "event_log"),
        ("a preimage contradicts its payload", _preimage, "event_log"),
        ("an event of version 3", _version, "event_log"),
        ("a digest of another length", lambda log: log[0].update(digest="00"), "event_log"),
        ("no list", lambda log: log.clear(), "rtmr0"),
    ]
    for name, change, check in kinds:
        yield Case("event log", name, f"refused {check}", shown(change))
    yield Case("event log", "no JSON", "refused event_log", _no_json)
    for name in ("system-preparing", "app-id", "compose-hash", "instance-id", "boot-mr-done", "system-ready"):
        yield Case("event log", f"booted without {name}", "refused event_order", measured(_dropping(name)))
        yield Case("event log", f"booted with {name} twice", "refused event_order", measured(_doubling(name)))
    boots: list[tuple[str, Callable[[list[dict[str, Any]]], None], str]] = [
        ("compose-hash after boot-mr-done", _late, "event_order"),
        ("compose-hash after system-ready", _after_ready, "event_order"),
        ("key-provider twice", _doubling("key-provider"), "event_order"),
        ("an event of no runtime in RTMR3", _other_type, "event_order"),
        ("a colon in an event's name", _colon, "event_order"),
        ("another compose", lambda log: _say(log, "compose-hash", "ab" * 32), "compose_hash"),
        ("another app id", lambda log: _say(log, "app-id", "ab" * 20), "app_id"),
        ("no instance id", lambda log: _say(log, "instance-id", ""), "instance_id"),
        ("another key provider", lambda log: _say(log, "key-provider", _provider("kms")), "key_provider"),
        ("no key provider", _dropping("key-provider"), "key_provider"),
        ("an unreadable key provider", lambda log: _say(log, "key-provider", "00"), "key_provider"),
    ]
    for name, change, check in boots:
        yield Case("event log", f"booted with {name}", f"refused {check}", measured(change))


def _at(log: list[dict[str, Any]], name: str) -> int:
    return next(place for place, event in enumerate(log) if event["event"] == name)


def _digest(imr: int) -> Callable[[list[dict[str, Any]]], None]:
    return lambda log: log[imr].update(digest="00" * 48)


def _drop(log: list[dict[str, Any]], name: str) -> None:
    del log[_at(log, name)]


def _dropping(name: str) -> Callable[[list[dict[str, Any]]], None]:
    return lambda log: _drop(log, name)


def _doubling(name: str) -> Callable[[list[dict[str, Any]]], None]:
    return lambda log: log.insert(_at(log, name), log[_at(log, name)])


def _say(log: list[dict[str, Any]], name: str, payload: str) -> None:
    log[_at(log, name)]["event_payload"] = payload


def _swap(log: list[dict[str, Any]]) -> None:
    one, two = _at(log, "app-id"), _at(log, "compose-hash")
    log[one], log[two] = log[two], log[one]


def _contradict(log: list[dict[str, Any]]) -> None:
    log[_at(log, "compose-hash")]["digest"] = "00" * 48


def _preimage(log: list[dict[str, Any]]) -> None:
    log[_at(log, "compose-hash")].update(version=2, preimage=b"{}".hex())


def _version(log: list[dict[str, Any]]) -> None:
    log[_at(log, "compose-hash")]["version"] = 3


def _late(log: list[dict[str, Any]]) -> None:
    event = log.pop(_at(log, "compose-hash"))
    log.insert(_at(log, "system-ready"), event)


def _after_ready(log: list[dict[str, Any]]) -> None:
    log.append(log[_at(log, "compose-hash")])


def _other_type(log: list[dict[str, Any]]) -> None:
    odd = {"imr": 3, "event_type": 1, "digest": "11" * 48, "event": "odd", "event_payload": ""}
    log.insert(_at(log, "boot-mr-done"), odd)


def _colon(log: list[dict[str, Any]]) -> None:
    log.insert(_at(log, "compose-hash"), runtime("init:script", "00"))


def _provider(name: str) -> str:
    return json.dumps({"name": name, "id": "00"}).encode().hex()


def _no_json(world: World) -> Evidence:
    return replace(world.evidence(), event_log="[")


# The app-compose, and what MRCONFIGID says of it


def _compose() -> Iterator[Case]:
    def expecting(compose: bytes) -> Make:
        def make(world: World) -> Evidence:
            good = world.evidence()
            changed = compose_hash(compose)
            return replace(good, expected=replace(good.expected, compose_hash=changed))

        return make

    refused = "refused compose_hash"
    yield Case("compose", "a byte changed", refused, expecting(ev.COMPOSE.replace(b"digits", b"digitt")))
    yield Case("compose", "a space added", refused, expecting(ev.COMPOSE + b" "))
    yield Case(
        "compose", "keys in another order", refused, expecting(json.dumps(json.loads(ev.COMPOSE)).encode())
    )

    def bound(value: Callable[[BoundApp], bytes], vm_config: str = "{}") -> Make:
        return lambda world: world.evidence(td={"mr_config_id": value(world.app)}, vm_config=vm_config)

    other, refused = "ab" * 32, "refused mr_config_id"
    for form in (1, 2, 3):
        yield Case(
            "compose",
            f"MRCONFIGID form {form} of another app",
            refused,
            bound(partial(_of_another_app, form, other)),
        )
    yield Case(
        "compose",
        "MRCONFIGID form 2 of another key provider",
        refused,
        bound(lambda app: mr_config_id(2, replace(app, provider="kms", provider_id="00"))),
    )
    document = json.dumps({"version": 3, "compose_hash": other, "key_provider": "none"})
    yield Case(
        "compose",
        "MRCONFIGID form 3 under another document",
        refused,
        bound(lambda app: mr_config_id(3, app)[:20] + bytes(28), json.dumps({"mr_config": document})),
    )
    yield Case("compose", "MRCONFIGID of no known form", refused, bound(lambda _: b"\x09" + bytes(47)))
    yield Case(
        "compose",
        "MRCONFIGID with more behind",
        refused,
        bound(lambda app: mr_config_id(1, app)[:47] + b"\x01"),
    )


# The OS image


def _image() -> Iterator[Case]:
    refused = "refused os_image"
    yield td("OS image", "another MRTD", "os_image", mrtd=b"m" * 48)
    for imr in range(3):
        yield Case("OS image", f"another boot in RTMR{imr}", refused, _other_boot(imr))
    yield Case("OS image", "an image that is not known", refused, _unknown_image)
    yield Case("OS image", "another shape than asked for", refused, _other_shape)
    yield Case("OS image", "a file of images that cannot be read", refused, _faulty)


def _other_boot(imr: int) -> Make:
    def make(world: World) -> Evidence:
        log = world.events()
        log[imr]["digest"] = "11" * 48
        return world.evidence(events=log)

    return make


def _unknown_image(world: World) -> Evidence:
    return replace(world.evidence(), images=KnownImages())


def _other_shape(world: World) -> Evidence:
    good = world.evidence()
    return replace(good, expected=replace(good.expected, shape=Shape(4, 2048)))


def _faulty(world: World) -> Evidence:
    good = world.evidence()
    return replace(good, images=replace(good.images, fault="not TOML"))


def _of_another_app(form: int, compose_hash: str, app: BoundApp) -> bytes:
    return mr_config_id(form, replace(app, compose_hash=compose_hash))
