"""The life of a challenge's instance as a pure function: state and fact in, next state out."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from types import MappingProxyType

from platform_validator.platform_client.backoff import Backoff
from platform_validator.store.records import InstanceState


class Fact(StrEnum):
    """What can become known about an instance."""

    FETCHED = "fetched"
    BOOTED = "booted"
    PROVED = "proved"
    BROKE = "broke"
    RETRIED = "retried"
    SUPERSEDED = "superseded"
    REMOVED = "removed"
    DRAINED = "drained"


class Aside(StrEnum):
    """Answers that are no state: the fact changes nothing, or the instance is to be forgotten."""

    IGNORED = "ignored"
    FORGOTTEN = "forgotten"


_CREATED, _PROVISIONING, _PROBING, _ACTIVE, _FAILED, _RECYCLING = (
    InstanceState.CREATED,
    InstanceState.PROVISIONING,
    InstanceState.PROBING,
    InstanceState.ACTIVE,
    InstanceState.FAILED,
    InstanceState.RECYCLING,
)

TABLE: MappingProxyType[InstanceState, MappingProxyType[Fact, InstanceState | Aside]] = MappingProxyType(
    {
        # Seen in the list: its code is fetched, its platform.toml read, and room is found for its CVM.
        _CREATED: MappingProxyType(
            {
                Fact.FETCHED: _PROVISIONING,
                Fact.BROKE: _FAILED,
                Fact.SUPERSEDED: Aside.FORGOTTEN,
                Fact.REMOVED: Aside.FORGOTTEN,
            }
        ),
        # Its CVM is made and boots, until the SDK inside says that the challenge is imported.
        _PROVISIONING: MappingProxyType(
            {
                Fact.BOOTED: _PROBING,
                Fact.BROKE: _FAILED,
                Fact.SUPERSEDED: _RECYCLING,
                Fact.REMOVED: _RECYCLING,
            }
        ),
        # Attestation, `ready`, and so many answers in a row are awaited.
        _PROBING: MappingProxyType(
            {
                Fact.PROVED: _ACTIVE,
                Fact.BROKE: _FAILED,
                Fact.SUPERSEDED: _RECYCLING,
                Fact.REMOVED: _RECYCLING,
            }
        ),
        # Jobs are claimed for it.
        _ACTIVE: MappingProxyType(
            {
                Fact.BROKE: _FAILED,
                Fact.SUPERSEDED: _RECYCLING,
                Fact.REMOVED: _RECYCLING,
            }
        ),
        # Has a reason; is retried from the start with backoff. Jobs may still run on it.
        _FAILED: MappingProxyType(
            {
                Fact.RETRIED: _CREATED,
                Fact.SUPERSEDED: _RECYCLING,
                Fact.REMOVED: _RECYCLING,
            }
        ),
        # Takes no new jobs; ends when the last one has ended.
        _RECYCLING: MappingProxyType(
            {
                Fact.DRAINED: Aside.FORGOTTEN,
            }
        ),
    }
)

RETRY = Backoff(timedelta(seconds=10), timedelta(minutes=10))
"""Between two tries of a Failed instance, with jitter; three steps further when trying alone cannot help."""

DEADLINES: MappingProxyType[InstanceState, timedelta | None] = MappingProxyType(
    {
        _CREATED: timedelta(minutes=10),  # the time that it waits for room is not counted
        _PROVISIONING: timedelta(minutes=30),  # five tries for a free host port, five minutes each, at most
        _PROBING: timedelta(minutes=10),
        _ACTIVE: None,  # its CVMs are watched instead
        _FAILED: RETRY.cap,
        _RECYCLING: timedelta(hours=2),  # beyond the challenge's longest job
    }
)
"""How long an instance may be in a state. Over it: Failed; a Recycling one is forgotten with its CVM."""


def transition(state: InstanceState, fact: Fact) -> InstanceState | Aside:
    """The next state; a fact that the table does not name for a state is ignored (it came too late)."""
    return TABLE[state].get(fact, Aside.IGNORED)
