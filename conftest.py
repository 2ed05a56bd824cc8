"""`pytest --robustness 12`: the tests of a case of the catalogue of failures (docs/testing.md)."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

# The first draw of text builds tables of all characters, and others may use the machine: no fault of a test.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption(
        "--robustness",
        metavar="N[,N...]",
        help="only the tests of these cases of the catalogue of failures (docs/testing.md)",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what is marked with none of the cases that were asked for."""
    asked = config.getoption("robustness")
    if not asked:
        return
    try:
        cases = {int(number) for number in asked.split(",")}
    except ValueError:
        raise pytest.UsageError(f"--robustness: expected numbers like 12 or 3,12; got {asked!r}") from None
    kept = [item for item in items if any(mark.args[0] in cases for mark in item.iter_markers("robustness"))]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept
