"""Values with their keys: loaded at the start, changed by a rekeying; nothing stays under an older one."""

from __future__ import annotations

import asyncio

import structlog

from platform_validator.clock import Clock
from platform_validator.store.port import Store
from platform_validator.store.records import Resealed
from platform_validator.values.changes import ValueLimits
from platform_validator.values.keys import ValueKeys, ValueKeySource
from platform_validator.values.manager import DynamicValuesManager
from platform_validator.values.sealing import ValuesSeal

_log = structlog.get_logger(__name__)


class ValueKeeper:
    """The manager with its keys, which are read here: make it in a thread where they come from afar.

    Args:
        source: Has the keys.
        store: Keeps the values.
        clock: Time.
        limits: Of each challenge.

    Raises:
        ValueKeysUnusable: No keys can be had.
    """

    def __init__(
        self, *, source: ValueKeySource, store: Store, clock: Clock, limits: ValueLimits | None = None
    ) -> None:
        self._source = source
        self._keys = source.load()
        self._seal = ValuesSeal(*self._keys.keys)
        self._rekeying = asyncio.Lock()  # of two rekeyings the second begins after the first
        self.manager = DynamicValuesManager(store=store, clock=clock, seal=self._seal, limits=limits)

    async def settle(self) -> Resealed:
        """Finish a rekeying that was cut off, and seal what an older version kept in clear.

        Raises:
            StoreUnavailable: Do it again.
            ValueKeysUnusable: What is to be remembered of the keys cannot be.
        """
        async with self._rekeying:
            if len(self._keys.keys) == 1 and not self._keys.clear:
                return Resealed(0, 0)
            return await self._settle()

    async def rekey(self) -> Resealed:
        """A new key, everything sealed under it, and the older keys forgotten.

        Where something does not open (`left`), the older keys stay.

        Raises:
            ValueKeysUnusable: No new key can be had, or an old one stays.
            StoreUnavailable: Both keys stay; the next start, or another call, goes on.
        """
        async with self._rekeying:
            self._keys = await asyncio.to_thread(self._source.advance)
            self._seal.use(*self._keys.keys)
            _log.info("values_rekeying", key=self._seal.active)
            return await self._settle()

    async def _settle(self) -> Resealed:
        self._seal.accepts_clear = self._keys.clear
        try:
            found = await self.manager.reseal()
        finally:
            self._seal.accepts_clear = False
        if any(found):
            _log.info("values_resealed", count=found.done, unreadable=found.left, key=self._seal.active)
        if not found.left:
            self._keys = await asyncio.to_thread(self._settled)
            self._seal.use(*self._keys.keys)
        return found

    def _settled(self) -> ValueKeys:
        self._source.settled()
        return self._source.load()
