"""Collateral: kept on disk, refreshed before it expires, never worse than what is held, and never trusted."""

from __future__ import annotations

import asyncio
import json
import stat
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from tests.attestation import forge
from tests.attestation.evidence import At, World, served

from platform_validator.attestation.collateral import (
    INTEL_ROOT_SHA256,
    Collateral,
    CollateralInvalid,
    CollateralUnavailable,
    fetch_collateral,
    from_pccs,
    read_collateral,
)
from platform_validator.attestation.collateral_cache import CollateralCache, Held, is_due

PLATFORM = forge.FMSPC.hex(), "platform"
WORLD = World()


class Clock(At):
    """Both clocks are the test's."""

    def __init__(self, moment: datetime = forge.NOW) -> None:
        super().__init__(moment)
        self.elapsed = 0.0

    def monotonic(self) -> float:
        return self.elapsed

    def pass_(self, time: timedelta) -> None:
        self.moment += time
        self.elapsed += time.total_seconds()


class Service:
    """A collateral service; issues anew at each asking, as of the clock's time."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.asked = 0
        self.down = False
        self.issued: datetime | None = None
        self.change: Callable[[dict[str, str]], None] = lambda _held: None

    async def fetch(self, path: str) -> tuple[bytes, dict[str, str]]:
        if self.down:
            raise CollateralUnavailable("no answer from the collateral service")
        self.asked += "pckcrl" in path
        held = issued(self.issued or self.clock.moment)
        self.change(held)
        found: tuple[bytes, dict[str, str]] = await served(held)(path)
        return found


def issued(moment: datetime, lasts: timedelta = timedelta(days=30)) -> dict[str, str]:
    """Everything issued an hour before a moment."""
    times = {
        "issueDate": forge.when(moment - timedelta(hours=1)),
        "nextUpdate": forge.when(moment + lasts),
    }
    held = forge.collateral(WORLD.pki, info=forge.tcb_info() | times, identity=forge.qe_identity() | times)
    span = {"begins": moment - timedelta(hours=1), "ends": moment + lasts}
    held["root_ca_crl"] = WORLD.pki.crl(WORLD.pki.root, **span)  # type: ignore[arg-type] # two moments
    held["pck_crl"] = WORLD.pki.crl(WORLD.pki.ca, **span)  # type: ignore[arg-type] # as above
    return held


def cache(clock: Clock, service: Service | None, folder: Path | None = None) -> CollateralCache:
    return CollateralCache(
        fetch=None if service is None else service.fetch,
        clock=clock,
        folder=folder,
        root=WORLD.pki.root.der,
    )


def kept(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def test_collateral_is_asked_for_once_and_then_held() -> None:
    """By many at once too."""
    clock = Clock()
    service = Service(clock)
    held = cache(clock, service)
    async with asyncio.TaskGroup() as group:
        for _ in range(20):
            group.create_task(held.get(*PLATFORM))
    assert service.asked == 1
    clock.pass_(timedelta(days=20))
    await held.get(*PLATFORM)
    assert service.asked == 1


async def test_what_is_due_is_refreshed_in_the_background() -> None:
    """After half a day; a quote never waits for it."""
    clock = Clock()
    service = Service(clock)
    held = cache(clock, service)
    first = await held.get(*PLATFORM)
    await held.refresh_due()
    assert service.asked == 1
    clock.pass_(timedelta(hours=12))
    await held.refresh_due()
    assert service.asked == 2
    assert (await held.get(*PLATFORM)).valid_until > first.valid_until


async def test_a_quote_does_not_wait_for_a_refresh() -> None:
    """While the service takes its time, what is held serves."""
    clock = Clock()
    service = Service(clock)
    held = cache(clock, service)
    first = await held.get(*PLATFORM)
    clock.pass_(timedelta(hours=13))
    slow = asyncio.Event()

    async def fetch(path: str) -> tuple[bytes, dict[str, str]]:
        await slow.wait()
        return await service.fetch(path)

    held._fetch = fetch
    async with asyncio.TaskGroup() as group:
        refreshing = group.create_task(held.refresh_due())
        await asyncio.sleep(0)  # the turn in which the refresh begins
        async with asyncio.timeout(10):
            assert await held.get(*PLATFORM) == first
        assert not refreshing.done()
        slow.set()
    assert service.asked == 2


async def test_a_platform_that_never_had_collateral_is_forgotten_when_nobody_asks() -> None:
    """One machine that Intel does not know must not stop the claims for the others for ever."""
    clock = Clock()
    service = Service(clock)
    service.down = True
    held = cache(clock, service)
    with pytest.raises(CollateralUnavailable):
        await held.get(*PLATFORM)
    clock.pass_(timedelta(minutes=29))
    await held.refresh_due()
    assert held.trouble() is not None
    clock.pass_(timedelta(minutes=2))
    await held.refresh_due()
    assert held.trouble() is None


@pytest.mark.parametrize(
    ("age", "left", "due"),
    [
        (timedelta(hours=1), timedelta(days=20), False),
        (timedelta(hours=12), timedelta(days=20), True),
        (timedelta(hours=1), timedelta(hours=47), True),
        (timedelta(minutes=59), timedelta(hours=47), False),
        (timedelta(minutes=5), timedelta(minutes=20), True),
        (timedelta(minutes=4), timedelta(minutes=20), False),
        (timedelta(seconds=1), timedelta(seconds=1), False),
        (timedelta(hours=-1), timedelta(days=20), True),
    ],
)
def test_when_the_service_is_asked_again(age: timedelta, left: timedelta, due: bool) -> None:
    """Old, expiring within two days, or from a clock that was set back."""
    now = forge.NOW
    collateral = Collateral(*PLATFORM, "", now, now + left)
    assert is_due(Held(collateral, now - age), now) is due
    assert is_due(None, now)


async def test_a_service_that_is_away_is_no_trouble_while_what_is_held_is_valid() -> None:
    """Then it is: and each try waits longer, up to five minutes."""
    clock = Clock()
    service = Service(clock)
    held = cache(clock, service)
    until = (await held.get(*PLATFORM)).valid_until
    service.down = True
    clock.pass_(timedelta(days=29))
    await held.refresh_due()
    assert (await held.get(*PLATFORM)).valid_until == until
    assert held.trouble() is None
    assert "serves until 2026-07-01" in str(held.stale())
    clock.pass_(timedelta(days=2))
    with pytest.raises(CollateralUnavailable):
        await held.get(*PLATFORM)
    assert "no answer" in str(held.trouble())
    assert held.stale() is None
    service.down = False
    with pytest.raises(CollateralUnavailable):
        await held.get(*PLATFORM)
    clock.pass_(timedelta(minutes=5))
    await held.refresh_due()
    assert held.trouble() is None


async def test_a_restart_without_the_service_goes_on_with_what_is_on_disk(tmp_path: Path) -> None:
    """In a private file."""
    clock = Clock()
    await cache(clock, Service(clock), tmp_path / "c").get(*PLATFORM)
    [path] = kept(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    offline = cache(clock, None, tmp_path / "c")
    assert (await offline.get(*PLATFORM)).fmspc == PLATFORM[0]
    # What is on disk is refreshed too, before anybody asks for it.
    clock.pass_(timedelta(hours=13))
    service = Service(clock)
    await cache(clock, service, tmp_path / "c").refresh_due()
    assert service.asked == 1


async def test_offline_nothing_is_asked_for(tmp_path: Path) -> None:
    """And without anything kept, nothing can be judged."""
    held = cache(Clock(), None, tmp_path)
    with pytest.raises(CollateralUnavailable, match="offline"):
        await held.get(*PLATFORM)
    await held.refresh_due()
    assert "offline" in str(held.trouble())


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:500])


def _empty(path: Path) -> None:
    path.write_bytes(b"")


def _forged(path: Path) -> None:
    text = path.read_text()
    path.write_text(text.replace("UpToDate", "UpToDatf"))


def _list(path: Path) -> None:
    path.write_text("[]")


def _huge(path: Path) -> None:
    path.write_bytes(b" " * 2_000_000)


@pytest.mark.parametrize("damage", [_cut, _empty, _forged, _list, _huge])
async def test_what_was_damaged_on_disk_is_not_used(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    """It is asked for anew, and replaced."""
    clock = Clock()
    await cache(clock, Service(clock), tmp_path).get(*PLATFORM)
    [path] = kept(tmp_path)
    damage(path)
    service = Service(clock)
    await cache(clock, service, tmp_path).get(*PLATFORM)
    assert service.asked == 1
    assert (await cache(clock, None, tmp_path).get(*PLATFORM)).fmspc == PLATFORM[0]


async def test_an_older_answer_does_not_replace_a_newer_one() -> None:
    """Replayed, or cached on its way: a revocation that is known stays known."""
    clock = Clock()
    service = Service(clock)
    held = cache(clock, service)
    first = await held.get(*PLATFORM)
    clock.pass_(timedelta(hours=13))
    service.issued = forge.NOW - timedelta(days=3)
    await held.refresh_due()
    assert service.asked == 2
    assert await held.get(*PLATFORM) == first


async def test_collateral_that_does_not_verify_is_not_kept(tmp_path: Path) -> None:
    """What was held stays."""
    clock = Clock()
    service = Service(clock)
    held = cache(clock, service, tmp_path)
    first = await held.get(*PLATFORM)
    before = kept(tmp_path)[0].read_text()

    def change(answer: dict[str, str]) -> None:
        answer["tcb_info"] = answer["tcb_info"].replace("UpToDate", "Revoked!")

    service.change = change
    clock.pass_(timedelta(hours=13))
    await held.refresh_due()
    assert await held.get(*PLATFORM) == first
    assert kept(tmp_path)[0].read_text() == before
    assert "tcb_info" in str(held.stale())


async def test_a_disk_that_cannot_be_written_keeps_nobody_from_being_judged() -> None:
    """It is held in memory. In /proc not even root can make a folder."""
    clock = Clock()
    held = cache(clock, Service(clock), Path("/proc/collateral"))
    assert (await held.get(*PLATFORM)).fmspc == PLATFORM[0]


@pytest.mark.parametrize("platform", [("../../etc", "platform"), (PLATFORM[0], "../x"), ("", "platform")])
async def test_a_platform_is_no_path(tmp_path: Path, platform: tuple[str, str]) -> None:
    """Both come out of certificates."""
    clock = Clock()
    with pytest.raises(CollateralInvalid):
        await cache(clock, Service(clock), tmp_path).get(*platform)
    assert kept(tmp_path) == []


def test_the_root_is_the_one_that_dcap_qvl_has_built_in() -> None:
    """Two real collaterals are under its fingerprint, whose quotes dcap-qvl verifies under its own root."""
    data = Path(__file__).resolve().parents[2] / "packages/platform-validator/tests/data/tdx"
    for name, fmspc, moment in (
        ("dstack_collateral.json", "90C06F000000", "2026-03-01T00:00:00+00:00"),
        ("tdx_quote_collateral.json", "B0C06F000000", "2025-06-19T12:00:00+00:00"),
    ):
        read = read_collateral(
            (data / name).read_text(),
            fmspc=fmspc,
            authority="platform",
            now=datetime.fromisoformat(moment),
            root_sha256=INTEL_ROOT_SHA256,
        )
        assert read.valid_until > datetime.fromisoformat(moment)


Answer = tuple[bytes, dict[str, str]]


@pytest.mark.parametrize(
    ("path", "answer"),
    [
        ("/tcb?", (b"<html>", {})),
        ("/tcb?", (b'{"tcbInfo":{}}', {"TCB-Info-Issuer-Chain": "x"})),
        ("/tcb?", (b'{"tcbInfo":' + b"[" * 9000, {})),
        ("/tcb?", (b"\xff", {})),
        ("pckcrl", (b"", {})),
        ("rootcacrl", (b"\xff\xfe", {})),
        ("/identity", (b"[]", {})),
    ],
)
async def test_what_is_no_collateral_is_unavailable(path: str, answer: Answer) -> None:
    """Never another error, whatever the service says."""
    good = served(issued(forge.NOW))

    async def fetch(asked: str) -> Answer:
        found: Answer = answer if path in asked else await good(asked)
        return found

    held = CollateralCache(fetch=fetch, clock=Clock(), root=WORLD.pki.root.der)
    with pytest.raises(CollateralUnavailable):
        await held.get(*PLATFORM)


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", json.dumps(dict.fromkeys(issued(forge.NOW), "")), json.dumps(dict.fromkeys("ab", 1))],
)
def test_text_that_is_no_collateral_is_invalid(text: str) -> None:
    with pytest.raises(CollateralInvalid) as caught:
        read_collateral(text, fmspc=PLATFORM[0], authority=PLATFORM[1], now=forge.NOW)
    assert caught.value.part in {"form", "signer"}


async def test_a_service_that_nobody_serves_is_unavailable() -> None:
    """With its address in the reason."""
    with pytest.raises(CollateralUnavailable, match=r"http://127\.0\.0\.1:1"):
        await fetch_collateral(from_pccs("http://127.0.0.1:1"), *PLATFORM)
