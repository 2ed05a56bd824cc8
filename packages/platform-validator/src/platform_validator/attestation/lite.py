"""dstack's "lite" measurements: what an image that carries its own measurement document boots to.

The image is named by SHA-256 of its checksum file (`os_image_hash`), which lists the document's SHA-256. From
the document and the memory size follow MRTD, RTMR1 and RTMR2, and RTMR0 but for three ACPI tables, whose
digests are taken from the event log: **their contents stay unverified**. Facts from dstack after v0.5.11
(dstack-mr): images from 0.6.0 on, 2 GiB of memory or at least 2.75 GiB, where QEMU's patch of the kernel does
not depend on the size.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from platform_protocol.event_log import Event
from platform_validator.attestation.cbor import CborInvalid, Value, read_cbor
from platform_validator.errors import ValidatorError

MIB = 1024 * 1024
_MAX_CONFIG = 256 * 1024
_DOCUMENT_NAME = "measurement.tdx.cbor"
_VERSION = 3
_SHA384 = 48
_PAGE = 0x1000
_TWO_GIB, _HIGH = 0x8000_0000, 0xB000_0000
_FOUR_GIB = 0x1_0000_0000
_MAX_RANGES = 64
_ACPI = ("acpi-loader", "acpi-rsdp", "acpi-tables")
# Digests of OVMF before 202505 as dstack builds it: its configuration volume, and Boot0000 (its UiApp).
_CFV = bytes.fromhex(
    "344bc51c980ba621aaa00da3ed7436f7d6e549197dfe699515dfa2c6583d95e6412af21c097d473155875ffd561d6790"
)
_BOOT0000 = bytes.fromhex(
    "23ada07f5261f12f34a0bd8e46760962d6b4d576a416f1fea1c64bc656b1d28eacf7047ae6e967c58fd2a98bfa74c298"
)
_GLOBAL = bytes.fromhex("61dfe48bca93d211aa0d00e098032b8c")
_SECURITY = bytes.fromhex("cbb219d73a3d9645a3bcdad00e67656f")
_VARIABLES = (
    (_GLOBAL, "SecureBoot"),
    (_GLOBAL, "PK"),
    (_GLOBAL, "KEK"),
    (_SECURITY, "db"),
    (_SECURITY, "dbx"),
)
_KERNEL_EVENTS = (
    b"Calling EFI Application from Boot Option",
    bytes(4),
    b"Exit Boot Services Invocation",
    b"Exit Boot Services Returned with Success",
)


class LiteInvalid(ValidatorError):
    """The guest's configuration carries no document that can be used; the message says why."""


@dataclass(frozen=True, slots=True)
class LiteMeasurements:
    """What such an image boots to at one size: 48 bytes each; MRTD by the order in which QEMU adds pages."""

    os_image_hash: str
    mrtds: tuple[bytes, ...]
    rtmr0: bytes
    rtmr1: bytes
    rtmr2: bytes


def carries_document(vm_config: str) -> bool:
    """Whether a guest's configuration says that it is of such an image."""
    try:
        return "tdx_measurement" in _config(vm_config)
    except LiteInvalid:
        return False


def lite_measurements(vm_config: str, events: Sequence[Event], *, memory_mb: int) -> LiteMeasurements:
    """Compute them. `vm_config` is untrusted: only what hashes to `os_image_hash` is used.

    Args:
        vm_config: As the guest gave it (JSON).
        events: The event log, of which the digests of three named ACPI events are taken.
        memory_mb: What was asked for.

    Raises:
        LiteInvalid: No document, not the image's, or a size that it cannot be computed for.
    """
    config = _config(vm_config)
    memory = memory_mb * MIB
    if memory != _TWO_GIB and memory < _HIGH:
        raise LiteInvalid(
            f"expected 2048 MB or at least {_HIGH // MIB} MB of memory, got {memory_mb}: at other sizes the "
            "kernel's measurement depends on the exact size, and must be pinned"
        )
    os_image_hash, document = _document(config)
    image, tdvf = _table(document, "image"), _table(document, "tdvf")
    if document.get("version") != _VERSION or tdvf.get("ovmf") != "pre202505":
        raise LiteInvalid(
            f"expected a measurement document of version {_VERSION} for OVMF pre202505, got "
            f"{document.get('version')!r}, {tdvf.get('ovmf')!r}"
        )
    mrtd, witness = _table(tdvf, "mrtd"), tdvf.get("td_hob")
    if not isinstance(witness, bytes):
        raise LiteInvalid("the document has no td_hob")
    variables = [_variable(guid, name) for guid, name in _VARIABLES]
    return LiteMeasurements(
        os_image_hash=os_image_hash,
        mrtds=(_digest(mrtd, "single_pass"), _digest(mrtd, "two_pass")),
        rtmr0=_extended(
            [
                _td_hob(witness, memory),
                _CFV,
                *variables,
                _sha384(bytes(4)),
                *_acpi(events),
                _sha384(bytes(2)),
                _BOOT0000,
            ]
        ),
        rtmr1=_extended([_digest(image, "kernel_authenticode"), *map(_sha384, _KERNEL_EVENTS)]),
        rtmr2=_extended([_digest(image, "cmdline_sha384"), _digest(image, "initrd_sha384")]),
    )


def _config(vm_config: str) -> dict[str, Any]:
    try:
        value = json.loads(vm_config) if len(vm_config) <= _MAX_CONFIG else None
    except (ValueError, RecursionError) as error:
        raise LiteInvalid("vm_config is not JSON") from error
    if not isinstance(value, dict):
        raise LiteInvalid("vm_config is no JSON object of at most 256 KiB")
    return value


def _document(config: dict[str, Any]) -> tuple[str, dict[str, Value]]:
    """(os_image_hash, the document), each link of the chain of hashes checked."""
    given = config.get("tdx_measurement")
    try:
        if not isinstance(given, dict):
            raise LiteInvalid("vm_config carries no tdx_measurement")
        listing = base64.b64decode(str(given["checksum_file"]), validate=True)
        packed = base64.b64decode(str(given["measurement"]), validate=True)
        lines = [line.split() for line in listing.decode().splitlines()]
        document = read_cbor(packed)
    except (ValueError, KeyError, CborInvalid) as error:
        raise LiteInvalid(f"tdx_measurement cannot be read: {error}") from error
    digest = hashlib.sha256(packed).hexdigest()
    entries = [words[0] for words in lines if len(words) == 2 and words[1].lstrip("*") == _DOCUMENT_NAME]  # noqa: PLR2004 - digest and name
    if entries != [digest]:
        raise LiteInvalid(f"the checksum file lists another {_DOCUMENT_NAME}")
    if not isinstance(document, dict):
        raise LiteInvalid("the measurement document is no map")
    return hashlib.sha256(listing).hexdigest(), document


def _table(value: dict[str, Value], name: str) -> dict[str, Value]:
    found = value.get(name)
    if not isinstance(found, dict):
        raise LiteInvalid(f"the measurement document has no map {name}")
    return found


def _digest(value: dict[str, Value], name: str) -> bytes:
    found = value.get(name)
    if not isinstance(found, bytes) or len(found) != _SHA384:
        raise LiteInvalid(f"the measurement document has no SHA-384 {name}")
    return found


def _acpi(events: Sequence[Event]) -> list[bytes]:
    found = []
    for name in _ACPI:
        digests = [event.digest for event in events if event.imr == 0 and event.event == name]
        if len(digests) != 1 or len(digests[0]) != 2 * _SHA384:
            raise LiteInvalid(f"expected one event {name} in RTMR0, found {len(digests)}")
        found.append(bytes.fromhex(digests[0]))
    return found


def _variable(guid: bytes, name: str) -> bytes:
    """An EFI variable that is not set, as OVMF measures it: GUID, length of the name, no data."""
    return _sha384(guid + len(name).to_bytes(8, "little") + bytes(8) + name.encode("utf-16-le"))


def _td_hob(witness: bytes, memory: int) -> bytes:
    """The digest of the TD HOB that QEMU writes: which memory the firmware has accepted, and which not.

    The witness is varints, in pages: base, the HOB's own page above it, a count, and for each accepted range
    its start above base and its length.
    """
    numbers = _varints(witness)
    base, hob, count, *rest = numbers if len(numbers) > 2 else [0, 0, -1]  # noqa: PLR2004 - the three heads
    if len(rest) != 2 * count or count > _MAX_RANGES:
        raise LiteInvalid("td_hob has another form")
    accepted = [
        ((base + start) * _PAGE, (base + start + pages) * _PAGE)
        for start, pages in zip(rest[::2], rest[1::2], strict=True)
    ]
    resources = _resources(accepted, memory)
    body = b"".join(_resource(*one) for one in resources)
    end = (base + hob) * _PAGE + 56 + len(body) + 8
    head = bytes([1, 0, 56, 0]) + bytes(4) + (9).to_bytes(4, "little") + bytes(4 + 4 * 8)
    return _sha384(head + end.to_bytes(8, "little") + body)


def _resources(accepted: Iterable[tuple[int, int]], memory: int) -> list[tuple[int, int, int]]:
    """(type, start, length): 0 accepted system memory, 7 unaccepted. High memory begins at 4 GiB."""
    found, at = [], 0
    for start, end in sorted(accepted):
        if start < at or end > memory or start >= end:
            raise LiteInvalid("td_hob has ranges that overlap or are outside of memory")
        if start > at:
            found.append((7, at, start - at))
        found.append((0, start, end - start))
        at = end
    if memory < _HIGH:
        return [*found, (7, at, memory - at)]
    if at < _TWO_GIB:
        found.append((7, at, _TWO_GIB - at))
    return [*found, (7, _FOUR_GIB, memory - _TWO_GIB)]


def _resource(kind: int, start: int, length: int) -> bytes:
    head = bytes([3, 0, 48, 0]) + bytes(4 + 16) + kind.to_bytes(4, "little") + (7).to_bytes(4, "little")
    return head + start.to_bytes(8, "little") + length.to_bytes(8, "little")


def _varints(data: bytes) -> list[int]:
    numbers, value, shift = [], 0, 0
    for byte in data:
        value |= (byte & 0x7F) << shift
        shift += 7
        if not byte & 0x80:
            numbers.append(value)
            value = shift = 0
        elif shift > 35:  # noqa: PLR2004 - five groups: pages of 2^47 bytes
            raise LiteInvalid("td_hob has a number that is too large")
    if shift:
        raise LiteInvalid("td_hob ends early")
    return numbers


def _extended(digests: Iterable[bytes]) -> bytes:
    register = bytes(_SHA384)
    for digest in digests:
        register = _sha384(register + digest)
    return register


def _sha384(data: bytes) -> bytes:
    return hashlib.sha384(data).digest()
