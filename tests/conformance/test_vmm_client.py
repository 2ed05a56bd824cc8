"""The client at the double, version by version: what it sends, what it refuses, what it bears."""

from __future__ import annotations

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from tests.dstack_double import VERSIONS, Boot, DstackDouble, Fault
from tests.dstack_double.server import IMAGE

from platform_protocol.ids import VmId, VmName
from platform_protocol.resources import Resources
from platform_validator.attestation.keccak import keccak_256
from platform_validator.cli.checks import check_open_vmm
from platform_validator.cvm.dstack import DstackVmm
from platform_validator.cvm.dstack.answers import gateway_address
from platform_validator.cvm.vmm import (
    VmmRefused,
    VmmUnauthorized,
    VmmUnavailable,
    VmNotFound,
    VmSpec,
    VmState,
    url_of,
)

COMPOSE = b'{"manifest_version":2,"name":"x","runner":"docker-compose"}'
every_version = pytest.mark.parametrize("version", VERSIONS)
HEAD = VERSIONS[-1]


def spec(**change: Any) -> VmSpec:
    given: dict[str, Any] = {
        "name": VmName("pv-x"),
        "image": IMAGE,
        "compose": COMPOSE,
        "user_config": "{}",
        "resources": Resources(cpu_cores=1, memory_mb=256, disk_mb=1025),
        "host_port": 10_001,
        "guest_port": 10_000,
        "tee": True,
        "simulated_tee": False,
    }
    return VmSpec(**(given | change))


@contextlib.asynccontextmanager
async def at(double: DstackDouble, where: Path | int = 0, **options: Any) -> AsyncIterator[DstackVmm]:
    async with double.listening(where) as url:
        client = DstackVmm(url, **options)
        try:
            yield client
        finally:
            await client.close()


def created(double: DstackDouble) -> list[dict[str, Any]]:
    return [json.loads(body) for method, body in double.calls if method == "CreateVm"]


@every_version
async def test_vmm_below_tee_is_refused_by_name_where_no_tee_is_ignored(version: str) -> None:
    """Before v0.5.6 a TDX VM would start: nothing is sent. Since, no TEE is what is made."""
    double = DstackDouble(version)
    async with at(double) as client:
        if version in ("0.5.2", "0.5.5"):
            with pytest.raises(VmmRefused, match=r"0\.5\.6 or newer"):
                await client.create(spec(tee=False))
            assert created(double) == []
        else:
            await client.create(spec(tee=False))
            assert [message["no_tee"] for message in created(double)] == [True]
        assert double.host.starts == len(created(double))


@every_version
async def test_vmm_simulated_tee_is_refused_where_it_is_ignored(version: str) -> None:
    """Only the head knows it; elsewhere the message says what to unset."""
    double = DstackDouble(version)
    async with at(double) as client:
        if version == HEAD:
            await client.create(spec(tee=False, simulated_tee=True))
            assert created(double)[0]["simulated_tee"] == "dstack-tdx"
            return
        with pytest.raises(VmmRefused, match=r"allow_simulated|0\.5\.6"):
            await client.create(spec(tee=False, simulated_tee=True))
        assert created(double) == []


@every_version
async def test_vmm_a_tee_is_asked_for_on_every_version(version: str) -> None:
    """no_tee false, and no simulation beside it."""
    double = DstackDouble(version)
    async with at(double) as client:
        await client.create(spec(tee=True, simulated_tee=True))
    [message] = created(double)
    assert message["no_tee"] is False
    assert message.keys().isdisjoint({"simulated_tee", "gpus", "encrypted_env", "stopped"})
    assert message["disk_size"] == 2


async def test_vmm_exchanged_for_an_older_one_is_noticed(tmp_path: Path) -> None:
    """The version is asked before each CVM, not once."""
    path = tmp_path / "vmm.sock"
    async with at(DstackDouble(HEAD), path) as client:
        await client.create(spec(tee=False))
    older = DstackDouble("0.5.5")
    async with older.listening(path) as url:
        client = DstackVmm(url)
        with pytest.raises(VmmRefused, match=r"0\.5\.6"):
            await client.create(spec(tee=False))
        await client.close()
    assert created(older) == []


@pytest.mark.parametrize(
    "credentials",
    [{"token": "t0ken"}, {"user": "anyone", "password": "t0ken"}, {"user": "t0ken", "password": ""}],
)
async def test_vmm_credentials_are_taken_in_each_form(credentials: dict[str, str], tmp_path: Path) -> None:
    """By the head, which guards every path; on a Unix socket as over TCP."""
    for where in (0, tmp_path / "vmm.sock"):
        async with at(DstackDouble(HEAD, token="t0ken"), where, **credentials) as client:
            assert (await client.facts()).version == HEAD


async def test_vmm_wrong_credentials_are_told_apart_from_silence() -> None:
    """With the settings to set."""
    async with at(DstackDouble(HEAD, token="t0ken"), token="other") as client:
        with pytest.raises(VmmUnauthorized, match="DSTACK_VMM_TOKEN"):
            await client.facts()


@every_version
async def test_vmm_that_answers_without_credentials_on_tcp_fails_the_check(
    version: str, tmp_path: Path
) -> None:
    """Up to v0.5.11 a token changes nothing; a Unix socket does."""
    double = DstackDouble(version, token="t0ken")
    async with double.listening() as url:
        found = await check_open_vmm(url)
    assert [one.result for one in found] == ([] if version == HEAD else ["fail"])
    async with double.listening(tmp_path / "vmm.sock") as url:
        assert await check_open_vmm(url) == []


@every_version
async def test_vmm_logs_of_a_vm_that_is_gone_are_not_found(version: str) -> None:
    """Also where the VMM answers 200 with an error of its file system."""
    async with at(DstackDouble(version)) as client:
        with pytest.raises(VmNotFound):
            await client.logs(VmId("gone"), 10)


@every_version
async def test_vmm_that_restarts_a_crashing_vm_shows_it_flapping_until_it_is_stopped(version: str) -> None:
    """running, exited, running …; after StopVm stopped, and it stays so."""
    clock = [0.0]
    double = DstackDouble(version, clock=lambda: clock[0])
    double.host.boots = lambda _: Boot(exits=1.0, stderr="panic")
    async with at(double) as client:
        vm_id = await client.create(spec())
        seen = []
        for now in (0.0, 2.0, 22.0, 24.0):
            clock[0] = now
            vm = await client.get(vm_id)
            assert vm is not None
            seen.append(vm.state)
        assert seen == [VmState.RUNNING, VmState.EXITED, VmState.RUNNING, VmState.EXITED]
        await client.stop(vm_id)
        clock[0] = 1000.0
        vm = await client.get(vm_id)
        assert vm is not None
        assert (vm.state, vm.lacked) == (VmState.STOPPED, "")


@every_version
async def test_vmm_removal_is_sync_or_async(version: str) -> None:
    """`removing` is shown where there is such a state; the end is the same."""
    clock = [0.0]
    double = DstackDouble(version, clock=lambda: clock[0])
    double.host.removal = 60.0
    async with at(double) as client:
        vm_id = await client.create(spec())
        await client.stop(vm_id)
        await client.remove(vm_id)
        vm = await client.get(vm_id)
        if version in ("0.5.2", "0.5.5"):
            assert vm is None
        else:
            assert vm is not None
            assert vm.state is VmState.REMOVING
            await client.remove(vm_id)
        clock[0] = 61.0
        assert await client.get(vm_id) is None
        with pytest.raises(VmNotFound):
            await client.remove(vm_id)


@pytest.mark.parametrize(("domain", "port"), [("gw.example", 443), ("gw.example:8443", 8443)])
async def test_vmm_without_port_mapping_is_reached_by_its_gateway(domain: str, port: int) -> None:
    """No port is asked for; the address shows once the instance is known, and TLS is spoken there."""
    clock = [0.0]
    double = DstackDouble(HEAD, clock=lambda: clock[0])
    double.host.port_mapping, double.host.base_domain = False, domain
    double.host.boots = lambda _: Boot(takes=10.0)
    async with at(double) as client:
        with pytest.raises(VmmRefused, match="maps no ports"):
            await client.create(spec())
        compose = json.dumps(json.loads(COMPOSE) | {"gateway_enabled": True}).encode()
        vm_id = await client.create(spec(compose=compose))
        booting = await client.get(vm_id)
        clock[0] = 11.0
        booted = await client.get(vm_id)
    assert [message["ports"] for message in created(double)] == [[]]
    assert booting is not None
    assert booted is not None
    assert booting.address is None
    assert booted.address == (f"{booted.instance}-10000.gw.example", port)
    assert booted.address is not None
    assert url_of(booted.address, "ws") == f"wss://{booted.instance}-10000.gw.example:{port}"
    assert url_of(("127.0.0.1", 1), "http") == "http://127.0.0.1:1"


@pytest.mark.parametrize(
    "url", [None, 5, "http://x", "https://evil/8090", "https://" + "a" * 40 + "-8090.x@y"]
)
def test_vmm_gateway_url_of_another_form_is_no_address(url: object) -> None:
    """It is the VMM's word, and may be anything."""
    assert gateway_address(url) is None


async def test_vmm_create_of_two_at_once_gives_each_gpu_once() -> None:
    """The second has none left while the first does not show yet."""
    double = DstackDouble(HEAD)
    double.host.gpus = ("18:00.0",)
    double.faults.add("CreateVm", Fault(cut=True))
    wish = spec().resources.model_copy(update={"gpu_count": 1})
    async with at(double) as client:
        with pytest.raises(VmmUnavailable):
            await client.create(spec(resources=wish))
        with pytest.raises(VmmRefused, match="gpu"):
            await client.create(spec(name=VmName("pv-y"), host_port=10_002, resources=wish))


async def test_vmm_gets_an_environment_sealed_to_the_key_of_the_pinned_kms_alone() -> None:
    """Another signer, or none: nothing is created, and no value leaves."""
    signing, app = ec.generate_private_key(ec.SECP256K1()), X25519PrivateKey.generate()
    public = app.public_key().public_bytes_raw()

    def answer(app_id: bytes) -> dict[str, Any]:
        digest = keccak_256(b"dstack-env-encrypt-pubkey:" + app_id + public)
        r, s = utils.decode_dss_signature(signing.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256()))))
        signed = (r.to_bytes(32, "big") + s.to_bytes(32, "big") + b"\x01").hex()
        return {"public_key": public.hex(), "signature": signed, "timestamp": 0, "signature_v1": ""}

    signer = signing.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint).hex()
    other = ec.generate_private_key(ec.SECP256K1()).public_key()
    wrong = other.public_bytes(Encoding.X962, PublicFormat.CompressedPoint).hex()
    compose = json.dumps(json.loads(COMPOSE) | {"key_provider": "kms", "allowed_envs": ["TOKEN"]}).encode()
    wish = spec(compose=compose, environment={"TOKEN": "s3cret"})
    double = DstackDouble("0.5.5")
    double.rpc.env_key = answer
    for pinned in (None, wrong):
        async with at(double, kms_signer=pinned) as client:
            with pytest.raises(VmmRefused):
                await client.create(wish)
    assert created(double) == []
    async with at(double, kms_signer=signer) as client:
        await client.create(wish)
        with pytest.raises(VmmRefused, match="allowed_envs"):
            await client.create(replace(wish, environment={"OTHER": "s3cret"}))
    [message] = created(double)
    assert "s3cret" not in json.dumps(message)
    assert len(message["encrypted_env"]) > 2 * (32 + 12 + 16)
