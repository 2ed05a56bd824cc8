"""What a fleet holds of each CVM until it is gone: its record, its share of the quota, its host port."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from platform_protocol.ids import ClaimId, VmName
from platform_validator.clock import Clock
from platform_validator.crashpoint import crashpoint
from platform_validator.cvm.booting import lifetimes_of
from platform_validator.cvm.errors import NoCapacity
from platform_validator.cvm.host_ports import NoHostPort
from platform_validator.cvm.hosts import Hosts
from platform_validator.cvm.members import Member, use_of
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.quota import Quota, Reservation, Use
from platform_validator.cvm.vmm import VmmUnavailable
from platform_validator.keyring import Keyring
from platform_validator.store.port import Store
from platform_validator.store.records import Purpose, VmPhase, VmRecord


class Holdings:
    """Takes what a CVM needs before it is journaled, and gives it back when the CVM is gone.

    Args:
        hosts: Whose ports are taken.
        store: The journal.
        keyring: Seals launch secrets.
        quota: Gets reservations back.
        clock: Time.
        prefix: Of our names.
        new_id: Makes the random part of names, and session ids (UUIDs).
        random_bytes: Makes launch secrets.
    """

    def __init__(
        self,
        *,
        hosts: Hosts,
        store: Store,
        keyring: Keyring,
        quota: Quota,
        clock: Clock,
        prefix: str,
        new_id: Callable[[], str],
        random_bytes: Callable[[int], bytes],
    ) -> None:
        self._hosts = hosts
        self._store = store
        self._keyring = keyring
        self._quota = quota
        self._clock = clock
        self._prefix = prefix
        self._new_id = new_id
        self._random_bytes = random_bytes
        self._members: dict[VmName, Member] = {}
        self._restored: dict[VmName, Member] = {}
        self._reservations: dict[VmName, Reservation] = {}

    def all(self) -> dict[VmName, Member]:
        """Every CVM that is not gone, those on their way out with them."""
        return {**self._restored, **self._members}

    def get(self, name: VmName) -> Member | None:
        """One of them."""
        return self._members.get(name) or self._restored.get(name)

    def made(self, name: VmName) -> Member | None:
        """One that this process made."""
        return self._members.get(name)

    def restored(self, name: VmName) -> Member | None:
        """One that an earlier process made."""
        return self._restored.get(name)

    def restore(self, records: Sequence[VmRecord]) -> None:
        """Hold quota and ports for CVMs of the journal; those held already stay as they are."""
        for record in records:
            if record.name in self._restored:
                continue
            [self._reservations[record.name]] = self._quota.rebuild(
                [(record.name, record.resources)], host=record.host, use=use_of(record)
            )
            with contextlib.suppress(VmmUnavailable):
                self._hosts.get(record.host).ports.hold(record.host_port)
            self._restored[record.name] = Member(record, stage="restored")

    async def intend(
        self, plan: CvmPlan, purpose: Purpose, reservation: Reservation, claim_id: ClaimId | None
    ) -> tuple[Member, bytes]:
        """Name a CVM and journal that it is to be made; the second is its launch secret.

        The reservation is the CVM's from the call on; when this raises, it was given back.

        Raises:
            NoCapacity: Our range of host ports has no room.
            VmmUnavailable: The host is none of ours any more.
            StoreUnavailable: The journal cannot be written.
        """
        name = VmName(f"{self._prefix}{self._new_id()}")
        secret = self._random_bytes(32)
        now = self._clock.now()
        try:
            ports = self._hosts.get(reservation.host).ports
            port = ports.take()
        except NoHostPort as error:
            self._quota.release(reservation)
            raise NoCapacity(str(error)) from error
        except VmmUnavailable:
            self._quota.release(reservation)
            raise
        record = VmRecord(
            name=name,
            purpose=purpose,
            challenge_id=plan.challenge_id,
            instance_key=plan.instance_key,
            resources=plan.resources,
            phase=VmPhase.INTENDED,
            sealed_secret=self._keyring.seal(secret, name.encode()),
            compose=plan.compose,
            host_port=port,
            session_id=self._new_id(),
            intended_at=now,
            hard_deadline=now + lifetimes_of(plan, purpose).hard,
            claim_id=claim_id,
            host=reservation.host,
        )
        try:
            await self._store.intend_vm(record)
        except BaseException:
            ports.give_back(port)
            self._quota.release(reservation)
            raise
        crashpoint("intent_written")
        self._quota.reassign(reservation, use_of(record))
        self._members[name] = member = Member(record, plan, secret)
        self._reservations[name] = reservation
        return member, secret

    def use(self, name: VmName, use: Use) -> None:
        """Its share is for this now; of one that is gone there is none."""
        reservation = self._reservations.get(name)
        if reservation is not None:
            self._quota.reassign(reservation, use)

    def gone(self, name: VmName) -> None:
        """It is gone, as its VMM says: everything comes back."""
        reservation = self._reservations.pop(name, None)
        if reservation is not None:
            self._quota.release(reservation)
        member = self._members.pop(name, None) or self._restored.pop(name, None)
        if member is None:
            return
        with contextlib.suppress(VmmUnavailable):
            self._hosts.get(member.record.host).ports.give_back(member.record.host_port)
        if member.session is not None or member.record.vm_id is not None:
            # One that was never made took no room, and leaves none.
            self._hosts.freed(member.record.host)
