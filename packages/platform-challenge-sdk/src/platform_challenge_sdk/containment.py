"""How a submission is contained here: with what the machine has, and with which guarantees. Pure.

| what works here | what is used | what falls away (`LOST`) |
|---|---|---|
| namespaces | bubblewrap: namespaces, seccomp | nothing |
| no namespaces; Landlock; root that may change its uid | Landlock, seccomp, an own uid | `WEAKER` |
| no namespaces; Landlock 6 or newer; an ordinary user | Landlock, seccomp | `WEAKER`, `identity` |
| anything less | nothing is run | |

Nothing is run where a submission could read the SDK's memory, user_config or the agent's socket, reach the
network, signal the SDK, or outlive its run. The choice is made once, before the first submission is run: a
run that fails later is not tried again with less.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from platform_challenge_sdk import landlock
from platform_challenge_sdk.errors import ContainmentUnavailable
from platform_challenge_sdk.seccomp import AUDIT, Walls

LOST: dict[str, str] = {
    "network": "no sockets, not even of its own loopback; network=True is refused",
    "paths": "/submission, /workspace and /tmp are folders with other names, and /proc is closed",
    "shared_memory": "no /dev/shm, so no POSIX semaphores and none of multiprocessing's locks",
    "names": "it can find out which files and processes exist, but not what is in them",
    "disk": "disk is looked at every 50 ms, not enforced, and deleted files that are open do not count",
    "identity": "it has the SDK's uid, so it may not change modes, owners and times of files",
    "truncation": "truncate(2) is refused, since this Landlock does not know it",
}
"""What may fall away, by the word that results and logs name it with."""
WEAKER = ("network", "paths", "shared_memory", "names", "disk")


@dataclass(frozen=True, slots=True)
class Facts:
    """What a trial run said: None where it held, else why not.

    `namespaces`: bubblewrap; `own_uid`: Landlock and seccomp under another uid; `same_uid`: the same under
    ours. `root`: our uid is 0. `landlock`: the kernel's version of it, 0 without.
    """

    machine: str
    root: bool
    namespaces: str | None
    own_uid: str | None = "not tried"
    same_uid: str | None = "not tried"
    landlock: int = 0


@dataclass(frozen=True, slots=True)
class Containment:
    """`kind`: what holds a submission. `own_uid`: it gets one. `landlock`: the version that is used."""

    kind: Literal["namespaces", "landlock"] = "namespaces"
    own_uid: bool = True
    landlock: int = 0

    @property
    def lost(self) -> tuple[str, ...]:
        """What falls away, as words of `LOST`."""
        if self.kind == "namespaces":
            return ()
        more = () if self.own_uid else ("identity",)
        return (*WEAKER, *more, *(() if self.walls.truncation else ("truncation",)))

    @property
    def walls(self) -> Walls:
        """What the system call filter may rely on."""
        if self.kind == "namespaces":
            return Walls()
        truncation = self.landlock >= landlock.TRUNCATION
        return Walls(network=False, mounts=False, identity=self.own_uid, truncation=truncation)

    def __str__(self) -> str:
        if self.kind == "namespaces":
            return "namespaces and seccomp"
        uid = "an own uid" if self.own_uid else "the SDK's uid"
        return f"Landlock {self.landlock}, seccomp and {uid}; lost: {', '.join(self.lost)}"


NAMESPACES = Containment()


def choose(facts: Facts) -> Containment:
    """The strongest containment that the facts allow.

    Raises:
        ContainmentUnavailable: None is left; the message has the reason of each.
    """
    if facts.machine not in AUDIT:
        known = " or ".join(AUDIT)
        raise ContainmentUnavailable(f"expected an {known} machine for the filter, got {facts.machine}")
    if facts.namespaces is None:
        return NAMESPACES
    if facts.landlock > 0 and facts.root and facts.own_uid is None:
        return Containment("landlock", own_uid=True, landlock=facts.landlock)
    # Older ones do not keep signals in: one under our uid could end the SDK.
    if facts.landlock >= landlock.SIGNALS and not facts.root and facts.same_uid is None:
        return Containment("landlock", own_uid=False, landlock=facts.landlock)
    raise ContainmentUnavailable(
        f"no sandbox can be made here, so no submission is run: namespaces: {facts.namespaces}; "
        + _why_no_landlock(facts)
    )


def _why_no_landlock(facts: Facts) -> str:
    if facts.landlock == 0:
        return "the kernel has no Landlock, or it is switched off"
    if facts.root:
        return f"Landlock under an own uid: {facts.own_uid}"
    if facts.landlock < landlock.SIGNALS:
        return f"Landlock {facts.landlock} keeps no signals in: expected {landlock.SIGNALS}, or root's rights"
    return f"Landlock under the SDK's uid: {facts.same_uid}"
