"""MRCONFIGID: what the host bound into a TD when it made it, in dstack's three forms: pure.

Form 1: 01 ‖ compose hash; form 2 (a pinned key provider, v0.5.2 to v0.5.11): 02 ‖ Keccak-256(compose hash ‖
app id ‖ kind ‖ provider id); form 3 (after v0.5.11): 03 ‖ SHA-256("dstack-mr-config-v3:" ‖ 00 ‖ document).
Each is filled up with zeros to 48 bytes; hosts before use_mrconfigid leave it zero.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from platform_protocol.canonical import canonical_json
from platform_validator.attestation.keccak import keccak_256

_BYTES = 48
_KINDS = {"none": 0, "local": 1, "local-sgx": 1, "kms": 2, "tpm": 3}
_DOMAIN = b"dstack-mr-config-v3:\x00"
_MAX_DOCUMENT = 64 * 1024


@dataclass(frozen=True, slots=True)
class BoundApp:
    """What it should bind. All but `provider` (dstack's word for the kind) in lower-case hex."""

    compose_hash: str
    app_id: str
    instance_id: str
    provider: str
    provider_id: str


def check_mr_config_id(value: bytes, app: BoundApp, vm_config: str) -> str | None:
    """What is wrong with it, or None.

    Args:
        value: From the quote, 48 bytes.
        app: From the event log, already judged.
        vm_config: As the guest gave it: may carry form 3's document, which is believed only under its hash.
    """
    form, bound, rest = value[0], value[1:33], value[33:]
    if not any(value):
        return None
    if any(rest):
        return "it has bytes after its hash"
    if form == 1:
        return None if bound.hex() == app.compose_hash else "form 1 binds another compose hash"
    if form == 2:  # noqa: PLR2004 - dstack's form 2
        return _check_provider(bound, app)
    return _check_document(bound, app, vm_config) if form == 3 else f"form {form} is unknown"  # noqa: PLR2004 - and form 3


def mr_config_id(form: int, app: BoundApp) -> bytes:
    """What a host writes for an app, in a form (1 to 3).

    Raises:
        ValueError: Another form.
    """
    if form == 1:
        bound = bytes.fromhex(app.compose_hash)
    elif form == 2:  # noqa: PLR2004 - dstack's form 2
        head = bytes.fromhex(app.compose_hash + app.app_id) + bytes([_KINDS[app.provider]])
        bound = keccak_256(head + bytes.fromhex(app.provider_id))
    elif form == 3:  # noqa: PLR2004 - dstack's form 3
        bound = hashlib.sha256(_DOMAIN + config_document(app, with_instance=True).encode()).digest()
    else:
        raise ValueError(f"expected form 1, 2 or 3, got {form}")
    return (bytes([form]) + bound).ljust(_BYTES, b"\x00")


def config_document(app: BoundApp, *, with_instance: bool) -> str:
    """Form 3's document as a host makes it: canonical JSON, what is empty left out."""
    document: dict[str, object] = {
        "version": 3,
        "app_id": app.app_id,
        "compose_hash": app.compose_hash,
        "key_provider": "local" if app.provider == "local-sgx" else app.provider,
    }
    if app.provider_id:
        document["key_provider_id"] = app.provider_id
    if with_instance and app.instance_id:
        document["instance_id"] = app.instance_id
    return canonical_json(document).decode()


def _check_provider(bound: bytes, app: BoundApp) -> str | None:
    kind = _KINDS.get(app.provider)
    if kind is None:
        return f"form 2 knows no key provider {app.provider[:32]!r}"
    data = bytes.fromhex(app.compose_hash + app.app_id) + bytes([kind]) + bytes.fromhex(app.provider_id)
    return None if keccak_256(data) == bound else "form 2 binds another app or key provider"


def _check_document(bound: bytes, app: BoundApp, vm_config: str) -> str | None:
    given = _document(vm_config)
    tried = [config_document(app, with_instance=one) for one in (False, True)]
    document = next(
        (
            one
            for one in [*([given] if given is not None else []), *tried]
            if hashlib.sha256(_DOMAIN + one.encode()).digest() == bound
        ),
        None,
    )
    if document is None:
        return "form 3 binds a document that is neither in vm_config nor the one that this app gives"
    try:
        said = json.loads(document)
    except (ValueError, RecursionError):
        return "form 3's document is no JSON"
    if not isinstance(said, dict):
        return "form 3's document is no JSON object"
    kind = _KINDS.get(str(said.get("key_provider")))
    for name, expected in (
        ("compose_hash", app.compose_hash),
        ("app_id", app.app_id),
        ("instance_id", app.instance_id),
        ("key_provider_id", app.provider_id),
    ):
        if name in said and str(said[name]).lower() != expected:
            return f"form 3's document says {name} {str(said[name])[:64]}, the event log {expected}"
    if "compose_hash" not in said:
        return "form 3's document names no compose hash"
    return None if kind == _KINDS.get(app.provider) else "form 3's document names another key provider"


def _document(vm_config: str) -> str | None:
    try:
        value = json.loads(vm_config) if len(vm_config) <= _MAX_DOCUMENT else None
    except (ValueError, RecursionError):
        return None
    found = value.get("mr_config") if isinstance(value, dict) else None
    return found if isinstance(found, str) else None
