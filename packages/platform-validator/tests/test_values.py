"""Dynamic values over the Store: each scope its own, each write once."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from platform_protocol.ids import ChallengeId
from platform_protocol.session.messages import (
    ValuesCas,
    ValuesDelete,
    ValuesGet,
    ValuesIncrement,
    ValuesList,
    ValuesRequest,
    ValuesResult,
    ValuesSet,
)
from platform_protocol.values import MAX_VALUE_BYTES
from platform_validator.clock import SystemClock
from platform_validator.store.memory import MemoryStore
from platform_validator.store.port import Store
from platform_validator.store.sqlite import SqliteStore
from platform_validator.values import DynamicValuesManager, ValueKeeper
from platform_validator.values.changes import ValueLimits
from platform_validator.values.errors import OutsideOfSession, ValueRefused
from platform_validator.values.keys import MemoryKeys

A, B = ChallengeId("a"), ChallengeId("b")


def made(store: Store, limits: ValueLimits | None = None) -> DynamicValuesManager:
    """Values over a store, under a key of their own."""
    return ValueKeeper(source=MemoryKeys(), store=store, clock=SystemClock(), limits=limits).manager


class Asker:
    """One session of a challenge, numbering its requests."""

    def __init__(
        self, values: DynamicValuesManager, challenge_id: ChallengeId = A, session: str = "s1"
    ) -> None:
        self._values = values
        self._challenge_id = challenge_id
        self._session = session
        self._count = 0

    async def ask(self, kind: type[Any], again: bool = False, **fields: Any) -> ValuesResult:
        """One request, or the last one once more."""
        self._count += 0 if again else 1
        request: ValuesRequest = kind(seq=self._count, request_id=f"r{self._count}", **fields)
        return await self._values.answer(self._challenge_id, self._session, request)


@pytest.fixture
def values() -> DynamicValuesManager:
    """Values over an empty store."""
    return made(MemoryStore())


async def test_a_value_that_was_set_is_read_back(values: DynamicValuesManager) -> None:
    """A value that was set is read back."""
    asker = Asker(values)
    written = await asker.ask(ValuesSet, key="k", value={"x": [1, "two", None]})
    assert (written.value, written.version) == ({"x": [1, "two", None]}, 1)
    read = await asker.ask(ValuesGet, key="k")
    assert (read.value, read.version, read.error) == ({"x": [1, "two", None]}, 1, None)
    assert (await asker.ask(ValuesSet, key="k", value=2)).version == 2


async def test_what_is_not_there_has_neither_value_nor_version(values: DynamicValuesManager) -> None:
    """What is not there has neither value nor version."""
    read = await Asker(values).ask(ValuesGet, key="k")
    assert (read.value, read.version, read.error) == (None, None, None)


async def test_challenges_do_not_see_each_others_values(values: DynamicValuesManager) -> None:
    """Challenges do not see each others values."""
    await Asker(values, A).ask(ValuesSet, key="k", value=1)
    assert (await Asker(values, B, "s2").ask(ValuesGet, key="k")).version is None
    assert (await Asker(values, B, "s3").ask(ValuesList)).keys == []


async def test_a_resent_write_is_answered_and_not_applied_again(values: DynamicValuesManager) -> None:
    """A resent write is answered and not applied again."""
    asker = Asker(values)
    first = await asker.ask(ValuesIncrement, key="n", by=5)
    assert await asker.ask(ValuesIncrement, again=True, key="n", by=5) == first
    assert (await asker.ask(ValuesGet, key="n")).value == 5


async def test_deleting_and_listing(values: DynamicValuesManager) -> None:
    """Deleting and listing."""
    asker = Asker(values)
    for key in ("b1", "a1", "a2"):
        await asker.ask(ValuesSet, key=key, value=0)
    assert (await asker.ask(ValuesList, prefix="a")).keys == ["a1", "a2"]
    assert (await asker.ask(ValuesList, limit=1)).keys == ["a1"]
    assert (await asker.ask(ValuesDelete, key="a1")).error is None
    assert (await asker.ask(ValuesDelete, key="a1")).error is None
    assert (await asker.ask(ValuesList)).keys == ["a2", "b1"]


async def test_compare_and_set_writes_at_the_expected_version_alone(values: DynamicValuesManager) -> None:
    """Compare and set writes at the expected version alone."""
    asker = Asker(values)
    assert (await asker.ask(ValuesCas, key="k", expected_version=0, value="x")).version == 1
    refused = await asker.ask(ValuesCas, key="k", expected_version=0, value="y")
    assert refused.error is not None
    assert (refused.error.code, refused.version) == ("version_conflict", 1)
    assert (await asker.ask(ValuesGet, key="k")).value == "x"
    assert (await asker.ask(ValuesCas, key="k", expected_version=1, value="y")).version == 2


@pytest.mark.parametrize(
    ("kind", "fields", "code"),
    [
        (ValuesSet, {"key": "", "value": 1}, "bad_key"),
        (ValuesSet, {"key": "k" * 513, "value": 1}, "bad_key"),
        (ValuesGet, {"key": "a\x00b"}, "bad_key"),
        (ValuesSet, {"key": "k", "value": "x" * MAX_VALUE_BYTES}, "value_too_large"),
        (ValuesSet, {"key": "k", "value": 2**60}, "not_json"),
        (ValuesIncrement, {"key": "text", "by": 1}, "not_a_number"),
        (ValuesIncrement, {"key": "large", "by": 1}, "out_of_range"),
    ],
)
async def test_limits_are_answers_and_change_nothing(
    values: DynamicValuesManager, kind: type[Any], fields: dict[str, Any], code: str
) -> None:
    """Limits are answers and change nothing."""
    asker = Asker(values)
    await asker.ask(ValuesSet, key="text", value="x")
    await asker.ask(ValuesSet, key="large", value=2**53 - 1)
    refused = await asker.ask(kind, **fields)
    assert refused.error is not None
    assert refused.error.code == code
    assert (await asker.ask(ValuesList)).keys == ["large", "text"]


@settings(max_examples=50)
@given(st.lists(st.tuples(st.sampled_from(["a", "b"]), st.integers(-1000, 1000)), max_size=20))
def test_increments_add_up(steps: list[tuple[str, int]]) -> None:
    """Increments add up."""

    async def run() -> dict[str, Any]:
        asker = Asker(made(MemoryStore()))
        for key, by in steps:
            await asker.ask(ValuesIncrement, key=key, by=by)
        return {key: (await asker.ask(ValuesGet, key=key)).value for key, _ in steps}

    sums: dict[str, int] = {}
    for key, by in steps:
        sums[key] = sums.get(key, 0) + by
    assert asyncio.run(run()) == sums


async def test_the_usage_guide_s_lines_hold_inside_a_session(values: DynamicValuesManager) -> None:
    """`set` and `get` bare inside a session; `for_challenge` elsewhere; the scope is the session's."""
    dynamic_values_manager = values
    with dynamic_values_manager.session(A):
        await dynamic_values_manager.set("key", "value")
        assert await dynamic_values_manager.get("key") == "value"
        with dynamic_values_manager.session(B):
            assert await dynamic_values_manager.get("key") is None
        assert await dynamic_values_manager.get("key") == "value"
    assert await dynamic_values_manager.for_challenge(A).get("key") == "value"
    assert await dynamic_values_manager.for_challenge(B).get("key", 7) == 7
    for outside in (dynamic_values_manager.get("key"), dynamic_values_manager.set("key", 1)):
        with pytest.raises(OutsideOfSession, match="for_challenge"):
            await outside


async def test_types_are_kept(values: DynamicValuesManager) -> None:
    """An integer stays one, and so does what looks like another type."""
    mine = values.for_challenge(A)
    kinds: list[Any] = [0, 1.5, "1", True, None, [], {"a": {"b": [1]}}, "é\n"]
    for number, value in enumerate(kinds):
        assert await mine.set(f"k{number}", value) == 1
        found = await mine.get(f"k{number}", "nothing")
        assert found == value
        assert type(found) is type(value)


async def test_operators_write_without_being_remembered(values: DynamicValuesManager) -> None:
    """Everything that a session can, with refusals as errors."""
    mine = values.for_challenge(A)
    assert await mine.increment("n", 2) == 2
    assert await mine.increment("n") == 3
    assert await mine.compare_and_set("n", 2, "x") == 3
    with pytest.raises(ValueRefused, match="expected version 2, it is 3") as refused:
        await mine.compare_and_set("n", 2, "y")
    assert refused.value.code == "version_conflict"
    assert await mine.get_versioned("n") == ("x", 3)
    assert await mine.list("n") == ["n"]
    await mine.delete("n")
    assert await mine.get_versioned("n") == (None, 0)
    assert await mine.set("n", 0) == 4
    assert [(each.key, each.value, each.version) for each in await values.entries(A)] == [("n", 0, 4)]


async def test_a_version_that_was_read_before_a_deletion_is_no_longer_expected(
    values: DynamicValuesManager,
) -> None:
    """Written, deleted, written again: a compare-and-set from before must not hit the new one."""
    mine = values.for_challenge(A)
    version = await mine.set("k", 1)
    await mine.delete("k")
    await mine.set("k", 1)
    with pytest.raises(ValueRefused):
        await mine.compare_and_set("k", version, 2)


async def test_a_challenge_has_its_share_and_no_more() -> None:
    """So many keys and bytes; rewriting and deleting make room; another challenge has its own."""
    values = made(MemoryStore(), ValueLimits(keys=2, bytes=100))
    mine = values.for_challenge(A)
    await mine.set("a", 1)
    await mine.set("b", 1)
    with pytest.raises(ValueRefused) as refused:
        await mine.set("c", 1)
    assert refused.value.code == "too_many_keys"
    await mine.set("b", 2)
    await values.for_challenge(B).set("c", 1)
    await mine.delete("b")
    await mine.set("c", "x" * 94)
    with pytest.raises(ValueRefused) as refused:
        await mine.set("a", "xxx")
    assert refused.value.code == "challenge_full"
    assert await mine.get("a") == 1
    await mine.set("c", "x")
    await mine.set("a", "xxx")


async def test_of_many_increments_at_once_none_is_lost(tmp_path: Path) -> None:
    """On the real journal: read, decided and written in one transaction."""
    store = await SqliteStore.open(tmp_path / "validator.db")
    mine = made(store).for_challenge(A)
    async with asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(mine.increment("n"))
    assert await mine.get("n") == 100
    await store.close()
