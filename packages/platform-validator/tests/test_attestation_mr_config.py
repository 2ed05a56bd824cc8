"""MRCONFIGID: it binds the app in each of dstack's forms."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import pytest
from images_vector import BODY, EVENTS

from platform_validator.attestation.keccak import SHA3_PAD, keccak_256
from platform_validator.attestation.mr_config import BoundApp, check_mr_config_id, mr_config_id

APP = BoundApp("ab" * 32, "ab" * 20, "cd" * 20, "kms", "00ff")


@pytest.mark.parametrize("form", [1, 2, 3])
def test_each_form_of_mr_config_id_binds_the_app(form: int) -> None:
    value = mr_config_id(form, APP)
    assert (value[0], value[33:]) == (form, bytes(15))
    assert check_mr_config_id(value, APP, "{}") is None
    assert check_mr_config_id(value, replace(APP, compose_hash="ba" * 32), "{}")
    if form > 1:
        assert check_mr_config_id(value, replace(APP, provider_id="00fe"), "{}")
        assert check_mr_config_id(value, replace(APP, provider="tpm"), "{}")


def test_a_real_mr_config_id_binds_its_compose() -> None:
    """Form 1, from a real machine."""
    app = next(event.event_payload for event in EVENTS if event.event == "compose-hash")
    bound = replace(APP, compose_hash=app, app_id=app[:40])
    assert BODY.mr_config_id[0] == 1
    assert check_mr_config_id(BODY.mr_config_id, bound, "{}") is None


def test_keccak_is_keccak() -> None:
    """Two published digests; with the other padding it is hashlib's SHA3-256 at every block's edge."""
    assert keccak_256(b"").hex() == "c5d2460186f7233c927e7db2dcc703c0e500b653ca82273b7bfad8045d85a470"
    assert keccak_256(b"abc").hex() == "4e03657aea45a94fc7d47ba826c8d667c0d1e6e33a64a036ec44f58fa12d6c45"
    for size in (0, 1, 135, 136, 137, 271, 272, 300):
        data = bytes(one % 251 for one in range(size))
        assert keccak_256(data, pad=SHA3_PAD) == hashlib.sha3_256(data).digest()
