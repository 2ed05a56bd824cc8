"""What every Store must do with values: versions, replies, usage, sealing anew."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from datetime import timedelta

from platform_protocol.ids import ChallengeId, VmName
from platform_validator.store.port import Store, StoreError
from platform_validator.store.records import (
    Resealed,
    SealedText,
    ValueChange,
    ValueRecord,
    ValueReply,
    ValueSlot,
    ValueUsage,
    VmPhase,
)
from platform_validator.store.specimens import CHALLENGE, NOW, cvm, refuses, require, writes

_OTHER = ChallengeId("other")


async def a_values_write_is_applied_once(store: Store) -> None:
    """The same (session, request) gets its first reply and changes nothing; versions count from 1."""

    def one_more(slot: ValueSlot) -> ValueChange:
        before = int(slot.present.value) if slot.present is not None else 0
        return writes(str(before + 1), f"v{slot.last_version + 1}")(slot)

    replies = []
    for request in ("r1", "r1", "r2"):
        reply = await store.change_value(CHALLENGE, "k", change=one_more, request=("s", request), at=NOW)
        replies.append(reply.text)
    record = await store.value(CHALLENGE, "k")
    require(replies == ["v1", "v1", "v2"], f"unexpected {replies}")
    require(record is not None and (record.value, record.version) == ("2", 2), f"unexpected {record}")


async def a_write_of_nobody_is_applied_each_time(store: Store) -> None:
    """Without a request nothing is remembered of it."""
    for number in (1, 2):
        reply = await store.change_value(
            CHALLENGE, "k", change=writes("1", f"v{number}"), request=None, at=NOW
        )
        require(reply.text == f"v{number}", "an earlier reply came back")


async def values_belong_to_one_challenge(store: Store) -> None:
    """Listed by prefix and key order; another challenge sees nothing; a removed key is gone."""
    for key in ("b", "a%", "a_", "ab"):
        await store.change_value(CHALLENGE, key, change=writes("1"), request=("s", key), at=NOW)
    require([v.key for v in await store.values(CHALLENGE, "a")] == ["a%", "a_", "ab"], "prefix")
    require(not await store.values(_OTHER), "another challenge's values are seen")
    reply = await store.change_value(CHALLENGE, "b", change=_removes, request=("s", "d"), at=NOW)
    require(reply.text == "gone", "another reply")
    require(await store.value(CHALLENGE, "b") is None, "the value is still there")
    require("b" not in [v.key for v in await store.values(CHALLENGE)], "the value is still listed")


async def a_version_never_comes_again(store: Store) -> None:
    """After a deletion a key goes on counting, until its deletion is forgotten."""
    seen: list[int] = []

    def noted(slot: ValueSlot) -> ValueChange:
        seen.append(slot.last_version)
        return writes("1")(slot)

    for change in (noted, noted, _removes, noted, _removes):
        await store.change_value(CHALLENGE, "k", change=change, request=None, at=NOW)
    require(seen == [0, 1, 2], f"unexpected {seen}")
    await store.compact(ended_before=NOW + timedelta(days=1), keep=0)
    await store.change_value(CHALLENGE, "k", change=noted, request=None, at=NOW)
    require(seen[-1] == 0, "a deletion of long ago is still there")


async def what_a_challenge_uses_is_counted(store: Store) -> None:
    """Keys and bytes, with every write, rewrite and removal; shown to the change that decides."""
    slots: list[tuple[int, int]] = []

    def noted(size: int) -> Callable[[ValueSlot], ValueChange]:
        def change(slot: ValueSlot) -> ValueChange:
            slots.append((slot.keys, slot.bytes))
            return ValueChange(SealedText("ok", None), put=SealedText("1", None), size=size)

        return change

    for key, size in (("a", 10), ("b", 5), ("a", 3)):
        await store.change_value(CHALLENGE, key, change=noted(size), request=None, at=NOW)
    await store.change_value(_OTHER, "x", change=noted(7), request=None, at=NOW)
    require(slots == [(0, 0), (1, 10), (2, 15), (0, 0)], f"unexpected {slots}")
    require(
        list(await store.values_used()) == [ValueUsage(CHALLENGE, 2, 8), ValueUsage(_OTHER, 1, 7)], "used"
    )
    for _ in range(2):
        await store.change_value(CHALLENGE, "a", change=_removes, request=None, at=NOW)
    left = next(iter(await store.values_used()))
    require(left == ValueUsage(CHALLENGE, 1, 5), f"a removal was counted twice, or not: {left}")


async def values_are_sealed_anew_in_batches(store: Store) -> None:
    """What is under another key, a batch at a time; what cannot be is left and passed over."""
    for number in range(5):
        change = writes(f"{number}", key_id="old" if number else None)
        await store.change_value(CHALLENGE, f"k{number}", change=change, request=("s", f"r{number}"), at=NOW)

    def value(record: ValueRecord) -> SealedText | None:
        return None if record.value in {"0", "3"} else SealedText(f"new-{record.value}", "new")

    def reply(known: ValueReply) -> SealedText | None:
        return SealedText(f"new-{known.reply}", "new")

    found, skip = [], 0
    while any(batch := await store.reseal_values("new", limit=2, skip=skip, reseal=value)):
        found.append(batch)
        skip += batch.left
    require(found == [Resealed(1, 1), Resealed(1, 1), Resealed(1, 0)], f"unexpected {found}")
    require(await store.reseal_replies("new", limit=99, skip=0, reseal=reply) == Resealed(5, 0), "replies")
    require(await store.reseal_replies("new", limit=99, skip=0, reseal=reply) == Resealed(0, 0), "once more")
    record = await store.value(CHALLENGE, "k2")
    shown = None if record is None else (record.value, record.key_id, record.version)
    require(shown == ("new-2", "new", 1), f"unexpected {shown}")
    again = await store.change_value(CHALLENGE, "k2", change=writes("x"), request=("s", "r2"), at=NOW)
    require(again == SealedText("new-ok", "new"), f"unexpected {again}")


async def a_change_that_raises_leaves_nothing(store: Store) -> None:
    """Neither a value nor a reply: the request may be made again."""

    def refuse(_: ValueSlot) -> ValueChange:
        raise StoreError("no")

    refused = store.change_value(CHALLENGE, "k", change=refuse, request=("s", "r"), at=NOW)
    await refuses(StoreError, refused)
    reply = await store.change_value(CHALLENGE, "k", change=_reads, request=("s", "r"), at=NOW)
    require(reply.text == "read", "the refusal was remembered")
    require(await store.value(CHALLENGE, "k") is None, "a value out of a refusal")


async def a_prefix_may_hold_any_character(store: Store) -> None:
    """No wildcards; NUL and what is not ASCII count as themselves; at most the limit."""
    keys = ["a", "a%", "a_", "ab", "a\0b", "b", "é", "😀", "A"]
    for key in keys:
        await store.change_value(CHALLENGE, key, change=writes("1"), request=("s", key), at=NOW)
    for prefix in ("", "a", "a%", "a_", "a\0", "é", "😀", "zz"):
        found = [record.key for record in await store.values(CHALLENGE, prefix)]
        require(found == sorted(key for key in keys if key.startswith(prefix)), f"{prefix!r}: {found}")
    limited = [record.key for record in await store.values(CHALLENGE, "a", 2)]
    require(limited == ["a", "a\0b"], f"limited: {limited}")


async def replies_go_with_their_cvm(store: Store) -> None:
    """Compaction forgets what sessions of CVMs that are long gone were answered, and no others."""
    for number in (1, 2):
        await store.intend_vm(cvm(number))
        request = (f"session-{number}", "r")
        await store.change_value(CHALLENGE, "k", change=writes("1", "first"), request=request, at=NOW)
    await store.vm_phase(VmName("pv-1"), VmPhase.GONE, at=NOW)
    await store.compact(ended_before=NOW + timedelta(days=1), keep=0)
    again = [
        await store.change_value(
            CHALLENGE, "k", change=writes("1", "second"), request=(f"session-{number}", "r"), at=NOW
        )
        for number in (1, 2)
    ]
    require([reply.text for reply in again] == ["second", "first"], f"unexpected {again}")


def _removes(_: ValueSlot) -> ValueChange:
    return ValueChange(SealedText("gone", None), remove=True)


def _reads(_: ValueSlot) -> ValueChange:
    return ValueChange(SealedText("read", None))


CASES: tuple[Callable[[Store], Awaitable[None]], ...] = (
    a_values_write_is_applied_once,
    a_write_of_nobody_is_applied_each_time,
    values_belong_to_one_challenge,
    a_version_never_comes_again,
    what_a_challenge_uses_is_counted,
    values_are_sealed_anew_in_batches,
    a_change_that_raises_leaves_nothing,
    a_prefix_may_hold_any_character,
    replies_go_with_their_cvm,
)
