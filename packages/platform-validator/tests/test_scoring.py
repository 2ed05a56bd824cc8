"""`metrics.final_score`: formulas, names, and that it is always finite."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol.spec import ChallengeSpec, SpecInvalid, parse_platform_toml
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


def spec(**tables: dict[str, object]) -> ChallengeSpec:
    """A platform.toml's content."""
    return ChallengeSpec.model_validate({"name": "x", "version": "1", **tables})


def test_a_challenges_table_wins_over_the_operators_rule() -> None:
    """`[scoring]` wins key by key, then `[result]`'s range, then the operator's `[scoring_config]`."""
    mine = ScoringRule.named("Linear", "MinMax")
    theirs = spec(
        scoring={"algorithm": "Exponential", "min": 1, "weights": {"speed": 0.5}},
        result={"score_min": 5.0, "score_max": 20.0},
    )
    rule = mine.overridden(theirs)
    assert rule == ScoringRule(Algorithm.EXPONENTIAL, low=1.0, high=20.0, weights={"speed": 0.5})
    assert mine.overridden(spec()) == mine
    robust = spec(scoring={"normalization": "Robust", "centre": 3, "spread": 2})
    assert mine.overridden(robust) == ScoringRule(normalization=Normalization.ROBUST, centre=3.0, spread=2.0)


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ({"algo": "x"}, "did you mean 'algorithm'"),
        ({"algorithm": "linear"}, "'Linear', 'Logarithmic' or 'Exponential'"),
        ({"normalization": "Max"}, "'None', 'MinMax', 'ZScore' or 'Robust'"),
        ({"min": "0"}, "number"),
        ({"min": float("inf")}, "finite"),
        ({"min": 2}, "below the highest"),
        ({"spread": 0}, "greater than 0"),
        ({"weights": 3}, "weights"),
        ({"weights": {"a": True}}, "weights.a"),
        ({"weights": {"a": -1}}, "greater than or equal to 0"),
    ],
)
def test_a_wrong_table_is_refused_with_what_is_known(table: dict[str, object], told: str) -> None:
    """A wrong `[scoring]` is refused when the challenge is, before a job was scored by another rule."""
    text = platform_toml(table)
    with pytest.raises(SpecInvalid) as refused:
        parse_platform_toml(text.encode())
    assert told in str(refused.value)


def platform_toml(table: dict[str, object]) -> str:
    """A platform.toml with this `[scoring]`."""
    lines = ['name = "x"', 'version = "1"', "[scoring]"]
    for key, value in table.items():
        lines += (
            [f"[scoring.{key}]", *(f"{name} = {_toml(inner)}" for name, inner in value.items())]
            if isinstance(value, dict)
            else [f"{key} = {_toml(value)}"]
        )
    return "\n".join(lines) + "\n"


def _toml(value: object) -> str:
    return json.dumps(value).replace("Infinity", "inf")


# Properties

scores = st.floats(-1e6, 1e6)
named = st.dictionaries(st.sampled_from(["a", "b"]), st.floats(0, 100), max_size=2)
measured = st.dictionaries(st.sampled_from(["a", "b", "c"]), scores, max_size=3)
sound = st.builds(
    ScoringRule,
    algorithm=st.sampled_from(Algorithm),
    normalization=st.sampled_from(Normalization),
    low=st.floats(-100, 0),
    high=st.floats(1, 100),
    centre=st.floats(-100, 100),
    spread=st.floats(0.01, 100),
    weights=named,
)


def by_the_book(score: float, metrics: dict[str, float], rule: ScoringRule) -> float:
    """The formulas of docs/challenges.md, written down once more and without care."""
    normalize: Callable[[float], float] = {
        "None": lambda x: x,
        "MinMax": lambda x: max(0, min(1, (x - rule.low) / (rule.high - rule.low))),
        "ZScore": lambda x: max(-10, min(10, (x - rule.centre) / rule.spread)),
        "Robust": lambda x: max(-10, min(10, (x - rule.centre) / rule.spread)),
    }[rule.normalization.value]
    transform: Callable[[float], float] = {
        "Linear": lambda s: s,
        "Logarithmic": lambda s: math.log(1 + max(s, 0)),
        "Exponential": lambda s: math.exp(min(s, 700)),
    }[rule.algorithm.value]
    counted = [(1.0, score)] + [(rule.weights[n], metrics[n]) for n in rule.weights if n in metrics]
    return sum(w * transform(normalize(x)) for w, x in counted) / sum(w for w, _ in counted)


@given(scores, measured, sound)
def test_it_is_what_the_page_says(score: float, metrics: dict[str, float], rule: ScoringRule) -> None:
    """Every rule gives what the formulas of the page give."""
    expected = min(by_the_book(score, metrics, rule), 1e300)
    assert final_score(score, metrics, rule) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(scores, measured, sound)
def test_it_is_a_mean(score: float, metrics: dict[str, float], rule: ScoringRule) -> None:
    """It lies between the least and the greatest of what it is the mean of."""
    alone = replace(rule, weights={})
    parts = [final_score(x, {}, alone) for x in (score, *(metrics[n] for n in rule.weights if n in metrics))]
    final = final_score(score, metrics, rule)
    slack = 1e-9 * max(abs(part) for part in parts)
    assert min(parts) - slack <= final <= max(parts) + slack


@given(scores, measured, sound, st.sampled_from(["score", "a", "b"]), st.floats(0, 1e6))
def test_more_is_never_worth_less(
    score: float, metrics: dict[str, float], rule: ScoringRule, what: str, more: float
) -> None:
    """A score, or a metric with a weight, that rises never lowers the final score."""
    better = dict(metrics)
    if what in better:
        better[what] += more
    raised = score + more if what == "score" else score
    before, after = final_score(score, metrics, rule), final_score(raised, better, rule)
    assert after >= before - 1e-9 * abs(before)


@given(scores, measured, sound, st.dictionaries(st.sampled_from(["x", "y"]), finite))
def test_what_is_not_named_does_not_count(
    score: float, metrics: dict[str, float], rule: ScoringRule, others: dict[str, float]
) -> None:
    """Metrics without a weight change nothing, and the same is always worth the same."""
    assert final_score(score, {**metrics, **others}, rule) == final_score(score, metrics, rule)


@given(scores, st.sampled_from(Algorithm))
def test_min_max_is_bounded(score: float, algorithm: Algorithm) -> None:
    """Under MinMax Linear is within 0 and 1, Logarithmic within 0 and ln 2, Exponential within 1 and e."""
    final = final_score(score, {}, ScoringRule(algorithm))
    least, most = {"Linear": (0, 1), "Logarithmic": (0, math.log(2)), "Exponential": (1, math.e)}[
        algorithm.value
    ]
    assert least <= final <= most
