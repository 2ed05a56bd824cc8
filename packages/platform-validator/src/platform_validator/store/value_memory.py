"""The values of the Store in memory: the same rules as the values' tables in SQLite."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import replace
from datetime import datetime

from platform_protocol.ids import ChallengeId
from platform_validator.store.records import (
    Resealed,
    SealedText,
    ValueChange,
    ValueRecord,
    ValueReply,
    ValueSlot,
    ValueUsage,
)


class ValueMemory:
    """Values, the versions of deleted keys with the time of their deletion, and replies."""

    def __init__(self) -> None:
        self._values: dict[tuple[ChallengeId, str], ValueRecord] = {}
        self._deleted: dict[tuple[ChallengeId, str], tuple[int, datetime]] = {}
        self._replies: dict[tuple[str, str], SealedText] = {}

    def prefixed(self, challenge_id: ChallengeId, prefix: str, limit: int) -> list[ValueRecord]:
        """See the port's `values`."""
        found = [
            record
            for (owner, key), record in self._values.items()
            if owner == challenge_id and key.startswith(prefix)
        ]
        return sorted(found, key=lambda record: record.key.encode())[:limit]

    def one(self, challenge_id: ChallengeId, key: str) -> ValueRecord | None:
        """See the port's `value`."""
        return self._values.get((challenge_id, key))

    def change(
        self,
        challenge_id: ChallengeId,
        key: str,
        change: Callable[[ValueSlot], ValueChange],
        request: tuple[str, str] | None,
        at: datetime,
    ) -> SealedText:
        """See the port's `change_value`."""
        if request in self._replies:
            return self._replies[request]
        place = challenge_id, key
        present = self._values.get(place)
        last = present.version if present is not None else self._deleted.get(place, (0, at))[0]
        used = self._used(challenge_id)
        done = change(ValueSlot(present, last, used.keys, used.bytes))
        if done.put is not None:
            text, key_id = done.put
            self._values[place] = ValueRecord(challenge_id, key, text, last + 1, at, key_id, done.size)
            self._deleted.pop(place, None)
        elif done.remove and present is not None:
            del self._values[place]
            self._deleted[place] = last, at
        if request is not None:
            self._replies[request] = done.reply
        return done.reply

    def reseal_values(
        self, key_id: str, limit: int, skip: int, reseal: Callable[[ValueRecord], SealedText | None]
    ) -> Resealed:
        """See the port."""
        others = sorted(place for place, record in self._values.items() if record.key_id != key_id)
        batch, done = others[skip : skip + limit], 0
        for place in batch:
            sealed = reseal(self._values[place])
            if sealed is not None:
                self._values[place] = replace(self._values[place], value=sealed.text, key_id=sealed.key_id)
                done += 1
        return Resealed(done, len(batch) - done)

    def reseal_replies(
        self, key_id: str, limit: int, skip: int, reseal: Callable[[ValueReply], SealedText | None]
    ) -> Resealed:
        """See the port."""
        others = sorted(who for who, reply in self._replies.items() if reply.key_id != key_id)
        batch, done = others[skip : skip + limit], 0
        for who in batch:
            sealed = reseal(ValueReply(*who, *self._replies[who]))
            if sealed is not None:
                self._replies[who] = sealed
                done += 1
        return Resealed(done, len(batch) - done)

    def used(self) -> list[ValueUsage]:
        """See the port's `values_used`."""
        return [self._used(owner) for owner in sorted({owner for owner, _ in self._values})]

    def forget(self, *, sessions: Collection[str], deleted_before: datetime) -> None:
        """Replies of sessions that ended, and versions of keys that were deleted long ago."""
        self._replies = {who: what for who, what in self._replies.items() if who[0] not in sessions}
        self._deleted = {place: gone for place, gone in self._deleted.items() if gone[1] >= deleted_before}

    def _used(self, challenge_id: ChallengeId) -> ValueUsage:
        sizes = [record.size for (owner, _), record in self._values.items() if owner == challenge_id]
        return ValueUsage(challenge_id, len(sizes), sum(sizes))
