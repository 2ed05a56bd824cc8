"""`metrics.final_score`: formulas, names, and that it is always finite."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_validator.scoring import (
    Algorithm,
    Normalization,
    ScoringRule,
    UnknownScoring,
    final_score,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
rules = st.builds(
    ScoringRule,
    algorithm=st.sampled_from(Algorithm),
    normalization=st.sampled_from(Normalization),
    low=finite,
    high=finite,
    centre=finite,
    spread=finite,
    weights=st.dictionaries(st.sampled_from(["a", "b"]), finite, max_size=2),
)


@pytest.mark.parametrize(
    ("rule", "score", "metrics", "final"),
    [
        (ScoringRule(), 0.95, {}, 0.95),
        (ScoringRule(), 7.0, {}, 1.0),
        (ScoringRule(), -7.0, {}, 0.0),
        (ScoringRule(high=10.0), 5.0, {}, 0.5),
        (ScoringRule(normalization=Normalization.NONE), 7.0, {}, 7.0),
        (ScoringRule(normalization=Normalization.Z_SCORE, centre=5, spread=2), 9.0, {}, 2.0),
        (ScoringRule(normalization=Normalization.ROBUST, centre=5, spread=2), 1e9, {}, 10.0),
        (ScoringRule(Algorithm.LOGARITHMIC), 1.0, {}, math.log(2)),
        (ScoringRule(Algorithm.EXPONENTIAL), 1.0, {}, math.e),
        (ScoringRule(weights={"a": 3.0}), 1.0, {"a": 0.0, "b": 1.0}, 0.25),
        (ScoringRule(weights={"absent": 3.0}), 1.0, {}, 1.0),
        (ScoringRule(low=1.0, high=1.0), 1.0, {}, 0.0),
    ],
)
def test_formulas(rule: ScoringRule, score: float, metrics: dict[str, float], final: float) -> None:
    """Formulas."""
    assert final_score(score, metrics, rule) == pytest.approx(final)


@given(finite, st.dictionaries(st.sampled_from(["a", "b", "c"]), finite), rules)
def test_it_is_finite_whatever_comes(score: float, metrics: dict[str, float], rule: ScoringRule) -> None:
    """It is finite whatever comes."""
    assert math.isfinite(final_score(score, metrics, rule))


@given(st.floats(-2, 2), st.floats(-2, 2), st.sampled_from(Algorithm), st.sampled_from(Normalization))
def test_a_better_score_is_never_worth_less(
    first: float, second: float, algorithm: Algorithm, normalization: Normalization
) -> None:
    """A better score is never worth less."""
    rule = ScoringRule(algorithm, normalization)
    low, high = sorted((first, second))
    assert final_score(low, {}, rule) <= final_score(high, {}, rule)


def test_unknown_names_are_refused_with_the_known_ones() -> None:
    """Unknown names are refused with the known ones."""
    with pytest.raises(UnknownScoring, match="Linear, Logarithmic, Exponential"):
        ScoringRule.named("linear", "MinMax")
    with pytest.raises(UnknownScoring, match="None, MinMax, ZScore, Robust"):
        ScoringRule.named("Linear", "Max")


def test_a_challenges_table_wins_over_the_operators_rule() -> None:
    """A challenges table wins over the operators rule."""
    mine = ScoringRule.named("Linear", "MinMax")
    table = {"algorithm": "Exponential", "min": 1, "weights": {"speed": 0.5}}
    rule = mine.overridden(table, low=5.0, high=20.0)
    assert rule == ScoringRule(Algorithm.EXPONENTIAL, low=1.0, high=20.0, weights={"speed": 0.5})
    assert mine.overridden({}) == mine


@pytest.mark.parametrize(
    "table", [{"algo": "x"}, {"algorithm": "x"}, {"min": "0"}, {"weights": 3}, {"weights": {"a": True}}]
)
def test_a_wrong_table_is_refused(table: dict[str, object]) -> None:
    """A wrong table is refused."""
    with pytest.raises(UnknownScoring):
        ScoringRule().overridden(table)
