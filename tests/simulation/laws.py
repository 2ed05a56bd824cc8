"""The invariants, watched while it happens: each port tells what it saw, each law is checked at once."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.simulation.world import Book, Life

from platform_protocol.ids import ClaimId, JobId, LeaseToken, VmName
from platform_protocol.platform_messages import Claim, ResultBody
from platform_protocol.resources import Resources


@dataclass(frozen=True, slots=True)
class Script:
    """What the guest does with a job: `score`, `error`, `hang`, or `kill` its CVM, after `lasts` seconds."""

    does: str
    score: float
    lasts: float


@dataclass(slots=True)
class Laws:
    """What is known of the whole world, and what may never be seen in it."""

    book: Book
    calm: bool = False
    scripts: dict[JobId, Script] = field(default_factory=dict)
    granted: dict[tuple[JobId, int], tuple[str, LeaseToken]] = field(default_factory=dict)
    newest: dict[JobId, LeaseToken] = field(default_factory=dict)
    accepted: dict[tuple[JobId, int], str] = field(default_factory=dict)
    waiting: dict[int, dict[ClaimId, bytes]] = field(default_factory=dict)
    stored: set[tuple[int, JobId, int]] = field(default_factory=set)
    claims: dict[int, dict[ClaimId, JobId]] = field(default_factory=dict)
    intents: dict[int, set[VmName]] = field(default_factory=dict)

    # The Platform API's side

    def grants(self, hotkey: str, claim: Claim) -> None:
        """A claim was granted, for the first time or again. I4: where nothing is wrong, one is enough."""
        if self.calm and claim.attempt != 1 and self.scripts[claim.id].does != "kill":
            self.book.violated("I4", f"nothing was wrong, and {claim.id} took {claim.attempt} attempts")
        self.granted[claim.id, claim.attempt] = hotkey, claim.lease.token
        self.newest[claim.id] = claim.lease.token
        self.book.counts["claims"] += 1

    def accepts(self, job_id: JobId, result: ResultBody, hotkey: str) -> None:
        """I1 and I9: one result a job and attempt, under the newest token, and what the guest really did."""
        key = job_id, result.attempt
        if key in self.accepted:
            self.book.violated("I1", f"two results for {job_id} attempt {result.attempt}")
        if self.newest.get(job_id) != result.lease_token:
            self.book.violated("I1", f"{job_id}: accepted under a token that is not the newest")
        if self.granted.get(key, ("", ""))[0] != hotkey:
            self.book.violated("I1", f"{job_id} attempt {result.attempt}: accepted from {hotkey}")
        self.accepted[key] = result.outcome.value
        self.book.counts["accepted"] += 1
        script = self.scripts[job_id]
        right = {
            "score": ("succeeded", script.score),
            "error": ("failed", 0.0),
            "hang": ("timeout", 0.0),
        }.get(script.does)
        if (result.outcome.value, result.score) != right:
            self.book.violated(
                "I9", f"{job_id} should {script.does}, and was scored {result.outcome.value} {result.score}"
            )

    # The validator's journal

    def journaled_claim(self, node: int, claim_id: ClaimId, job_id: JobId) -> None:
        """A claim was written down."""
        self.claims.setdefault(node, {})[claim_id] = job_id

    def claim_sent(self, node: int, claim_id: ClaimId) -> None:
        """I2: journaled before it is sent."""
        if claim_id not in self.claims.get(node, ()):
            self.book.violated("I2", f"claim {claim_id} was sent before it was journaled")

    def result_stored(self, node: int, claim_id: ClaimId, body: bytes) -> None:
        """A result is durable."""
        result = ResultBody.model_validate_json(body)
        self.stored.add((node, self.claims[node][claim_id], result.attempt))
        self.waiting.setdefault(node, {}).setdefault(claim_id, body)
        self.book.counts["stored"] += 1

    def result_sent(self, node: int, body: bytes) -> None:
        """I2: stored before it is sent."""
        if body not in self.waiting.get(node, {}).values():
            self.book.violated("I2", "a result was sent that is not in the outbox")

    def result_left(self, node: int, claim_id: ClaimId, *, justified: bool, why: str) -> None:
        """I6: it leaves the outbox only when acknowledged or definitively refused."""
        if self.waiting.get(node, {}).pop(claim_id, None) is not None and not justified:
            self.book.violated("I6", f"a result left the outbox as {why}, which the Platform API never said")

    def job_ended(self, node: int, claim_id: ClaimId) -> None:
        """I6: a job whose result waits does not end."""
        if claim_id in self.waiting.get(node, {}):
            self.book.violated("I6", f"claim {claim_id} ended while its result waits")

    def intended(self, node: int, name: VmName) -> None:
        """A CVM was written down."""
        self.intents.setdefault(node, set()).add(name)

    # The VMM's and the guest's side

    def creates(
        self, node: int, name: VmName, running: list[Resources], limits: Resources, most: int
    ) -> None:
        """I2 and I10: journaled before CreateVm; what runs stays within the limits."""
        if name not in self.intents.get(node, ()):
            self.book.violated("I2", f"{name} was made before its intent was journaled")
        for kind in ("cpu_cores", "memory_mb", "disk_mb"):
            used, limit = sum(getattr(one, kind) for one in running), getattr(limits, kind)
            if used > limit:
                self.book.violated("I10", f"validator {node}: {used} {kind} run, {limit} allowed")
        if len(running) > most:
            self.book.violated("I10", f"validator {node}: {len(running)} CVMs run, {most} allowed")

    def touches(self, node: int, name: VmName) -> None:
        """I3: only what was made by this validator is stopped or removed."""
        if name not in self.intents.get(node, ()):
            self.book.violated("I3", f"validator {node} touched {name}, which is somebody else's")

    def destroys(self, life: Life, name: VmName) -> None:
        """I7: destroying holds no slot; a job whose result is stored has left its own by then."""
        if name in life.stored_in_slots():
            self.book.violated("I7", f"{name} is being destroyed, and its job still holds a slot")

    def runs(self, life: Life, hotkey: str, job_id: JobId, attempt: int) -> None:
        """I5: a guest runs a job only under a claim that was granted to this validator."""
        if self.granted.get((job_id, attempt), ("", ""))[0] != hotkey:
            self.book.violated("I5", f"{hotkey} runs {job_id} attempt {attempt} without a claim")
        self.book.counts["runs"] += 1
        self.book.note(f"run {life.node} {job_id} {attempt}")

    def adopts(self, life: Life, job_id: JobId) -> None:
        """After a restart only an answered renewal lets a job go on."""
        if job_id not in life.grants:
            self.book.violated("lease", f"{job_id} went on after a restart without an answered renewal")
        self.book.counts["adopted"] += 1

    def forgets(self, node: int, job_id: JobId, attempt: int) -> None:
        """I2: the SDK may forget a result only when it is durable here."""
        if (node, job_id, attempt) not in self.stored:
            self.book.violated("I2", f"{job_id}: acknowledged to the SDK before it was stored")
