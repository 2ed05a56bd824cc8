"""Dynamic values: what a challenge keeps between its jobs, sealed at rest, durable when answered."""

from platform_validator.values.keeper import ValueKeeper
from platform_validator.values.manager import ChallengeValues, DynamicValuesManager

__all__ = ["ChallengeValues", "DynamicValuesManager", "ValueKeeper"]
