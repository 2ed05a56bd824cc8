"""An attack, the control that shows it is no dud, and the facts by which both are judged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

TOKEN = "@TOKEN@"
"""In a program: replaced by a word that no other attempt has."""
FAILED = frozenset({"failed"})
SUCCEEDED = frozenset({"succeeded"})
ENDED = frozenset({"succeeded", "failed", "timeout"})
"""Of a hostile submission: whatever it does, it is never infrastructure that failed (I9)."""
ANY = ENDED | {"infra_error", "sandbox_died"}
"""Of a hostile challenge: it is trusted to run, and may break its own CVM."""

By = Literal["submission", "challenge"]
Setting = Literal["whole system", "one part"]


@dataclass(slots=True)
class Guest:
    """What the host saw of one VM, from outside, while it ran; sizes in bytes.

    `submission_s`: for how long any one process of the submission was seen alive.
    """

    processes: int = 0
    memory: int = 0
    console: int = 0
    submission_s: float = 0.0
    largest_file: int = 0
    inodes: int = 0
    raw_sockets: int = 0


@dataclass(slots=True)
class Facts:
    """What came of one attempt.

    Args:
        outcome: Of its job, by the Platform API's database.
        score: That it accepted.
        error: That it was told.
        logs: The job's, as the Platform API keeps them.
        guest: What the host saw.
        found: Canaries that left the VM: in the result, in logs, at a trap.
        trapped: What arrived at a trap from this attempt.
        opened: How often anybody on the host opened the bait that guests' links point at.
        escaped: Files on the host that carry the attempt's token.
        validator_bytes: By which the validator's largest memory grew.
        stored: Bytes of the result that the validator stored.
        other_score: The score that the job beside it was given, which the attack tried to decide.
        page: What the validator wrote to its log meanwhile.
        answers_s: The longest that the validator's listener took to say that it lives.
        connections: The most that it held at once.
    """

    outcome: str = ""
    score: float | None = None
    error: str = ""
    logs: str = ""
    guest: Guest = field(default_factory=Guest)
    found: tuple[str, ...] = ()
    trapped: tuple[str, ...] = ()
    opened: int = 0
    escaped: tuple[str, ...] = ()
    validator_bytes: int = 0
    stored: int = 0
    other_score: float | None = None
    page: str = ""
    answers_s: float = 0.0
    connections: int = 0

    def told(self, word: str) -> str:
        """What the evaluating challenge, which is trusted, says under this word; empty: nothing."""
        lines = [line.partition(f"arena {word}: ")[2] for line in self.logs.splitlines()]
        return next((line for line in reversed(lines) if line), "")

    def number(self, word: str) -> float:
        """The same as a number; 0 where it says none."""
        try:
            return float(self.told(word))
        except ValueError:
            return 0.0


@dataclass(frozen=True, slots=True)
class Control:
    """One guard, widened. `guard` names it for `tests/hostile/widening`; `means` says what is widened.

    `apart`: for a guard that sits in one function, and takes the place of the whole system: whether the
    attack succeeds against it.
    """

    guard: str
    means: str
    apart: Callable[[], bool] | None = None

    @property
    def setting(self) -> Setting:
        """Where it runs."""
        return "whole system" if self.apart is None else "one part"


@dataclass(frozen=True, slots=True)
class Attack:
    """One attack.

    Args:
        name: As it is shown.
        case: Of the catalogue of failures.
        clause: Its line there.
        by: Who attacks: a submission, or a challenge that is hostile itself.
        program: The submission's main.py, or what the challenge runs in the SDK's process.
        control: The guard that is widened to see that it would succeed.
        won: Whether the facts show that it did.
        outcomes: Of its job, when it is contained.
        archive: Makes what is uploaded instead of an archive of the program; given the token.
        payload: What a challenge is told beside its program.
        filename: Under which it is uploaded.
        timeout_s: Of a challenge's job.
        network: Whether the arena lets its run out through the egress proxy.
        watched: Whether it is judged by what the host sees inside the VM: of a virtual machine, nothing.
    """

    name: str
    case: int
    clause: str
    by: By
    program: str
    control: Control
    won: Callable[[Facts], bool]
    outcomes: frozenset[str] = FAILED
    archive: Callable[[str], bytes] | None = None
    payload: Mapping[str, str] = field(default_factory=dict)
    filename: str = "attack.tar.gz"
    timeout_s: int = 40
    network: bool = False
    watched: bool = False

    def challenges(self, *, widened: bool) -> set[str]:
        """Which challenges must serve for it, as `House.start` names them."""
        wanted = {"rogue"} if self.by == "challenge" else {"arena"}
        if widened:
            wanted = {"arena-archive" if self.archive else "arena-arena"} if "arena" in wanted else wanted
            wanted = set() if self.control.apart else wanted
        victim = self.payload.get("victim")
        if victim == "later":
            wanted.add("vault-late")
        elif victim or any(word in self.program for word in ("@VAULT@", "@BUNDLE@")):
            wanted.add("vault")
        return wanted
