"""What a test needs of the machine; and `pytest --robustness 12`: the tests of a case of failures."""

from __future__ import annotations

import ctypes
import os
import shutil

import pytest
from hypothesis import HealthCheck, settings

# The first draw of text builds tables of all characters, and others may use the machine: no fault of a test.
# Where CI is set Hypothesis would try the same examples every time: it draws new ones there too.
settings.register_profile(
    "shared", deadline=None, derandomize=False, suppress_health_check=[HealthCheck.too_slow]
)
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


def pytest_runtest_setup(item: pytest.Item) -> None:
    """A test without what it needs is skipped on somebody's own machine, and fails where CI is set."""
    for mark in item.iter_markers("needs"):
        missing = [need for need in mark.args if not _is_here(need)]
        if not missing:
            continue
        why = f" ({mark.kwargs['why']})" if "why" in mark.kwargs else ""
        told = f"needs {', '.join(missing)}{why}: 'make test', run as root, has all that tests need"
        if os.environ.get("CI"):
            pytest.fail(f"{told}; nothing is skipped for it where CI is set", pytrace=False)
        pytest.skip(told)


def _is_here(need: str) -> bool:
    """`root`, the name of a shared library, or of a program."""
    if need == "root":
        return os.getuid() == 0
    if ".so" in need:
        try:
            ctypes.CDLL(need)
        except OSError:
            return False
        return True
    return shutil.which(need, path=f"{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin") is not None
