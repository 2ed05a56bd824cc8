"""Prometheus metrics of the daemon. No job id and no hotkey is ever a label."""

from __future__ import annotations

import re
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

_PREFIX = "platform_validator"
OUTCOMES = ("succeeded", "failed", "timeout", "cancelled", "infra_error", "lease_lost", "sandbox_died")
"""How a job can end here: the words of the journal, the logs and the Platform API."""
RENEWALS = ("granted", "refused", "unanswered")
SOURCES = ("push", "poll", "local")
WHERE = ("start", "sweep")
DIRECTIONS = ("sent", "received")
SAMPLES = ("sampled", "unknown", "failed")
OTHER = "other"
_CODE = re.compile(r"[a-z][a-z0-9_]{0,40}")
_MOST_ANSWERS = 40
"""Codes of refusals are the Platform API's words: more than these are counted as one."""
_STAGES = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600, 1800, 3600)


class Metrics:
    """One registry a daemon; satisfies the port that jobs report to."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._stage = self._histogram("job_stage_seconds", "Time that jobs spend in a stage", "stage")
        self._jobs = self._counter("jobs", "Jobs that ended here, by outcome", "outcome")
        self._claims = self._counter("claims", "Claims by the API's answer", "answer")
        self._passes = self._counter("passes", "Passes of the job loop, by what woke it", "source")
        self._passed_over = self._counter("jobs_passed_over", "Pending jobs not claimed, by reason", "reason")
        self._deliveries = self._counter("deliveries", "Results sent, by the API's answer", "answer")
        self._slots = self._gauge("job_slots", "Job slots", "state")
        self._outbox = self._gauge("outbox_results", "Results not yet acknowledged")
        self._oldest = self._gauge("outbox_oldest_seconds", "Age of the oldest of them")
        self._quota = self._gauge("quota", "Resources reserved and allowed", "resource", "state")
        self._uses = self._gauge("quota_use", "Resources reserved, by what CVMs are for", "use", "resource")
        self._hosts = self._gauge("host_closed", "1 while a VMM host takes no CVMs", "host")
        self._on_hosts = self._gauge("host_quota", "Resources reserved on a VMM host", "host", "resource")
        self._cvms = self._gauge("cvms", "CVMs by stage", "stage")
        self._undestroyed = self._gauge("cvms_not_destroyed", "CVMs whose destruction failed so far")
        self._samples = self._counter(
            "usage_samples", "Times that a VMM was asked what a CVM uses, by answer", "answer"
        )
        self._cpu = self._counter("cvm_cpu_seconds", "CPU time of CVMs, as sampled")
        self._network = self._counter("cvm_network_bytes", "Bytes into and out of CVMs, as sampled")
        self._memory = self._gauge("cvm_memory_bytes", "Memory that CVMs use together, as sampled")
        self._peak = self._gauge("cvm_memory_peak_bytes", "The most memory that one of the CVMs used")
        self._disk = self._gauge("cvm_disk_bytes", "What the disks of CVMs hold together, as sampled")
        self._egress_open = self._gauge("egress_open_connections", "Connections of CVMs to the outside now")
        self._egress = self._counter("egress_connections", "Connections of CVMs to the outside")
        self._egress_bytes = self._counter(
            "egress_bytes", "Bytes of CVMs to and from the outside", "direction"
        )
        self._egress_refused = self._counter(
            "egress_refused", "What CVMs were refused outside, by reason", "reason"
        )
        self._egress_died = self._counter("egress_restarts", "Times that the egress proxy ended by itself")
        self._challenges = self._gauge("challenges", "Challenges by state", "state")
        self._challenge = self._gauge(
            "challenge_state", "1 for the state that a challenge shows", "challenge_id", "state"
        )
        self._instances = self._counter("challenge_transitions", "States that instances entered", "state")
        self._ready = self._gauge("challenge_ready_cvms", "CVMs that wait ready for jobs", "challenge_id")
        self._degraded = self._gauge("degraded", "1 while a component fails", "component")
        self._lag = self._gauge("loop_lag_seconds", "How late the event loop runs")
        self._restarts = self._counter("background_restarts", "Loops that died and were restarted", "loop")
        self._dispatched = self._counter(
            "claims_dispatched", "Claims granted, by what woke the pass", "source"
        )
        self._queue = self._histogram(
            "job_queue_wait_seconds", "Time that jobs were pending before a claim here"
        )
        self._renewals = self._counter("lease_renewals", "Lease renewals by answer", "answer")
        self._recovered = self._counter(
            "recovered_jobs", "Open jobs found at start, by what became of them", "fate"
        )
        self._orphans = self._counter("orphans_found", "CVMs of ours that nobody held", "where")
        self._reclaimed = self._counter("orphans_reclaimed", "Those of them that are gone", "where")
        self._strays = self._gauge("stray_vms", "VMs with our state id that are not in our journal")
        self._attestations = self._counter(
            "attestations", "Quotes judged, by answer and the check that refused", "answer", "check"
        )
        self._store_failures = self._counter("store_failures", "Journal writes that failed")
        self._gates = self._gauge(
            "claim_gate_closed", "1 while no job of a challenge is claimed", "challenge_id"
        )
        self._answered = self._gauge(
            "platform_last_contact_timestamp_seconds", "When the Platform API last answered"
        )
        self._connected = self._gauge(
            "notifications_connected", "1 while pushes can come, 0 while the poll alone brings jobs"
        )
        self._reconnects = self._counter("notification_connections", "WebSocket connections opened")
        self._answers: set[str] = set()
        self._begin_at_zero()

    def _begin_at_zero(self) -> None:
        """A counter that first appears at 1 has not increased, for Prometheus: what is known begins at 0."""
        for counter, values in (
            (self._jobs, OUTCOMES),
            (self._claims, ("granted", "unanswered")),
            (self._deliveries, ("accepted", "unanswered")),
            (self._renewals, RENEWALS),
            (self._dispatched, SOURCES),
            (self._passes, SOURCES),
            (self._samples, SAMPLES),
            (self._orphans, WHERE),
            (self._reclaimed, WHERE),
            (self._egress_bytes, DIRECTIONS),
        ):
            for value in values:
                counter.labels(value)
        for answer in ("accepted", "unavailable", "version_1"):
            self._attestations.labels(answer, "")
        self._used, self._total = self._slots.labels("used"), self._slots.labels("total")
        # Counted at every pass, and at every sample of every CVM.
        self._passes_by = {source: self._passes.labels(source) for source in SOURCES}
        self._samples_by = {answer: self._samples.labels(answer) for answer in SAMPLES}

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

    def attested(self, answer: str, check: str) -> None:
        """A quote was judged: accepted, refused by a check, unavailable; or not asked for in version 1."""
        self._attestations.labels(answer, str(check)).inc()

    # What jobs report

    def stage_took(self, stage: str, seconds: float) -> None:
        """A job left a stage."""
        self._stage.labels(str(stage)).observe(seconds)

    def job_ended(self, challenge_id: str, outcome: str) -> None:
        """A job ended here."""
        del challenge_id
        self._jobs.labels(str(outcome)).inc()

    def claim_answered(self, answer: str) -> None:
        """A claim was answered."""
        self._claims.labels(self._known(answer)).inc()

    def pass_made(self, source: str) -> None:
        """The job loop made a pass."""
        self._passes_by[source].inc()

    def passed_over(self, reason: str, jobs: int) -> None:
        """So many pending jobs were not claimed in a pass."""
        self._passed_over.labels(str(reason)).inc(jobs)

    def slots(self, used: int, total: int) -> None:
        """Job slots now."""
        self._used.set(used)
        self._total.set(total)

    def outbox(self, depth: int, oldest_s: float) -> None:
        """Undelivered results now."""
        self._outbox.set(depth)
        self._oldest.set(oldest_s)

    def delivery(self, answer: str) -> None:
        """A result was sent."""
        self._deliveries.labels(self._known(answer)).inc()

    def claim_dispatched(self, source: str) -> None:
        """A claim was granted."""
        self._dispatched.labels(source).inc()

    def queued(self, seconds: float) -> None:
        """How long a job had waited."""
        self._queue.observe(seconds)

    def lease_renewed(self, answer: str) -> None:
        """A renewal was `granted`, `refused` or `unanswered`. Any thread may say so."""
        self._renewals.labels(answer).inc()
        if answer != "unanswered":
            self.platform_contact()

    def recovered(self, fate: str, jobs: int) -> None:
        """Open jobs were found at start."""
        self._recovered.labels(fate).inc(jobs)

    # What the daemon reports

    def platform_contact(self) -> None:
        """The Platform API answered now, whatever it said. Any thread may say so."""
        self._answered.set_to_current_time()

    def store_failed(self) -> None:
        """A transaction of the journal failed. Any thread may say so."""
        self._store_failures.inc()

    def gates(self, closed: Mapping[str, bool]) -> None:
        """The claim gate of each challenge that is listed now; one that is gone leaves no series."""
        self._gates.clear()
        for challenge_id, is_closed in closed.items():
            self._gates.labels(challenge_id).set(int(is_closed))

    def orphan_found(self, where: str) -> None:
        """A CVM that nobody holds was found, at `start` or by the `sweep`."""
        self._orphans.labels(where).inc()

    def reclaimed(self, where: str) -> None:
        """Such a CVM is gone now."""
        self._reclaimed.labels(where).inc()

    def strays(self, count: int) -> None:
        """VMs with our state id that our journal does not know, now."""
        self._strays.set(count)

    def quota(self, resource: str, used: int, limit: int) -> None:
        """A resource's account now."""
        self._quota.labels(resource, "used").set(used)
        self._quota.labels(resource, "limit").set(limit)

    def quota_use(self, use: str, counts: dict[str, int]) -> None:
        """What challenge, job or ready CVMs hold now."""
        for resource, used in counts.items():
            self._uses.labels(use, resource).set(used)

    def host(self, name: str, *, closed: bool, used: dict[str, int]) -> None:
        """A VMM host now: whether it takes CVMs, and what is reserved on it."""
        self._hosts.labels(name).set(int(closed))
        for resource, count in used.items():
            self._on_hosts.labels(name, resource).set(count)

    def cvms(self, by_stage: dict[str, int]) -> None:
        """CVMs now."""
        self._cvms.clear()
        for stage, count in by_stage.items():
            self._cvms.labels(stage).set(count)

    def usage_sampled(self, answer: str, cpu_time_ms: int, network_bytes: int) -> None:
        """A VMM was asked what a CVM uses: `sampled`, `unknown` or `failed`, and what grew since before."""
        self._samples_by[answer].inc()
        self._cpu.inc(cpu_time_ms / 1000)
        self._network.inc(network_bytes)

    def cvms_use(self, *, memory_bytes: int, memory_peak_bytes: int, disk_bytes: int) -> None:
        """What the CVMs that are there use together; of peaks the highest."""
        self._memory.set(memory_bytes)
        self._peak.set(memory_peak_bytes)
        self._disk.set(disk_bytes)

    def egress_open(self, connections: int) -> None:
        """Connections of CVMs to the outside now."""
        self._egress_open.set(connections)

    def egress_used(self, connections: int, sent: int, received: int) -> None:
        """Connections and bytes of CVMs to the outside, since the last word."""
        self._egress.inc(connections)
        self._egress_bytes.labels("sent").inc(sent)
        self._egress_bytes.labels("received").inc(received)

    def egress_refused(self, reason: str, more: int) -> None:
        """So many more were refused, for one of the proxy's fixed reasons."""
        self._egress_refused.labels(reason).inc(more)

    def egress_died(self) -> None:
        """The egress proxy ended by itself."""
        self._egress_died.inc()

    def not_destroyed(self, count: int) -> None:
        """CVMs whose destruction failed at least once, and is tried again, now."""
        self._undestroyed.set(count)

    def challenges(self, by_state: dict[str, int]) -> None:
        """Challenges now."""
        self._challenges.clear()
        for state, count in by_state.items():
            self._challenges.labels(state).set(count)

    def each_challenge(self, shown: Mapping[str, tuple[str, int]]) -> None:
        """State and ready CVMs of each challenge now; one that is gone leaves no series."""
        self._challenge.clear()
        self._ready.clear()
        for challenge_id, (state, ready) in shown.items():
            self._challenge.labels(challenge_id, state).set(1)
            self._ready.labels(challenge_id).set(ready)

    def instance_entered(self, state: str) -> None:
        """An instance of a challenge entered a state."""
        self._instances.labels(state).inc()

    def degraded(self, component: str, *, fails: bool) -> None:
        """A component's health now."""
        self._degraded.labels(component).set(int(fails))

    def loop_lag(self, seconds: float) -> None:
        """How late the loop woke a sleeper."""
        self._lag.set(seconds)

    def watched(self, loop: str) -> None:
        """A background loop that is restarted should it die."""
        self._restarts.labels(loop)

    def restarted(self, loop: str) -> None:
        """A background loop died and was started again."""
        self._restarts.labels(loop).inc()

    def connected(self) -> None:
        """A notification WebSocket was opened: an answer as well."""
        self._reconnects.inc()
        self.platform_contact()

    def notified(self, *, connected: bool) -> None:
        """Whether the WebSocket is open now."""
        self._connected.set(int(connected))

    def _known(self, answer: str) -> str:
        if answer not in self._answers:
            if len(self._answers) >= _MOST_ANSWERS or not _CODE.fullmatch(answer):
                return OTHER
            self._answers.add(answer)
        return answer

    def _counter(self, name: str, meaning: str, *labels: str) -> Counter:
        return Counter(f"{_PREFIX}_{name}", meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str, *labels: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", meaning, labels, registry=self.registry)

    def _histogram(self, name: str, meaning: str, *labels: str) -> Histogram:
        return Histogram(f"{_PREFIX}_{name}", meaning, labels, registry=self.registry, buckets=_STAGES)
