"""What the web and the command line see of the daemon: one place that reads all components."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Callable
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from platform_protocol.ids import ChallengeId
from platform_protocol.resources import Resources
from platform_protocol.spec import ChallengeSpec
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.challenges.effective import effective
from platform_validator.challenges.git_source import GitSource
from platform_validator.config import Settings
from platform_validator.config.promises import promised_beyond
from platform_validator.cvm.plan import CvmPlan
from platform_validator.daemon.accounts import KINDS, counts, shown_host, shown_quota
from platform_validator.daemon.parts import Components
from platform_validator.egress.supervisor import EgressSupervisor
from platform_validator.machine import machine_resources
from platform_validator.platform_client.notifications import NotificationLoop
from platform_validator.scoring import ScoringRule
from platform_validator.telemetry.metrics import Metrics
from platform_validator.web.views import Health


class Board:
    """The Views of a daemon; grows as the startup sequence goes on."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.settings = settings
        self._metrics = metrics
        self.phase = "starting"
        self.components: Components | None = None
        self.source: GitSource | None = None
        self.notifications: NotificationLoop | None = None
        self.journal: Callable[[], str | None] = lambda: None
        self.policy: AttestationPolicy | None = None
        self.egress: EgressSupervisor | None = None
        self.silent: Callable[[], dict[str, float]] = dict
        self.extra: dict[str, Any] = {}
        self._has: Resources | None = None

    def health(self) -> Health:
        """See the port."""
        reasons = self._reasons()
        words = {name: "fails" if reason else "ok" for name, reason in reasons.items()}
        return Health(self.phase, words, {name: reason for name, reason in reasons.items() if reason})

    def metrics(self) -> tuple[bytes, str] | None:
        """See the port."""
        if not self.settings["http.metrics"]:
            return None
        self._measure()
        return self._metrics.text(), self._metrics.content_type

    def bundle(self, sha256: str, authorization: str) -> Path | None:
        """See the port."""
        parts = self.components
        if parts is None or self.source is None or not parts.fleet.may_fetch_bundle(authorization, sha256):
            return None
        path = self.source.bundle_path(sha256)
        return path if path.exists() else None

    def status(self) -> dict[str, Any]:
        """See the port."""
        health = self.health()
        shown: dict[str, Any] = {
            "status": health.status,
            "reasons": health.reasons,
            "pid": os.getpid(),
            "hotkey": self.settings["validator.hotkey"],
            "platform_api": self.settings["platform.base_api"],
            "vmm": ", ".join(host.url for host in self.settings.hosts),
            "vmm_version": "" if self.components is None else self.components.fleet.hosts.version,
            "isolation_level": self.settings.level.value,
            "simulated_attestation": bool(self.settings["attestation.allow_simulated"]),
            **self.extra,
        }
        parts = self.components
        if parts is None:
            return shown
        active = parts.jobs.views()
        shown |= {
            "claiming": parts.jobs.claiming,
            "slots": {"used": len(active), "total": self.settings["jobs.max_concurrent"]},
            **shown_quota(parts.quota.view()),
            "waiting": plain(parts.jobs.waiting),
            "warnings": self.warnings(),
            "attestation": self.policy.view() if self.policy is not None else None,
            "egress": None if self.egress is None else self.egress.view(),
            "outbox": parts.outbox.depth,
            "active_jobs": plain(active),
            "challenges": self.challenges(),
            "cvms": self.cvms(),
            "hosts": self.hosts(),
            "strays": list(parts.fleet.strays),
        }
        if self.notifications is not None:
            shown["notifications"] = plain(self.notifications.view())
        return shown

    def warnings(self) -> list[str]:
        """Limits that this machine cannot keep, where VMMs are on it; what attestation does not insist on."""
        of_policy = self.policy.warnings() if self.policy is not None else []
        return [*promised_beyond(self.settings, self._machine()), *of_policy]

    def _machine(self) -> Resources:
        if self._has is None:
            self._has = machine_resources(self.settings.db_path.parent)
        return self._has

    def line(self) -> str:
        """One line for the service manager."""
        health = self.health()
        failing = ", ".join(sorted(health.reasons))
        parts = self.components
        jobs = len(parts.jobs.views()) if parts is not None else 0
        return f"{health.status}, {jobs} jobs" + (f": {failing} failing" if failing else "")

    async def jobs(self, limit: int) -> list[dict[str, Any]]:
        """See the port."""
        if self.components is None:
            return []
        rows: list[dict[str, Any]] = plain(await self.components.jobs.recent(limit))
        return rows

    def cvms(self) -> list[dict[str, Any]]:
        """See the port."""
        rows: list[dict[str, Any]] = plain(self.components.fleet.views()) if self.components else []
        return rows

    def hosts(self) -> list[dict[str, Any]]:
        """See the port."""
        if self.components is None:
            return []
        accounts = self.components.quota.view().by_host
        return [shown_host(one, accounts[one.name]) for one in self.components.fleet.hosts.status()]

    def challenges(self) -> list[dict[str, Any]]:
        """See the port."""
        rows: list[dict[str, Any]] = plain(self.components.challenges.views()) if self.components else []
        return rows

    async def challenge(self, named: str) -> dict[str, Any] | None:
        """See the port."""
        for found in self.challenges():
            if self.components is not None and named in (found["id"], found["name"]):
                challenge_id = ChallengeId(found["id"])
                history = await self.components.challenges.history(challenge_id)
                in_force = self._in_force(self.components.challenges.planned(challenge_id))
                return found | {"effective": in_force, "history": plain(history)}
        return None

    def _in_force(self, planned: tuple[ChallengeSpec, CvmPlan] | None) -> dict[str, Any] | None:
        if planned is None:
            return None
        settings, (spec, plan) = self.settings, planned
        rule = ScoringRule.named(
            settings["scoring_config.algorithm"], settings["scoring_config.normalization"]
        ).overridden(spec)
        shown: dict[str, Any] = plain(
            effective(
                spec,
                plan,
                limits=settings.limits,
                policy=settings.network,
                filesystem=settings.filesystem,
                scoring=plain(rule),
            )
        )
        return shown

    def _reasons(self) -> dict[str, str | None]:
        parts = self.components
        platform = None if parts is None else parts.challenges.last_error or parts.jobs.last_error
        notifications = self.notifications.view() if self.notifications is not None else None
        push = None
        if notifications is not None and not notifications.connected:
            push = notifications.last_error or "not connected yet"
        return {
            "platform_api": platform,
            "notifications": push,
            "vmm": "not asked yet" if parts is None else parts.fleet.hosts.error,
            "fleet": None if parts is None else parts.fleet.last_error,
            "attestation": self.policy.trouble() if self.policy is not None else None,
            "egress": None if self.egress is None else self.egress.error,
            "journal": self.journal(),
            "loops": self._stuck(),
        }

    def _stuck(self) -> str | None:
        silent = self.silent()
        return ", ".join(f"{name} has not turned for {age:.0f} s" for name, age in silent.items()) or None

    def _measure(self) -> None:
        for name, reason in self._reasons().items():
            self._metrics.degraded(name, fails=reason is not None)
        if self.notifications is not None:
            self._metrics.notified(connected=self.notifications.view().connected)
        parts = self.components
        if parts is None:
            return
        listed = parts.challenges.views()
        closed = parts.jobs.closed_gates()
        self._metrics.gates({view.id: closed.get(view.id, False) for view in listed})
        quota = parts.quota.view()
        for kind in KINDS:
            self._metrics.quota(kind, getattr(quota.used, kind), getattr(quota.limits.resources, kind))
        self._metrics.quota("cvms", quota.cvms, quota.max_cvms)
        shut = {host.name for host in parts.fleet.hosts.states() if host.closed is not None}
        for name, account in quota.by_host.items():
            used = counts(account.used, account.cvms)
            self._metrics.host(name, closed=name in shut, used=used)
        for use, part in quota.by_use.items():
            self._metrics.quota_use(use.value, counts(part.used, part.cvms))
        if self.egress is not None:
            self._metrics.egress_open(self.egress.open)
        cvms = parts.fleet.views()
        self._metrics.cvms(dict(Counter(view.stage for view in cvms)))
        samples = [view.usage for view in cvms if view.usage is not None]
        self._metrics.cvms_use(
            memory_bytes=sum(one.memory_bytes or 0 for one in samples),
            memory_peak_bytes=max((one.memory_peak_bytes or 0 for one in samples), default=0),
            disk_bytes=sum(one.disk_bytes or 0 for one in samples),
        )
        self._metrics.not_destroyed(sum(view.tries > 0 for view in cvms))
        self._metrics.strays(len(parts.fleet.strays))
        self._metrics.challenges(dict(Counter(view.state.value for view in listed)))
        self._metrics.each_challenge(
            {view.id: (view.state.value, view.serving.ready if view.serving else 0) for view in listed}
        )


def plain(value: Any) -> Any:
    """Dataclasses, enums and times as JSON."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(one) for one in value]
    if isinstance(value, dict):
        return {str(key): plain(one) for key, one in value.items()}
    return value if isinstance(value, str | int | float | bool | None) else str(value)
