"""Values with their keys: loaded at the start, changed by a rekeying; nothing stays under an older one."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import structlog

from platform_validator.clock import Clock
from platform_validator.store.port import Store
from platform_validator.store.records import Resealed
from platform_validator.values.changes import ValueLimits
from platform_validator.values.errors import ValueKeysUnusable
from platform_validator.values.keys import ValueKeySource
from platform_validator.values.manager import DynamicValuesManager
from platform_validator.values.sealing import ValueKey, ValuesSeal

_log = structlog.get_logger(__name__)


class ValueKeeper:
    """The manager with its keys.

    Args:
        source: Has the keys.
        folder: Of the keyring; a mark in it says that nothing in clear is left.
        store: Keeps the values.
        clock: Time.
        limits: Of each challenge.
    """

    def __init__(
        self,
        *,
        source: ValueKeySource,
        folder: Path,
        store: Store,
        clock: Clock,
        limits: ValueLimits | None = None,
    ) -> None:
        self._source = source
        self._mark = folder / "sealed"
        self._seal = ValuesSeal(*source.load())
        self._rekeying = asyncio.Lock()  # of two rekeyings the second begins after the first
        self.manager = DynamicValuesManager(store=store, clock=clock, seal=self._seal, limits=limits)

    async def settle(self) -> Resealed:
        """Finish a rekeying that was cut off, and seal what an older version kept in clear.

        Raises:
            StoreUnavailable: Do it again.
            ValueKeysUnusable: A key file, or the mark, cannot be written.
        """
        async with self._rekeying:
            return await self._settle()

    async def rekey(self) -> Resealed:
        """A new key, everything sealed under it, and the older keys forgotten.

        Where something does not open (`left`), the older keys stay.

        Raises:
            ValueKeysUnusable: No new key can be had, or an old one stays.
            StoreUnavailable: Both keys stay; the next start, or another call, goes on.
        """
        async with self._rekeying:
            self._seal.use(*await asyncio.to_thread(self._source.advance))
            _log.info("values_rekeying", key=self._seal.active)
            return await self._settle()

    async def _settle(self) -> Resealed:
        self._seal.accepts_clear = not self._mark.exists()
        try:
            found = await self.manager.reseal()
        finally:
            self._seal.accepts_clear = False
        if any(found):
            _log.info("values_resealed", count=found.done, unreadable=found.left, key=self._seal.active)
        if not found.left:
            self._seal.use(*await asyncio.to_thread(self._finish))
        return found

    def _finish(self) -> tuple[ValueKey, ...]:
        if not self._mark.exists():
            try:
                os.close(os.open(self._mark, os.O_WRONLY | os.O_CREAT, 0o600))
            except OSError as error:
                raise ValueKeysUnusable(f"{self._mark} cannot be made: {error.strerror or error}") from error
        self._source.forget_older()
        return self._source.load()
