"""Dynamic values over the Store: each scope its own, each write once."""

from __future__ import annotations

import asyncio
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
    ValuesResult,
    ValuesSet,
)
from platform_validator.clock import SystemClock
from platform_validator.store.memory import MemoryStore
from platform_validator.values import MAX_VALUE, DynamicValues, ValuesRequest

A, B = ChallengeId("a"), ChallengeId("b")


class Asker:
    """One session of a challenge, numbering its requests."""

    def __init__(self, values: DynamicValues, challenge_id: ChallengeId = A, session: str = "s1") -> None:
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
def values() -> DynamicValues:
    """Values over an empty store."""
    return DynamicValues(store=MemoryStore(), clock=SystemClock())


async def test_a_value_that_was_set_is_read_back(values: DynamicValues) -> None:
    """A value that was set is read back."""
    asker = Asker(values)
    written = await asker.ask(ValuesSet, key="k", value={"x": [1, "two", None]})
    assert (written.value, written.version) == ({"x": [1, "two", None]}, 1)
    read = await asker.ask(ValuesGet, key="k")
    assert (read.value, read.version, read.error) == ({"x": [1, "two", None]}, 1, None)
    assert (await asker.ask(ValuesSet, key="k", value=2)).version == 2


async def test_what_is_not_there_has_neither_value_nor_version(values: DynamicValues) -> None:
    """What is not there has neither value nor version."""
    read = await Asker(values).ask(ValuesGet, key="k")
    assert (read.value, read.version, read.error) == (None, None, None)


async def test_challenges_do_not_see_each_others_values(values: DynamicValues) -> None:
    """Challenges do not see each others values."""
    await Asker(values, A).ask(ValuesSet, key="k", value=1)
    assert (await Asker(values, B, "s2").ask(ValuesGet, key="k")).version is None
    assert (await Asker(values, B, "s3").ask(ValuesList)).keys == []


async def test_a_resent_write_is_answered_and_not_applied_again(values: DynamicValues) -> None:
    """A resent write is answered and not applied again."""
    asker = Asker(values)
    first = await asker.ask(ValuesIncrement, key="n", by=5)
    assert await asker.ask(ValuesIncrement, again=True, key="n", by=5) == first
    assert (await asker.ask(ValuesGet, key="n")).value == 5


async def test_deleting_and_listing(values: DynamicValues) -> None:
    """Deleting and listing."""
    asker = Asker(values)
    for key in ("b1", "a1", "a2"):
        await asker.ask(ValuesSet, key=key, value=0)
    assert (await asker.ask(ValuesList, prefix="a")).keys == ["a1", "a2"]
    assert (await asker.ask(ValuesList, limit=1)).keys == ["a1"]
    assert (await asker.ask(ValuesDelete, key="a1")).error is None
    assert (await asker.ask(ValuesDelete, key="a1")).error is None
    assert (await asker.ask(ValuesList)).keys == ["a2", "b1"]


async def test_compare_and_set_writes_at_the_expected_version_alone(values: DynamicValues) -> None:
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
        (ValuesSet, {"key": "k", "value": "x" * MAX_VALUE}, "value_too_large"),
        (ValuesSet, {"key": "k", "value": 2**60}, "not_json"),
        (ValuesIncrement, {"key": "text", "by": 1}, "not_a_number"),
        (ValuesIncrement, {"key": "large", "by": 1}, "out_of_range"),
    ],
)
async def test_limits_are_answers_and_change_nothing(
    values: DynamicValues, kind: type[Any], fields: dict[str, Any], code: str
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
        asker = Asker(DynamicValues(store=MemoryStore(), clock=SystemClock()))
        for key, by in steps:
            await asker.ask(ValuesIncrement, key=key, by=by)
        return {key: (await asker.ask(ValuesGet, key=key)).value for key, _ in steps}

    sums: dict[str, int] = {}
    for key, by in steps:
        sums[key] = sums.get(key, 0) + by
    assert asyncio.run(run()) == sums
