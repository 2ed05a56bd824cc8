"""The parts of the dstack client that decide: what a version can do, who holds what, what may be sealed."""

from __future__ import annotations

import hashlib
import itertools
import json
import struct
from dataclasses import dataclass, replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, utils
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol.ids import VmName
from platform_protocol.resources import Resources
from platform_validator.attestation.keccak import keccak_256
from platform_validator.cvm.dstack.arbiter import LATE, Arbiter, Claim, Gpu, choose, read_claim
from platform_validator.cvm.dstack.capabilities import capabilities
from platform_validator.cvm.dstack.sealed_env import (
    EnvKey,
    EnvKeyUntrusted,
    app_id_of,
    require_allowed,
    seal,
)
from platform_validator.cvm.vmm import VmmAtCapacity, VmmRefused, VmSpec

KMS = json.dumps({"key_provider": "kms", "allowed_envs": ["TOKEN"]}).encode()
NOW = 1_790_000_000
NOBODY: frozenset[VmName] = frozenset()
_numbers = itertools.count()


def spec(port: int = 10_000, *, gpus: int = 0, slots: tuple[str, ...] = ()) -> VmSpec:
    return VmSpec(
        name=VmName(f"vm-{next(_numbers)}"),
        image="image",
        compose=b"{}",
        user_config="{}",
        resources=Resources(cpu_cores=1, memory_mb=256, disk_mb=1024, gpu_count=gpus),
        host_port=port,
        guest_port=10_000,
        tee=True,
        simulated_tee=False,
        gpus=slots,
    )


# Versions


@pytest.mark.parametrize(
    ("version", "knows"),
    [
        ("0.5.2", set()),
        ("v0.5.3", {"refuses_disabled_gpus"}),
        ("0.5.5 (git:abcdef)", {"refuses_disabled_gpus", "stopped"}),
        ("0.5.6", {"refuses_disabled_gpus", "stopped", "no_tee", "update", "signs_time"}),
        ("v0.5.7", {"refuses_disabled_gpus", "stopped", "no_tee", "update", "signs_time", "removes_later"}),
        ("0.5.11", {"refuses_disabled_gpus", "stopped", "no_tee", "update", "signs_time", "removes_later"}),
    ],
)
def test_a_version_can_what_its_tag_has(version: str, knows: set[str]) -> None:
    """The table, by tag; the head has everything."""
    can = capabilities(version)
    fields = {name for name in can.__slots__ if name != "version"}
    assert {name for name in fields if getattr(can, name)} == knows
    assert all(getattr(capabilities("0.6.0-local"), name) for name in fields)


@pytest.mark.parametrize("version", ["", "unknown", "0.5", "git:0123", "x.y.z"])
def test_a_version_that_cannot_be_read_counts_as_the_oldest(version: str) -> None:
    """What is not known to be there is not relied upon."""
    assert replace(capabilities(version), version="") == replace(capabilities("0.5.2"), version="")


# The arbiter


def test_a_claim_is_read_from_what_the_vmm_shows() -> None:
    """Ports and slots; what is missing, null or odd holds nothing."""
    ports = [{"host_port": 10_001}, {"host_port": None}, "x", {}]
    gpus = {"attach_mode": "listed", "gpus": [{"slot": "18:00.0"}]}
    info = {"name": "n", "configuration": {"ports": ports, "gpus": gpus}}
    assert read_claim(info) == Claim(VmName("n"), frozenset({10_001}), frozenset({"18:00.0"}))
    for odd in ({}, {"configuration": None}, {"configuration": {"ports": 5, "gpus": []}}):
        assert read_claim(odd) == Claim(VmName(""))


def test_a_host_port_of_another_vm_is_refused_in_words_that_try_another() -> None:
    """`port` and `in use`: the fleet then takes the next one."""
    with pytest.raises(VmmRefused, match=r"port 10000 is in use"):
        choose(spec(), [Claim(VmName("other"), frozenset({10_000}))], [])


def test_a_gpu_is_given_that_nobody_has_and_that_is_idle() -> None:
    """Neither one in use, nor one that a stopped VM has, nor any when a VM has all."""
    gpus = [Gpu("a", free=False), Gpu("b", free=True), Gpu("c", free=True)]
    held = [Claim(VmName("stopped"), slots=frozenset({"b"}))]
    assert choose(spec(gpus=1), held, gpus).slots == {"c"}
    for wish in (spec(gpus=2), spec(slots=("a",)), spec(slots=("b",)), spec(slots=("nowhere",))):
        with pytest.raises(VmmAtCapacity, match="gpu"):
            choose(wish, held, gpus)
    with pytest.raises(VmmAtCapacity):
        choose(spec(gpus=1), [Claim(VmName("all"), everything=True)], gpus)


@given(st.lists(st.integers(0, 3), max_size=12))
def test_no_gpu_and_no_port_is_ever_held_twice(wanted: list[int]) -> None:
    """Whatever is asked for before the VMM shows any of it."""
    arbiter, gpus = Arbiter(lambda: 0.0), [Gpu(slot, free=True) for slot in "abcdef"]
    given_out: list[Claim] = []
    for count in wanted:
        try:
            given_out.append(arbiter.hold(spec(10_000 + count, gpus=count), [], gpus, answered=NOBODY))
        except VmmRefused:
            continue
    slots = [slot for claim in given_out for slot in claim.slots]
    ports = [port for claim in given_out for port in claim.ports]
    assert len(slots) == len(set(slots))
    assert len(ports) == len(set(ports))


def test_what_was_asked_for_is_held_until_it_shows_is_refused_or_is_too_late() -> None:
    """An unanswered create may come up for a while; then its GPU is free again."""
    clock = [0.0]
    arbiter, gpus = Arbiter(lambda: clock[0]), [Gpu("a", free=True)]
    first = spec(1, gpus=1)
    arbiter.hold(first, [], gpus, answered=NOBODY)
    with pytest.raises(VmmAtCapacity):
        arbiter.hold(spec(2, gpus=1), [], gpus, answered=NOBODY)
    before = arbiter.answered()
    arbiter.settle(first.name)
    with pytest.raises(VmmAtCapacity):
        # This list was asked for before the answer: it need not show the VM.
        arbiter.hold(spec(2, gpus=1), [], gpus, answered=before)
    second = spec(3, gpus=1)
    arbiter.hold(second, [], gpus, answered=arbiter.answered())
    clock[0] = LATE - 1
    with pytest.raises(VmmAtCapacity):
        arbiter.hold(spec(4, gpus=1), [], gpus, answered=NOBODY)
    clock[0] = LATE
    assert arbiter.hold(spec(5, gpus=1), [], gpus, answered=NOBODY).slots == {"a"}


# The sealed environment


@dataclass
class Kms:
    """A KMS: its signing key, and an app's encryption key."""

    signing: ec.EllipticCurvePrivateKey
    app: X25519PrivateKey

    @property
    def signer(self) -> bytes:
        return self.signing.public_key().public_bytes(Encoding.X962, PublicFormat.CompressedPoint)

    @property
    def public(self) -> bytes:
        return self.app.public_key().public_bytes_raw()

    def sign(self, message: bytes) -> str:
        digest = keccak_256(b"dstack-env-encrypt-pubkey:" + message)
        r, s = utils.decode_dss_signature(
            self.signing.sign(digest, ec.ECDSA(utils.Prehashed(hashes.SHA256())))
        )
        return (r.to_bytes(32, "big") + s.to_bytes(32, "big") + b"\x00").hex()

    def answer(self, app_id: bytes, *, at: int = NOW) -> dict[str, Any]:
        return {
            "public_key": self.public.hex(),
            "signature": self.sign(app_id + self.public),
            "timestamp": at,
            "signature_v1": self.sign(app_id + struct.pack(">Q", at) + self.public),
        }


@pytest.fixture
def kms() -> Kms:
    return Kms(ec.generate_private_key(ec.SECP256K1()), X25519PrivateKey.generate())


def test_the_key_of_the_pinned_kms_is_taken_with_and_without_a_time(kms: Kms) -> None:
    """Before v0.5.6 the signature has none."""
    app_id = app_id_of(KMS)
    answer = kms.answer(app_id)
    assert EnvKey.read(answer).checked(app_id, kms.signer, now=NOW) == kms.public
    old = {key: answer[key] for key in ("public_key", "signature")}
    assert EnvKey.read(old).checked(app_id, kms.signer, now=0) == kms.public


@pytest.mark.parametrize(
    "spoil",
    [
        lambda answer, other: answer | {"public_key": other.public.hex()},
        lambda answer, other: answer | {"signature_v1": other.sign(b"x")},
        lambda answer, other: answer | {"signature_v1": answer["signature"]},
        lambda answer, other: answer | {"timestamp": NOW + 1},
        lambda answer, other: answer | {"signature_v1": "", "signature": answer["signature_v1"]},
        lambda answer, other: answer | {"signature_v1": answer["signature_v1"][:-2]},
        lambda answer, other: answer | {"public_key": "00"},
        lambda answer, other: answer | {"public_key": 5},
        lambda answer, other: answer | {"public_key": "zz"},
        lambda answer, other: {},
    ],
)
def test_a_key_that_the_pinned_kms_did_not_sign_for_this_app_is_refused(kms: Kms, spoil: Any) -> None:
    """Another key, another signer, another time, another form."""
    other = Kms(ec.generate_private_key(ec.SECP256K1()), X25519PrivateKey.generate())
    app_id = app_id_of(KMS)
    with pytest.raises(EnvKeyUntrusted):
        EnvKey.read(spoil(kms.answer(app_id), other)).checked(app_id, kms.signer, now=NOW)


def test_a_key_for_another_app_from_another_kms_or_of_long_ago_is_refused(kms: Kms) -> None:
    """The VMM in between could have kept any of them."""
    app_id = app_id_of(KMS)
    other = ec.generate_private_key(ec.SECP256K1()).public_key()
    signer = other.public_bytes(Encoding.X962, PublicFormat.CompressedPoint)
    for key, pinned, now in (
        (EnvKey.read(kms.answer(bytes(20))), kms.signer, NOW),
        (EnvKey.read(kms.answer(app_id)), signer, NOW),
        (EnvKey.read(kms.answer(app_id)), b"\x02" * 5, NOW),
        (EnvKey.read(kms.answer(app_id)), kms.signer, NOW + 601),
        (EnvKey.read(kms.answer(app_id)), kms.signer, NOW - 601),
    ):
        with pytest.raises(EnvKeyUntrusted):
            key.checked(app_id, pinned, now=now)


def test_what_is_sealed_is_read_by_the_app_alone_and_never_twice_the_same(kms: Kms) -> None:
    """X25519 with a fresh key, AES-256-GCM under the shared secret: dstack's form."""
    blob = seal({"TOKEN": "s3cret ü"}, kms.public)
    shared = kms.app.exchange(X25519PublicKey.from_public_bytes(blob[:32]))
    plain = AESGCM(shared).decrypt(blob[32:44], blob[44:], None)
    assert json.loads(plain) == {"env": [{"key": "TOKEN", "value": "s3cret ü"}]}
    assert seal({"TOKEN": "s3cret ü"}, kms.public) != blob


@pytest.mark.parametrize(
    ("compose", "environment", "why"),
    [
        ({"key_provider": "none", "allowed_envs": ["A"]}, {"A": "1"}, "key_provider kms"),
        ({"key_provider": "kms"}, {"A": "1"}, "allowed_envs lacks A"),
        ({"kms_enabled": True, "allowed_envs": ["A"]}, {"A": "1", "B": "2"}, "allowed_envs lacks B"),
        ({"key_provider": "kms", "allowed_envs": ["1A"]}, {"1A": "1"}, "no name"),
        ({"key_provider": "kms", "allowed_envs": ["A"]}, {"A": "x" * 131_073}, "value of A is over"),
    ],
)
def test_what_a_guest_would_drop_silently_is_refused(
    compose: dict[str, Any], environment: dict[str, str], why: str
) -> None:
    """Before anything is sent."""
    with pytest.raises(VmmRefused, match=why):
        require_allowed(json.dumps(compose).encode(), environment)


def test_an_environment_that_is_too_large_is_refused(kms: Kms) -> None:
    """A guest reads 256 KiB of it."""
    with pytest.raises(VmmRefused, match="at most"):
        seal(dict.fromkeys(("A", "B", "C"), "x" * 100000), kms.public)


def test_the_app_id_is_of_the_bytes_as_sent() -> None:
    """Twenty bytes."""
    assert app_id_of(KMS) == hashlib.sha256(KMS).digest()[:20]
