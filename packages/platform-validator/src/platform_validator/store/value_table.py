"""The values' tables in SQLite: each function is the work of one transaction, in the store's thread."""

from __future__ import annotations

from collections.abc import Callable
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
from platform_validator.store.rows import reply_of, stamp, value_of
from platform_validator.store.transactions import Transactions


class ValueTable:
    """Belongs inside `Transactions.do` and `read`."""

    def __init__(self, db: Transactions) -> None:
        self._db = db

    def prefixed(self, challenge_id: ChallengeId, prefix: str, limit: int) -> list[ValueRecord]:
        """See the port's `values`."""
        rows = self._db.all("values_prefixed", challenge_id=challenge_id, prefix=prefix, limit=limit)
        return [value_of(row) for row in rows]

    def one(self, challenge_id: ChallengeId, key: str) -> ValueRecord | None:
        """See the port's `value`."""
        row = self._db.one("value_one", challenge_id=challenge_id, key=key)
        return None if row is None else value_of(row)

    def change(
        self,
        challenge_id: ChallengeId,
        key: str,
        change: Callable[[ValueSlot], ValueChange],
        request: tuple[str, str] | None,
        at: datetime,
    ) -> SealedText:
        """See the port's `change_value`."""
        if request is not None:
            earlier = self._db.one("reply_one", session_id=request[0], request_id=request[1])
            if earlier is not None:
                return SealedText(earlier["reply"], earlier["key_id"])
        slot = self._slot(challenge_id, key)
        done = change(slot)
        self._apply(challenge_id, key, slot, done, at)
        if request is not None:
            text, key_id = done.reply
            self._db.run("reply_put", session_id=request[0], request_id=request[1], reply=text, key_id=key_id)
        return done.reply

    def reseal_values(
        self, key_id: str, limit: int, skip: int, reseal: Callable[[ValueRecord], SealedText | None]
    ) -> Resealed:
        """See the port."""
        rows = self._db.all("values_under_other_keys", key_id=key_id, limit=limit, skip=skip)
        done = 0
        for record in map(value_of, rows):
            sealed = reseal(record)
            if sealed is not None:
                place = {"challenge_id": record.challenge_id, "key": record.key}
                done += self._db.run("value_reseal", value=sealed.text, key_id=sealed.key_id, **place)
        return Resealed(done, len(rows) - done)

    def reseal_replies(
        self, key_id: str, limit: int, skip: int, reseal: Callable[[ValueReply], SealedText | None]
    ) -> Resealed:
        """See the port."""
        rows = self._db.all("replies_under_other_keys", key_id=key_id, limit=limit, skip=skip)
        done = 0
        for reply in map(reply_of, rows):
            sealed = reseal(reply)
            if sealed is not None:
                place = {"session_id": reply.session_id, "request_id": reply.request_id}
                done += self._db.run("reply_reseal", reply=sealed.text, key_id=sealed.key_id, **place)
        return Resealed(done, len(rows) - done)

    def used(self) -> list[ValueUsage]:
        """See the port's `values_used`."""
        return [ValueUsage(*row) for row in self._db.all("values_scopes")]

    def _slot(self, challenge_id: ChallengeId, key: str) -> ValueSlot:
        row = self._db.one("value_slot", challenge_id=challenge_id, key=key)
        used = self._db.one("values_usage_one", challenge_id=challenge_id)
        keys, size = (0, 0) if used is None else used
        there = row is not None and row["deleted_at"] is None
        return ValueSlot(
            present=value_of(row) if row is not None and there else None,
            last_version=0 if row is None else row["version"],
            keys=keys,
            bytes=size,
        )

    def _apply(
        self, challenge_id: ChallengeId, key: str, slot: ValueSlot, done: ValueChange, at: datetime
    ) -> None:
        before = slot.present.size if slot.present is not None else 0
        if done.put is not None:
            self._db.run(
                "value_put",
                challenge_id=challenge_id,
                key=key,
                value=done.put.text,
                key_id=done.put.key_id,
                size=done.size,
                version=slot.last_version + 1,
                at=stamp(at),
            )
            more, by = int(slot.present is None), done.size - before
        elif done.remove and slot.present is not None:
            self._db.run("value_delete", challenge_id=challenge_id, key=key, at=stamp(at))
            more, by = -1, -before
        else:
            return
        self._db.run("values_usage_add", challenge_id=challenge_id, keys=more, bytes=by)
