"""What is watched, and what the pages say of it, are the same: metrics, alerts, panels, events, reasons."""

from __future__ import annotations

import configparser
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import Counter, Histogram

from platform_validator.config import load_settings
from platform_validator.daemon.board import Board
from platform_validator.daemon.run import Exit
from platform_validator.jobs.capacity import NoCapacity
from platform_validator.store.records import JobOutcome
from platform_validator.telemetry.metrics import OUTCOMES, Metrics

ROOT = Path(__file__).parents[2]
PREFIX = "platform_validator_"
OPERATIONS = (ROOT / "docs/operations.md").read_text()
TROUBLES = (ROOT / "docs/troubleshooting.md").read_text()
ALERTS = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"]
RULES: list[dict[str, Any]] = [rule for group in ALERTS for rule in group["rules"]]
PANELS = json.loads((ROOT / "deploy/grafana/validator.json").read_text())["panels"]
EXPRESSIONS = [rule["expr"] for rule in RULES] + [
    target["expr"] for panel in PANELS for target in panel.get("targets", [])
]
SOURCE = "\n".join(path.read_text() for path in sorted((ROOT / "packages").glob("*/src/**/*.py")))
"""Of all parts: the pages name what the VMM and the SDK say, too."""
_TARGET_LABELS = {"instance", "job"}


def series() -> dict[str, set[str]]:
    """Every series that a validator can expose, without the prefix, with the names of its labels."""
    found: dict[str, set[str]] = {}
    for one in vars(Metrics()).values():
        if not hasattr(one, "_labelnames") or one._labelvalues:
            continue
        name, labels = one._name.removeprefix(PREFIX), set(one._labelnames)
        if isinstance(one, Counter):
            found[f"{name}_total"] = labels
        elif isinstance(one, Histogram):
            found |= {f"{name}_bucket": labels | {"le"}, f"{name}_count": labels, f"{name}_sum": labels}
        else:
            found[name] = labels
    return found


def families() -> dict[str, set[str]]:
    """The same, a histogram by its own name: as people speak of them."""
    found = {}
    for name, labels in series().items():
        if name.endswith(("_count", "_sum")):
            continue
        found[name.removesuffix("_bucket")] = labels - {"le"}
    return found


def test_every_metric_is_in_the_page_with_its_labels_and_nothing_else_is() -> None:
    tables = OPERATIONS.partition("## Metrics")[2]
    told = {}
    for name, labels in re.findall(r"^\| `([a-z_]+)(?:\{([a-z_,]+)\})?` \|", tables, re.MULTILINE):
        told[name] = set(filter(None, labels.split(",")))
    assert told == families()


def test_no_label_can_hold_a_job_or_a_hotkey() -> None:
    """And a challenge's id only where it is taken away again."""
    labels = {label: name for name, names in families().items() for label in names}
    assert not {"job_id", "claim_id", "hotkey", "vm", "cvm", "miner", "validator"} & set(labels)
    taken_away = {"claim_gate_closed", "challenge_state", "challenge_ready_cvms"}
    assert {name for name, names in families().items() if "challenge_id" in names} == taken_away


def test_names_follow_the_conventions() -> None:
    """Lower case, counters end in _total, times in seconds."""
    for name in families():
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", name)
        assert not re.search(r"_(ms|milliseconds|minutes|hours|kb|mib)(_|$)", name)


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_alerts_and_panels_name_series_and_labels_that_exist(expression: str) -> None:
    """Each series is real; each label that selects or groups is one of the series' own, or the target's."""
    known = series()
    named = re.findall(rf"{PREFIX}([a-z_]+)(?:\{{([^}}]*)\}})?", expression)
    assert named or expression.startswith("up{")
    allowed = set(_TARGET_LABELS)
    for name, selected in named:
        assert name in known, f"no series {PREFIX}{name}"
        allowed |= known[name]
        labels = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selected))
        assert labels <= known[name] | _TARGET_LABELS, f"{name} has no label {labels}"
    grouped = re.findall(r"\b(?:by|on|without|ignoring)\s*\(([^)]*)\)", expression)
    assert {label.strip() for each in grouped for label in each.split(",")} <= allowed
    counters = [name for name, _ in named if name.endswith(("_total", "_bucket"))]
    bare = [
        name for name in counters if not re.search(rf"\(\s*{PREFIX}{name}(\{{[^}}]*\}})?[\[)]", expression)
    ]
    assert bare == [], "a counter counts from a start: it is compared by its increase, or with another"


@pytest.mark.parametrize("panel", [one for one in PANELS if "targets" in one], ids=lambda one: one["title"])
def test_panels_speak_of_labels_that_their_series_have(panel: dict[str, Any]) -> None:
    for target in panel["targets"]:
        grouped = re.findall(r"by \(([^)]*)\)", target["expr"])
        labels = {label.strip() for each in grouped for label in each.split(",")}
        assert set(re.findall(r"\{\{([a-z_]+)\}\}", target["legendFormat"])) <= labels


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_an_alert_says_what_happened_and_what_to_do(rule: dict[str, Any]) -> None:
    """Its labels in the texts exist; it is in the page; it waits before it wakes somebody."""
    assert rule["labels"]["severity"] in {"page", "ticket"}
    assert set(rule["annotations"]) == {"summary", "action"}
    assert len(rule["annotations"]["action"]) > 30
    assert rule["alert"] in OPERATIONS
    if rule["labels"]["severity"] == "page":
        assert rule["for"], "a moment wakes nobody"
    known = series()
    names = re.findall(rf"{PREFIX}([a-z_]+)", rule["expr"])
    labels = _TARGET_LABELS.union(*(known[name] for name in names))
    assert set(re.findall(r"\$labels\.([a-z_]+)", str(rule["annotations"]))) <= labels


def test_alerts_and_page_name_the_same_alerts() -> None:
    assert set(re.findall(r"\bValidator[A-Z]\w+", OPERATIONS)) == {rule["alert"] for rule in RULES}


def test_outcomes_are_the_journal_s_words() -> None:
    assert set(OUTCOMES) == {outcome.value for outcome in JobOutcome}
    [row] = [line for line in OPERATIONS.splitlines() if line.startswith("| `jobs_total{outcome}`")]
    assert set(OUTCOMES) <= set(re.findall(r"[a-z_]+", row))


def test_exit_codes_are_the_daemon_s() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", OPERATIONS, re.MULTILINE)}
    assert codes == {int(code) for code in Exit}


def test_every_reason_not_to_claim_has_its_row() -> None:
    table = TROUBLES.partition("## It runs and claims nothing")[2].partition("\n## ")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {reason for row in rows for reason in re.findall(r"`(\w+)`", row)} == {
        reason.value for reason in NoCapacity
    }


def test_every_component_of_health_has_its_row(tmp_path: Path) -> None:
    settings = load_settings(
        {
            "VALIDATOR_HOTKEY": "5H728gLgx4yuCSVEwGCAfLo3RtzTau9F6cTNqNJtrqqjACWq",
            "PLATFORM_BASE_API": "http://nowhere",
        },
        folder=tmp_path,
    )
    components = set(Board(settings, Metrics()).health().components)
    told = set(re.findall(r"/health` `(\w+)`", TROUBLES))
    assert told == components


def test_events_that_the_page_names_are_logged() -> None:
    """In the column of what is seen, a word with an underscore is a reason, an outcome or an event."""
    seen = [line.split("|")[1] for line in TROUBLES.splitlines() if line.startswith("| ")]
    words = {word for cell in seen for word in re.findall(r"`([a-z]+(?:_[a-z]+)+)`", cell)}
    other = {reason.value for reason in NoCapacity} | {outcome.value for outcome in JobOutcome}
    assert len(words) > 30
    for word in words - other - {"platform_api", "lease_lost", "attempt_expired", "invalid_result"}:
        assert f'"{word}"' in SOURCE, f"no event {word}"


def test_the_unit_is_one_that_the_daemon_speaks_to() -> None:
    """Type=notify with a watchdog; codes that a restart does not mend end it; the hotkey is a credential."""
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # the documented way to keep case
    unit.read(ROOT / "deploy/systemd/platform-validator.service")
    service = unit["Service"]
    assert service["Type"] == "notify"
    assert int(service["WatchdogSec"]) >= 30
    unmended = {Exit.CONFIGURATION, Exit.STATE_UNUSABLE, Exit.HOTKEY_IN_USE}
    assert {int(code) for code in service["RestartPreventExitStatus"].split()} == unmended
    assert service["LoadCredential"].startswith("hotkey:")
    assert service["NoNewPrivileges"] == "yes"
