"""The fleet over a VMM in memory, guests of the real protocol on loopback, and the real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from fleet_world import (
    BUNDLE,
    PLAN,
    MakeWorld,
    caught,
    fleet_worlds,
)

from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_protocol.session.v2 import Offer
from platform_protocol.tokens import bundle_authorization
from platform_protocol.user_config import UserConfig
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.cvm import errors
from platform_validator.cvm.fleet import Cvm
from platform_validator.cvm.vmm import VmmRefused
from platform_validator.keyring import Keyring
from platform_validator.store.records import Purpose


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    async with fleet_worlds(tmp_path) as make:
        yield make


async def test_a_booted_cvm_is_attested_configured_and_ready(make_world: MakeWorld) -> None:
    """Boot ends with a session to the SDK inside, at the image's level, and says its stages in order."""
    world = await make_world()
    cvm = await world.boot()
    assert world.stages == ["creating", "booting", "attesting"]
    assert (cvm.attestation, cvm.isolation_level) == (AttestationKind.NONE, IsolationLevel.CONTAINER)
    guest = world.vmm.machine(cvm.name).guest
    assert guest is not None
    assert [(c.env, c.challenge_id) for c in guest.configured] == [
        ({"TOKEN": "operator-secret"}, PLAN.challenge_id)
    ]
    [view] = world.fleet.views()
    assert (view.name, view.stage, view.attestation) == (cvm.name, "ready", "none")
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()


async def test_every_step_is_journaled_before_it_is_taken(make_world: MakeWorld) -> None:
    """Intent before CreateVm, the id after it, the finding before configure, `destroying` before the end."""
    world = await make_world()
    cvm = await world.boot()
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()
    assert world.journal == [
        "intend_vm",
        "guest",
        "vm_created",
        "vm_attested",
        "vm_phase:ready",
        "vm_phase:destroying",
        "vm_phase:gone",
    ]


async def test_names_secrets_and_lifetimes_of_a_job_s_cvm(make_world: MakeWorld) -> None:
    """The name has our state id; the secret is sealed in the journal, for this VM's name alone."""
    world = await make_world()
    cvm = await world.boot()
    record = await world.store.vm(cvm.name)
    config = UserConfig.model_validate_json(world.specs[0].user_config)
    assert cvm.name.startswith("pv-0123456789-")
    assert len(cvm.name) == len("pv-0123456789-") + 36
    assert config.secret not in record.sealed_secret
    assert Keyring(b"k" * 32).open(record.sealed_secret, cvm.name.encode()) == config.secret
    assert (config.vm, config.proxy_url) == (cvm.name, None)
    assert config.max_lifetime_s == config.hard_lifetime_s == 300 + 300 + 3600
    assert config.filesystem == FilesystemPolicy()
    assert record.hard_deadline - record.intended_at == timedelta(seconds=config.hard_lifetime_s)
    assert "operator-secret" not in world.specs[0].user_config


async def test_the_operator_s_filesystem_policy_goes_with_every_cvm(make_world: MakeWorld) -> None:
    """Unmeasured, beside the lifetimes, for the VMM to enforce."""
    policy = FilesystemPolicy(allowed_paths=("/scratch",), tmpfs_size_mb=64)
    world = await make_world(filesystem=policy)
    await world.boot()
    assert UserConfig.model_validate_json(world.specs[0].user_config).filesystem == policy


async def test_ready_and_shared_cvms_live_longer_than_a_job_s(make_world: MakeWorld) -> None:
    """24 h idle and 7 days hard."""
    world = await make_world()
    await world.boot(purpose=Purpose.READY)
    config = UserConfig.model_validate_json(world.specs[0].user_config)
    assert (config.max_lifetime_s, config.hard_lifetime_s) == (24 * 3600, 7 * 24 * 3600)


@pytest.mark.parametrize(
    ("level", "simulated", "tee", "simulated_tee"),
    [
        (IsolationLevel.TEE, False, True, False),
        (IsolationLevel.VM, False, False, False),
        (IsolationLevel.VM, True, False, True),
        (IsolationLevel.CONTAINER, True, False, True),
        (IsolationLevel.NONE, False, False, False),
    ],
)
async def test_the_level_decides_what_is_asked_of_the_vmm(
    make_world: MakeWorld, level: IsolationLevel, simulated: bool, tee: bool, simulated_tee: bool
) -> None:
    """no_tee below Tee; simulated quotes only where they are allowed, and never beside a real TEE."""
    world = await make_world(level=level, allow_simulated=simulated)
    world.vmm.fail("create", VmmRefused("enough seen"))
    with pytest.raises(errors.CreateFailed):
        await world.boot()
    assert [(spec.tee, spec.simulated_tee) for spec in world.vmm.asked] == [(tee, simulated_tee)]


async def test_each_vm_has_a_launch_secret_of_its_own(make_world: MakeWorld) -> None:
    """Made for it, 32 bytes, and never another's."""
    world = await make_world()
    for _ in range(2):
        await world.boot(purpose=Purpose.READY)
    secrets = {UserConfig.model_validate_json(spec.user_config).secret for spec in world.vmm.asked}
    assert [len(one) for one in secrets] == [32, 32]


async def test_a_bundle_is_for_the_cvm_that_boots_and_for_no_other(make_world: MakeWorld) -> None:
    """Only while it creates or boots, only for its own plan's bundle, only with its own secret."""
    world = await make_world()
    world.script.status = "starting"
    booting = asyncio.Event()
    async with asyncio.TaskGroup() as group:
        boot = group.create_task(caught(world, booting))
        await booting.wait()
        config = UserConfig.model_validate_json(world.specs[0].user_config)
        header = bundle_authorization(config.secret, config.vm, BUNDLE)
        assert world.fleet.may_fetch_bundle(header, BUNDLE)
        assert not world.fleet.may_fetch_bundle(header, "c" * 64)
        other = bundle_authorization(config.secret, config.vm, "c" * 64)
        assert not world.fleet.may_fetch_bundle(other, "c" * 64)
        assert not world.fleet.may_fetch_bundle(bundle_authorization(b"x" * 32, config.vm, BUNDLE), BUNDLE)
        assert not world.fleet.may_fetch_bundle("", BUNDLE)
        world.script.status = "ready"
        world.vmm.machines()[0].guest.script.status = "ready"  # type: ignore[union-attr]  # it serves
    assert isinstance(boot.result(), Cvm)
    assert not world.fleet.may_fetch_bundle(header, BUNDLE)


async def test_a_version_1_quote_counts_as_no_attestation_below_tee_and_is_judged_at_tee(
    make_world: MakeWorld,
) -> None:
    """Nobody signed their development quotes, nothing binds version 1's keys to a real one; it is counted."""
    world, heard = await make_world(), []
    booter = world.fleet._booter
    booter._policy.heard = lambda answer, check: heard.append((answer, check))
    offer = Offer(1, b"not signed" * 100, '{"dev_mode": true}', "", bytes(64), None)
    accepted = await booter._accept(PLAN, offer)
    assert (accepted.kind, accepted.instance, accepted.image) == (AttestationKind.NONE, None, None)
    assert heard == [("version_1", "")]
    booter._rules = replace(booter._rules, level=IsolationLevel.TEE)
    booter._policy = AttestationPolicy(level=IsolationLevel.TEE, allow_simulated=False, checker=None)
    with pytest.raises(errors.AttestationUnavailable, match="nothing here can verify one"):
        await booter._accept(PLAN, offer)
