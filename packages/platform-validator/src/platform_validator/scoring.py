"""The operator's view of a score: `metrics.final_score`, computed from the challenge's raw score.

Every value x is normalized to s, transformed to t by the algorithm, and the t of `score` (weight 1) and of
the metrics named in `weights` are averaged by weight. The raw score itself is never changed, and leaderboards
use it. The formulas are in docs/challenges.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TypeVar

from platform_protocol.spec import ChallengeSpec
from platform_validator.errors import ValidatorError

_CLIP = 10.0
_LARGEST = 1e300
NameT = TypeVar("NameT", bound=StrEnum)


class UnknownScoring(ValidatorError):
    """A scoring name that is not known; the message lists the known ones."""


class Algorithm(StrEnum):
    """How a normalized value s counts: s, ln(1+s), or e^s."""

    LINEAR = "Linear"
    LOGARITHMIC = "Logarithmic"
    EXPONENTIAL = "Exponential"


class Normalization(StrEnum):
    """How a raw value becomes s: as it is, within a range, or as a distance from a centre."""

    NONE = "None"
    MIN_MAX = "MinMax"
    Z_SCORE = "ZScore"
    ROBUST = "Robust"


@dataclass(frozen=True, slots=True)
class ScoringRule:
    """A whole rule.

    `low` and `high` belong to MinMax; `centre` and `spread` are mean and standard deviation of ZScore,
    median and interquartile range of Robust.
    """

    algorithm: Algorithm = Algorithm.LINEAR
    normalization: Normalization = Normalization.MIN_MAX
    low: float = 0.0
    high: float = 1.0
    centre: float = 0.0
    spread: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def named(cls, algorithm: str, normalization: str) -> ScoringRule:
        """A rule from the names of the operator's configuration.

        Raises:
            UnknownScoring: One of the names is not known.
        """
        return cls(
            algorithm=_known(Algorithm, "algorithm", algorithm),
            normalization=_known(Normalization, "normalization", normalization),
        )

    def overridden(self, spec: ChallengeSpec) -> ScoringRule:
        """This rule under a challenge's `[scoring]`, which wins key by key, and its range of scores."""
        scoring, (low, high) = spec.scoring, spec.score_range
        return ScoringRule(
            algorithm=self.algorithm if scoring.algorithm is None else Algorithm(scoring.algorithm),
            normalization=(
                self.normalization if scoring.normalization is None else Normalization(scoring.normalization)
            ),
            low=self.low if low is None else low,
            high=self.high if high is None else high,
            centre=self.centre if scoring.centre is None else scoring.centre,
            spread=self.spread if scoring.spread is None else scoring.spread,
            weights={**self.weights, **scoring.weights},
        )


def _known(names: type[NameT], what: str, given: str) -> NameT:
    try:
        return names(given)
    except ValueError:
        known = ", ".join(name.value for name in names)
        raise UnknownScoring(f"unknown scoring {what} {given!r}: expected one of {known}") from None


def final_score(score: float, metrics: Mapping[str, float], rule: ScoringRule) -> float:
    """The operator's score, always finite. Metrics that are absent or not named do not count."""
    total = _transformed(_normalized(score, rule), rule.algorithm)
    weight = 1.0
    for name, share in rule.weights.items():
        if name in metrics and share > 0 and math.isfinite(share):
            total += share * _transformed(_normalized(metrics[name], rule), rule.algorithm)
            weight += share
    return _finite(total / weight)


def _normalized(value: float, rule: ScoringRule) -> float:
    value = _finite(float(value))
    match rule.normalization:
        case Normalization.NONE:
            return value
        case Normalization.MIN_MAX:
            width = rule.high - rule.low
            return min(max((value - rule.low) / width, 0.0), 1.0) if width > 0 else 0.0
        case Normalization.Z_SCORE | Normalization.ROBUST:
            if rule.spread <= 0:
                return 0.0
            return min(max((value - rule.centre) / rule.spread, -_CLIP), _CLIP)


def _transformed(value: float, algorithm: Algorithm) -> float:
    match algorithm:
        case Algorithm.LINEAR:
            return value
        case Algorithm.LOGARITHMIC:
            return math.log1p(max(value, 0.0))
        case Algorithm.EXPONENTIAL:
            return math.exp(min(value, 700.0))


def _finite(value: float) -> float:
    if math.isnan(value):
        return 0.0
    return min(max(value, -_LARGEST), _LARGEST)
