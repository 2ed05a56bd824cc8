"""Logs and metrics: directives, forms, redaction, and labels that cannot grow."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from platform_validator.telemetry.logging import BadDirectives, Directives, configure_logging
from platform_validator.telemetry.metrics import Metrics


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    """Logging as it was."""
    with structlog.testing.capture_logs():
        before = structlog.get_config()
    yield
    structlog.configure(**before)


def written(form: str = "json", directives: str = "info", **event: object) -> str:
    """What one event writes."""
    out = io.StringIO()
    configure_logging(Directives(directives), form, out)
    structlog.get_logger("platform_validator.cvm.session").info("happened", **event)
    return out.getvalue()


@pytest.mark.parametrize(
    ("directives", "logger", "level", "allowed"),
    [
        ("info", "platform_validator.jobs", logging.INFO, True),
        ("info", "platform_validator.jobs", logging.DEBUG, False),
        ("warn,platform_validator.jobs=debug", "platform_validator.jobs.lease", logging.DEBUG, True),
        ("warn,platform_validator.jobs=debug", "platform_validator.jobsite", logging.INFO, False),
        (
            "platform_validator=debug,platform_validator.cvm=error",
            "platform_validator.cvm.fleet",
            logging.INFO,
            False,
        ),
        (
            "platform_validator=debug,api_client=info",
            "platform_validator.platform_client.http",
            logging.DEBUG,
            False,
        ),
        ("platform_validator::jobs=debug", "platform_validator.jobs", logging.DEBUG, True),
        ("off", "platform_validator", logging.ERROR, False),
        ("", "platform_validator", logging.INFO, True),
    ],
)
def test_the_longest_named_parent_decides(directives: str, logger: str, level: int, allowed: bool) -> None:
    assert Directives(directives).allows(logger, level) is allowed


@pytest.mark.parametrize("text", ["loud", "a=b", "info,=x"])
def test_other_directives_are_refused(text: str) -> None:
    with pytest.raises(BadDirectives, match="expected a level"):
        Directives(text)


def test_an_event_is_one_json_line() -> None:
    """With its name, level, logger and time."""
    line = json.loads(written(attempt=3))
    assert line.pop("timestamp").endswith("Z")
    assert line == {
        "event": "happened",
        "level": "info",
        "logger": "platform_validator.cvm.session",
        "attempt": 3,
    }


def test_people_get_text() -> None:
    text = written("people", attempt=3)
    assert "happened" in text
    assert "attempt=3" in text
    assert "\x1b" not in text


def test_what_directives_exclude_is_not_written() -> None:
    assert not written(directives="info,platform_validator.cvm=error")


@pytest.mark.parametrize("form", ["json", "people"])
def test_secrets_are_never_written(form: str) -> None:
    """By their names and by their look, however deep."""
    text = written(
        form,
        lease_token="hunter2",
        launch_secret=b"hunter2",
        header="Authorization: Bearer hunter2hunter2",
        nested={"password": "hunter2", "rows": [{"seed": "hunter2"}]},
        found=["bearer hunter2hunter2", "0x" + "ab" * 32],
    )
    assert "hunter2" not in text
    assert "abab" not in text
    assert "redacted" in text


@pytest.mark.parametrize("form", ["json", "people"])
@pytest.mark.robustness(24, "log-forging")
def test_guest_text_forges_no_line(form: str) -> None:
    """Line ends and terminal escapes are shown as what they are; length is capped."""
    text = written(form, line="ok\r\nlevel=error forged\x1b[2J\x00", long="x" * 100_000)
    assert text.count("\n") == 1
    assert not {"\r", "\x1b", "\x00"} & set(text)
    assert len(text) < 10_000


@pytest.mark.parametrize("form", ["json", "people"])
def test_a_traceback_shows_no_locals(form: str) -> None:
    """Keys and launch secrets are in them."""
    out, seed = io.StringIO(), "hunter-three"
    configure_logging(Directives("info"), form, out)
    try:
        int(seed[:0])
    except ValueError:
        structlog.get_logger("x").exception("died")
    assert "ValueError" in out.getvalue()
    assert "int(seed[:0])" in out.getvalue()
    assert seed not in out.getvalue()


def test_an_exception_is_told_without_its_secrets() -> None:
    out = io.StringIO()
    configure_logging(Directives("info"), "json", out)
    try:
        raise ValueError("sent Bearer hunter2hunter2")
    except ValueError:
        structlog.get_logger("x").exception("died")
    line = json.loads(out.getvalue())
    assert "ValueError" in line["exception"]
    assert "hunter2" not in line["exception"]


def test_metrics_are_exposed_and_name_no_job() -> None:
    """Labels are small sets; a challenge that is gone leaves no series."""
    metrics = Metrics()
    metrics.job_ended("challenge-id", "succeeded")
    metrics.slots(1, 4)
    metrics.challenges({"Active": 2, "Failed": 1})
    metrics.challenges({"Active": 3})
    metrics.degraded("vmm", fails=True)
    text = metrics.text().decode()
    assert 'platform_validator_jobs_total{outcome="succeeded"} 1.0' in text
    assert 'platform_validator_job_slots{state="total"} 4.0' in text
    assert 'platform_validator_challenges{state="Active"} 3.0' in text
    assert 'platform_validator_degraded{component="vmm"} 1.0' in text
    assert "Failed" not in text
    assert "challenge-id" not in text


def test_two_daemons_have_their_own_registry() -> None:
    first, second = Metrics(), Metrics()
    first.connected()
    assert "connections_total 1.0" in first.text().decode()
    assert "connections_total 0.0" in second.text().decode()
