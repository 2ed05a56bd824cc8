"""The instance states' table."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_validator.challenges.lifecycle import DEADLINES, TABLE, Aside, Fact, transition
from platform_validator.store.records import InstanceState as State

EXPECTED: dict[tuple[State, Fact], State | Aside] = {
    (State.CREATED, Fact.FETCHED): State.PROVISIONING,
    (State.CREATED, Fact.BROKE): State.FAILED,
    (State.CREATED, Fact.SUPERSEDED): Aside.FORGOTTEN,
    (State.CREATED, Fact.REMOVED): Aside.FORGOTTEN,
    (State.PROVISIONING, Fact.BOOTED): State.PROBING,
    (State.PROVISIONING, Fact.BROKE): State.FAILED,
    (State.PROVISIONING, Fact.SUPERSEDED): State.RECYCLING,
    (State.PROVISIONING, Fact.REMOVED): State.RECYCLING,
    (State.PROBING, Fact.PROVED): State.ACTIVE,
    (State.PROBING, Fact.BROKE): State.FAILED,
    (State.PROBING, Fact.SUPERSEDED): State.RECYCLING,
    (State.PROBING, Fact.REMOVED): State.RECYCLING,
    (State.ACTIVE, Fact.BROKE): State.FAILED,
    (State.ACTIVE, Fact.SUPERSEDED): State.RECYCLING,
    (State.ACTIVE, Fact.REMOVED): State.RECYCLING,
    (State.FAILED, Fact.RETRIED): State.CREATED,
    (State.FAILED, Fact.SUPERSEDED): State.RECYCLING,
    (State.FAILED, Fact.REMOVED): State.RECYCLING,
    (State.RECYCLING, Fact.DRAINED): Aside.FORGOTTEN,
}


@pytest.mark.parametrize("state", State)
@pytest.mark.parametrize("fact", Fact)
def test_every_pair_of_state_and_fact(state: State, fact: Fact) -> None:
    """Every pair of state and fact."""
    assert transition(state, fact) is EXPECTED.get((state, fact), Aside.IGNORED)


def test_the_documented_table_is_the_code() -> None:
    """docs/architecture.md has a row for each state, and in it what each fact leads to, and the deadline."""
    page = (Path(__file__).parents[3] / "docs" / "architecture.md").read_text(encoding="utf-8")
    rows = [line for line in page.splitlines() if line.startswith("| **")]
    told = {}
    for line in rows:
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        told[cells[0].strip("* ")] = cells[1:]
    assert list(told) == [state.value for state in State]
    for state, (moves, deadline, _) in told.items():
        expected = [
            f"{fact.value} → {getattr(after, 'value', after)}" for fact, after in TABLE[State(state)].items()
        ]
        assert moves.split(", ") == expected
        limit = DEADLINES[State(state)]
        assert deadline == ("none" if limit is None else f"{limit.total_seconds() / 60:.0f} min")


@given(st.lists(st.sampled_from(Fact), max_size=40))
def test_active_is_reached_through_fetched_booted_and_proved_alone(facts: list[Fact]) -> None:
    """Active is reached through fetched booted and proved alone."""
    state: State | Aside = State.CREATED
    path: list[Fact] = []
    for fact in facts:
        if not isinstance(state, State):
            break
        after = transition(state, fact)
        if after is Aside.IGNORED:
            continue
        if after is State.ACTIVE:
            assert [*path[-2:], fact] == [Fact.FETCHED, Fact.BOOTED, Fact.PROVED]
        path.append(fact)
        state = after


@given(st.lists(st.sampled_from(Fact), max_size=40))
def test_a_recycling_instance_never_serves_again(facts: list[Fact]) -> None:
    """A recycling instance never serves again."""
    state: State | Aside = State.RECYCLING
    for fact in facts:
        after = transition(State.RECYCLING, fact)
        assert after in {Aside.IGNORED, Aside.FORGOTTEN}
    assert state is State.RECYCLING
