"""The CVMs of the Store in memory: the same rules as the CVMs' table in SQLite."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime

from platform_protocol.ids import ClaimId, VmId, VmName
from platform_validator.store.port import DuplicateRecord, UnknownRecord
from platform_validator.store.records import VmPhase, VmRecord

_PHASES = list(VmPhase)


class VmMemory:
    """Records by name; phases only go forward."""

    def __init__(self) -> None:
        self._vms: dict[VmName, VmRecord] = {}

    def intend(self, record: VmRecord) -> None:
        """See the port's `intend_vm`."""
        if record.name in self._vms:
            raise DuplicateRecord(f"CVM {record.name} is there")
        self._vms[record.name] = record

    def created(self, name: VmName, vm_id: VmId) -> None:
        """See the port's `vm_created`."""
        vm = self._vm(name)
        phase = VmPhase.CREATED if vm.phase is VmPhase.INTENDED else vm.phase
        self._vms[name] = replace(vm, vm_id=vm_id, phase=phase)

    def enter(self, name: VmName, phase: VmPhase, reason: str | None, at: datetime) -> None:
        """See the port's `vm_phase`."""
        vm = self._vm(name)
        if _PHASES.index(phase) > _PHASES.index(vm.phase):
            self._vms[name] = replace(
                vm,
                phase=phase,
                reason=vm.reason if reason is None else reason,
                gone_at=at if phase is VmPhase.GONE else vm.gone_at,
            )

    def attested(self, name: VmName, attestation: str, vm_instance: str | None, os_image: str | None) -> None:
        """See the port's `vm_attested`."""
        vm = self._vm(name)
        others = (one for one in self._vms.values() if one.name != name)
        if vm_instance is not None and any(one.vm_instance == vm_instance for one in others):
            raise DuplicateRecord(f"another CVM has instance id {vm_instance}")
        self._vms[name] = replace(vm, attestation=attestation, vm_instance=vm_instance, os_image=os_image)

    def assign(self, name: VmName, claim_id: ClaimId) -> None:
        """See the port's `vm_assigned`."""
        vm = self._vm(name)
        if vm.claim_id is not None:
            raise DuplicateRecord(f"CVM {name} was taken by {vm.claim_id}")
        self._vms[name] = replace(vm, claim_id=claim_id)

    def one(self, name: VmName) -> VmRecord | None:
        """See the port's `vm`."""
        return self._vms.get(name)

    def open(self) -> list[VmRecord]:
        """See the port's `open_vms`."""
        return [vm for vm in self._vms.values() if vm.phase is not VmPhase.GONE]

    def forget(self, *, gone_before: datetime) -> list[VmRecord]:
        """Drop those that were gone by then: which."""
        old = [vm for vm in self._vms.values() if vm.gone_at is not None and vm.gone_at < gone_before]
        for vm in old:
            del self._vms[vm.name]
        return old

    def _vm(self, name: VmName) -> VmRecord:
        if name not in self._vms:
            raise UnknownRecord(f"no CVM {name}")
        return self._vms[name]
