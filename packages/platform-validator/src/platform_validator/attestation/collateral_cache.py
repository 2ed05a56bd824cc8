"""Collateral kept on disk and in memory, refreshed in the background long before it expires.

A quote is judged with what is held while that is valid: the collateral service may be away for days. What is
on disk is trusted no more than what comes over the network; its signatures are verified at every start.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
import re
import tempfile
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import structlog

from platform_validator.attestation.collateral import (
    INTEL_ROOT_SHA256,
    Collateral,
    CollateralInvalid,
    CollateralUnavailable,
    Fetch,
    fetch_collateral,
    read_collateral,
)
from platform_validator.clock import Clock

REFRESH = timedelta(hours=12)
AHEAD = timedelta(hours=48)
FORGOTTEN_AFTER = timedelta(minutes=30)
_HOUR = timedelta(hours=1)
_WITHIN = 40.0
_PAUSE, _PAUSE_MOST = timedelta(seconds=5), timedelta(minutes=5)
_AUTHORITIES = ("platform", "processor")
_NAME = re.compile(r"([0-9a-f]{12})-(platform|processor)\.json")
_MAX_FILE = 1024 * 1024

Key = tuple[str, str]
"""FMSPC (lower-case hex) and the CA of the PCK certificates."""

_log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Held:
    """Collateral, and when it was last asked for with success."""

    collateral: Collateral
    asked_at: datetime


def is_due(held: Held | None, now: datetime, *, refresh: timedelta = REFRESH) -> bool:
    """Whether the service is to be asked: nothing is held, it is old, or it expires soon.

    A service that itself gives what expires soon is asked again after an hour, or a quarter of what is left.
    """
    if held is None or now < held.asked_at:
        return True
    age, left = now - held.asked_at, held.collateral.valid_until - now
    soon = min(_HOUR, max(left / 4, _PAUSE))
    return age >= refresh or (left <= AHEAD and age >= soon)


class CollateralCache:
    """Collateral by platform and CA.

    Args:
        fetch: A PCCS; None: offline, nothing is ever asked for.
        clock: Its wall clock judges validity, its monotonic one paces tries.
        folder: Where it is kept, made 0700; None: in memory alone.
        root: The root certificate (DER); None: Intel's.
        refresh: How often the service is asked anew.
    """

    def __init__(
        self,
        *,
        fetch: Fetch | None,
        clock: Clock,
        folder: Path | None = None,
        root: bytes | None = None,
        refresh: timedelta = REFRESH,
    ) -> None:
        self._fetch = fetch
        self._clock = clock
        self._folder = folder
        self._root_sha256 = INTEL_ROOT_SHA256 if root is None else hashlib.sha256(root).hexdigest()
        self._refresh_every = refresh
        self._held: dict[Key, Held] = {}
        self._failed: dict[Key, tuple[float, int, CollateralUnavailable]] = {}
        self._locks: dict[Key, asyncio.Lock] = {}
        self._wanted: dict[Key, float] = {}
        self._looked_for: set[Key] = set()
        self._loaded = False

    async def get(self, fmspc: str, authority: str) -> Collateral:
        """Valid collateral of a platform; asked for only when none is held.

        Raises:
            CollateralUnavailable: There is none, and the service gives none. Asked again soon, it answers
                at once with the last failure.
        """
        key = self._key(fmspc, authority)
        self._wanted[key] = self._clock.monotonic()
        held = self._valid(key)
        if held is not None:
            # Before the lock, which a refresh may hold for long.
            return held.collateral
        async with self._locks.setdefault(key, asyncio.Lock()):
            held = self._valid(key)
            if held is not None:
                return held.collateral
            failure = self._failed.get(key)
            if failure is not None and self._clock.monotonic() < failure[0]:
                raise failure[2]
            return await self._ask(key)

    async def refresh_due(self) -> None:
        """Ask once for everything that is due and not being waited with after a failure.

        Never raises for what the service does: that is told by `trouble` and `stale`.
        """
        if not self._loaded:
            self._load_all()
        self._forget()
        if self._fetch is None:
            return
        for key in [*self._held.keys() | self._failed.keys()]:
            failure = self._failed.get(key)
            waits = failure is not None and self._clock.monotonic() < failure[0]
            if waits or not is_due(self._held.get(key), self._clock.now(), refresh=self._refresh_every):
                continue
            async with self._locks.setdefault(key, asyncio.Lock()):
                with contextlib.suppress(CollateralUnavailable):
                    await self._ask(key)

    def trouble(self) -> str | None:
        """Why a quote of a platform that was seen could not be judged now, or None."""
        for key, (_, _, error) in self._failed.items():
            if self._valid(key) is None:
                return f"no valid collateral of platform {key[0]}: {error}"
        return None

    def stale(self) -> str | None:
        """What cannot be refreshed though it still serves, or None."""
        for key, (_, _, error) in self._failed.items():
            held = self._valid(key)
            if held is not None:
                until = held.collateral.valid_until
                return f"collateral of platform {key[0]} serves until {until:%Y-%m-%dT%H:%M:%SZ}: {error}"
        return None

    def _forget(self) -> None:
        """A platform that never had collateral, and that nobody asks for any more, stops no claims."""
        limit = self._clock.monotonic() - FORGOTTEN_AFTER.total_seconds()
        for key in [*self._failed]:
            if key not in self._held and self._wanted.get(key, limit) <= limit:
                del self._failed[key]

    def views(self) -> list[dict[str, str]]:
        """What is held, for `validator status`: platform, CA, when it was asked for, until when it serves."""
        return [
            {
                "fmspc": fmspc,
                "ca": authority,
                "asked_at": _shown(held.asked_at),
                "until": _shown(held.collateral.valid_until),
            }
            for (fmspc, authority), held in sorted(self._held.items())
        ]

    def _key(self, fmspc: str, authority: str) -> Key:
        key = fmspc.lower(), authority.lower()
        if re.fullmatch(r"[0-9a-f]{12}", key[0]) is None or key[1] not in _AUTHORITIES:
            raise CollateralInvalid("platform", f"no such platform: {fmspc[:32]!r}, {authority[:32]!r}")
        return key

    def _valid(self, key: Key) -> Held | None:
        held = self._held.get(key)
        if held is None and key not in self._looked_for:
            held = self._load(key)
        if held is None or held.collateral.valid_until <= self._clock.now():
            return None
        return held

    async def _ask(self, key: Key) -> Collateral:
        now = self._clock.now()
        try:
            if self._fetch is None:
                raise CollateralUnavailable(f"offline, and no valid collateral of platform {key[0]} is kept")
            text = await self._fetched(self._fetch, key)
            fetched = self._read(key, text, now)
        except CollateralUnavailable as error:
            self._failed[key] = self._next_try(key), self._failures(key) + 1, error
            _log.warning("collateral_not_fetched", fmspc=key[0], ca=key[1], reason=str(error))
            raise
        self._failed.pop(key, None)
        before = self._valid(key)
        if before is not None and fetched.issued < before.collateral.issued:
            # An old answer, replayed or cached on the way: what is newer stays.
            _log.warning("older_collateral_ignored", fmspc=key[0], issued=fetched.issued.isoformat())
            fetched = before.collateral
        self._held[key] = Held(fetched, now)
        self._keep(key)
        _log.info("collateral_fetched", fmspc=key[0], ca=key[1], until=fetched.valid_until.isoformat())
        return fetched

    @staticmethod
    async def _fetched(fetch: Fetch, key: Key) -> str:
        try:
            async with asyncio.timeout(_WITHIN):
                return await fetch_collateral(fetch, *key)
        except TimeoutError as error:
            raise CollateralUnavailable(f"no answer from the collateral service in {_WITHIN} s") from error

    def _read(self, key: Key, text: str, now: datetime) -> Collateral:
        return read_collateral(text, fmspc=key[0], authority=key[1], now=now, root_sha256=self._root_sha256)

    def _failures(self, key: Key) -> int:
        failure = self._failed.get(key)
        return failure[1] if failure is not None else 0

    def _next_try(self, key: Key) -> float:
        pause: timedelta = min(_PAUSE * 2 ** min(self._failures(key), 16), _PAUSE_MOST)
        return self._clock.monotonic() + pause.total_seconds()

    # On disk

    def _path(self, key: Key) -> Path | None:
        """A folder a root: simulated collateral never lies beside Intel's."""
        if self._folder is None:
            return None
        return self._folder / self._root_sha256[:16] / f"{key[0]}-{key[1]}.json"

    def _load_all(self) -> None:
        self._loaded = True
        folder = None if self._folder is None else self._folder / self._root_sha256[:16]
        if folder is None or not folder.is_dir():
            return
        for path in folder.iterdir():
            found = _NAME.fullmatch(path.name)
            if found is not None:
                self._load((found[1], found[2]))

    def _load(self, key: Key) -> Held | None:
        path = self._path(key)
        self._looked_for.add(key)
        try:
            if path is None or path.stat().st_size > _MAX_FILE:
                return None
            value = json.loads(path.read_text())
            asked_at = datetime.fromisoformat(value["asked_at"])
            held = Held(self._read(key, json.dumps(value["collateral"]), self._clock.now()), asked_at)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, RecursionError, CollateralUnavailable) as error:
            _log.warning("kept_collateral_not_used", path=str(path), reason=str(error))
            return None
        self._held[key] = held
        return held

    def _keep(self, key: Key) -> None:
        path, held = self._path(key), self._held[key]
        if path is None:
            return
        value = {"asked_at": held.asked_at.isoformat(), "collateral": json.loads(held.collateral.text)}
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
            try:
                with os.fdopen(descriptor, "w") as file:
                    json.dump(value, file)
                    file.flush()
                    os.fsync(file.fileno())
                Path(name).replace(path)
            except BaseException:
                Path(name).unlink(missing_ok=True)
                raise
        except OSError as error:
            # It is held in memory: only a restart without the service would miss it.
            _log.warning("collateral_not_kept", path=str(path), reason=str(error))


def _shown(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")
