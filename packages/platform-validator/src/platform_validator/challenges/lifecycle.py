"""The life of a challenge's instance as a pure function: state and fact in, next state out."""

from __future__ import annotations

from enum import StrEnum
from types import MappingProxyType

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
        # Seen in the list: its code is fetched and its platform.toml read.
        _CREATED: MappingProxyType(
            {
                Fact.FETCHED: _PROVISIONING,
                Fact.BROKE: _FAILED,
                Fact.SUPERSEDED: Aside.FORGOTTEN,
                Fact.REMOVED: Aside.FORGOTTEN,
            }
        ),
        # A CVM is being made.
        _PROVISIONING: MappingProxyType(
            {
                Fact.BOOTED: _PROBING,
                Fact.BROKE: _FAILED,
                Fact.SUPERSEDED: _RECYCLING,
                Fact.REMOVED: _RECYCLING,
            }
        ),
        # The CVM answers; health, attestation and `ready` are awaited.
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


def transition(state: InstanceState, fact: Fact) -> InstanceState | Aside:
    """The next state; a fact that the table does not name for a state is ignored (it came too late)."""
    return TABLE[state].get(fact, Aside.IGNORED)
