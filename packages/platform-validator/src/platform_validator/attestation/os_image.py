"""Which OS images are known: the operator's file of measurements, and a quote against it.

The event log's identity means something only because a known kernel and initrd measured it: an image of an
attacker's could extend RTMR3 with whatever it likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import tempfile
import tomllib
from collections.abc import Set as AbstractSet
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from platform_protocol.resources import Resources
from platform_validator.attestation.event_log import Identity
from platform_validator.attestation.lite import LiteInvalid, carries_document, lite_measurements
from platform_validator.attestation.quote import QuoteBody
from platform_validator.errors import ValidatorError

_MAX_FILE = 1024 * 1024
_REGISTER = re.compile(r"[0-9a-f]{96}")
_HASH = re.compile(r"[0-9a-f]{64}")
_IMAGE = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_MOMENT = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ")
_FIRST_USE_ORIGIN = re.compile(r"first use \((?:simulated, )?measured (\S+) ")
"""How an origin begins that was pinned before entries had `first_use`."""
_REGISTERS = ("mrtd", "rtmr0", "rtmr1", "rtmr2")
_SHAPE = ("cpu", "memory_mb", "gpus")
_HEAD = (
    "# OS images whose measurements this validator knows (attestation.images_file).\n"
    "# [[pinned]]: MRTD and RTMR0 to 2 of an image at one shape. [[published]]: images that carry their own\n"
    "# measurement document, by the os_image_hash that their publisher names.\n"
)


class ImagesInvalid(ValidatorError):
    """The file of known images cannot be used; the message says what is expected."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What RTMR0 depends on besides the image: vCPUs, memory, GPUs."""

    cpu: int
    memory_mb: int
    gpus: int = 0

    @classmethod
    def of(cls, resources: Resources) -> Shape:
        """A CVM's."""
        return cls(resources.cpu_cores, resources.memory_mb, resources.gpu_count)

    def __str__(self) -> str:
        gpus = f", {self.gpus} GPUs" if self.gpus else ""
        return f"{self.cpu} vCPUs, {self.memory_mb} MB{gpus}"


@dataclass(frozen=True, slots=True)
class Pinned:
    """The measurements (hex) of an image at a shape. `origin` says where they come from.

    `first_use` (RFC 3339): when a host showed them, where nobody else vouches for them; else None.
    """

    image: str
    shape: Shape
    mrtd: str
    rtmr0: str
    rtmr1: str
    rtmr2: str
    origin: str
    first_use: str | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """An image that carries its own measurement document."""

    image: str
    os_image_hash: str
    origin: str


@dataclass(frozen=True, slots=True)
class KnownImages:
    """The file's content. `digest` changes with it; one with a `fault` cannot be used: nothing is known."""

    pinned: tuple[Pinned, ...] = ()
    published: tuple[Published, ...] = ()
    digest: str = ""
    fault: str | None = None


class Trust(StrEnum):
    """How the OS image that a CVM booted came to be trusted; as in receipts."""

    PINNED = "pinned"
    FIRST_USE = "pinned_first_use"
    PUBLISHED = "published"
    UNKNOWN = "unknown"
    NOT_CHECKED = "not_checked"


@dataclass(frozen=True, slots=True)
class ImageTrust:
    """What a judgement came to about an OS image at a shape.

    `origin` and `first_use` are those of the entry that holds; `vm_config` is the guest's, with the document
    of a published image. UNKNOWN: no entry holds, and the policy only warns; NOT_CHECKED: it does not ask.
    """

    trust: Trust
    image: str
    shape: Shape
    origin: str | None = None
    first_use: str | None = None
    vm_config: str | None = None

    def told(self) -> str:
        """As a journal keeps it and a receipt tells it: a JSON object."""
        said = {"trust": self.trust.value, "image": self.image, **asdict(self.shape)}
        said |= {"origin": self.origin, "first_use": self.first_use}
        return json.dumps(said if self.vm_config is None else said | {"vm_config": self.vm_config})


class ImagesFile:
    """The operator's file, read again when it has changed. One that is missing knows no image.

    Args:
        path: TOML.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._seen: tuple[int, int, int] | None = None
        self._known = KnownImages()

    def known(self) -> KnownImages:
        """What it says now; when it cannot be used, nothing, with the fault."""
        try:
            status = self.path.stat()
        except FileNotFoundError:
            self._seen, self._known = None, KnownImages()
            return self._known
        except OSError as error:
            return KnownImages(fault=f"{self.path} cannot be read: {error.strerror}")
        seen = status.st_mtime_ns, status.st_size, status.st_ino
        if seen != self._seen:
            try:
                known = read_images(self._text())
            except (ImagesInvalid, OSError) as error:
                known = KnownImages(digest=repr(seen), fault=f"{self.path} cannot be used: {error}")
            self._known, self._seen = known, seen
        return self._known

    def add(self, pinned: Pinned) -> None:
        """Append an entry, durably; the rest of the file stays as the operator wrote it.

        Raises:
            ImagesInvalid: The file that is there cannot be used: it is left alone.
            OSError: It cannot be written.
        """
        text = ""
        with contextlib.suppress(FileNotFoundError):
            text = self._text()
            read_images(text)
        lines = [f"\n[[pinned]]\nimage = {_quoted(pinned.image)}\n"]
        lines += [f"{name} = {getattr(pinned.shape, name)}\n" for name in _SHAPE]
        lines += [f"{name} = {_quoted(getattr(pinned, name))}\n" for name in (*_REGISTERS, "origin")]
        lines += [f"first_use = {_quoted(pinned.first_use)}\n"] if pinned.first_use is not None else []
        whole = (text.rstrip("\n") + "\n" if text.strip() else _HEAD) + "".join(lines)
        read_images(whole)
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=self.path.parent, prefix=".", suffix=".part")
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(whole)
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(self.path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise

    def _text(self) -> str:
        if self.path.stat().st_size > _MAX_FILE:
            raise ImagesInvalid(f"expected at most {_MAX_FILE} bytes")
        try:
            return self.path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ImagesInvalid("expected UTF-8") from error


def read_images(text: str) -> KnownImages:
    """Read the file's text.

    Raises:
        ImagesInvalid: What is wrong, and where.
    """
    try:
        value = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ImagesInvalid(f"not TOML: {error}") from error
    unknown = sorted(value.keys() - {"pinned", "published"})
    if unknown:
        raise ImagesInvalid(f"expected [[pinned]] and [[published]], got {', '.join(unknown)}")
    pinned = tuple(
        Pinned(
            image=_text_of(row, where, "image", _IMAGE),
            shape=Shape(*(_count_of(row, where, name) for name in _SHAPE)),
            origin=_text_of(row, where, "origin", None),
            first_use=_first_use(row, where),
            **{name: _text_of(row, where, name, _REGISTER) for name in _REGISTERS},
        )
        for where, row in _rows(
            value, "pinned", {"image", "origin", *_SHAPE, *_REGISTERS}, optional={"first_use"}
        )
    )
    published = tuple(
        Published(
            _text_of(row, where, "image", _IMAGE),
            _text_of(row, where, "os_image_hash", _HASH),
            _text_of(row, where, "origin", None),
        )
        for where, row in _rows(value, "published", {"image", "os_image_hash", "origin"})
    )
    return KnownImages(pinned, published, hashlib.sha256(text.encode()).hexdigest())


def check_os_image(
    known: KnownImages, body: QuoteBody, identity: Identity, *, image: str, shape: Shape, vm_config: str
) -> ImageTrust | str:
    """Why what booted is trusted: the image is known to boot to it at that shape; else what is wrong."""
    if known.fault is not None:
        return known.fault
    candidates = [one for one in known.pinned if (one.image, one.shape) == (image, shape)]
    found = {
        "mrtd": body.mrtd.hex(),
        **{f"rtmr{number}": body.rtmrs[number].hex() for number in range(3)},
    }
    wrong = [[name for name in _REGISTERS if getattr(one, name) != found[name]] for one in candidates]
    holding = [one for one, differs in zip(candidates, wrong, strict=True) if not differs]
    hashes = {one.os_image_hash: one for one in known.published if one.image == image}
    if holding:
        # Of two entries with the same values, one that somebody vouches for says more.
        entry = min(holding, key=lambda one: one.first_use is not None)
        trust = Trust.PINNED if entry.first_use is None else Trust.FIRST_USE
        return ImageTrust(trust, image, shape, entry.origin, entry.first_use)
    if hashes and carries_document(vm_config):
        published = _check_published(hashes, found, identity, shape, vm_config)
        if isinstance(published, str):
            return published
        return ImageTrust(Trust.PUBLISHED, image, shape, published.origin, vm_config=vm_config)
    if not wrong:
        return (
            f"no measurements are known of image {image} at {shape}: "
            f"validator attestation pin --image {image} --cpu {shape.cpu} --memory {shape.memory_mb}"
            + (f" --gpus {shape.gpus}" if shape.gpus else "")
        )
    names = min(wrong, key=len)
    details = "; ".join(
        f"{name.upper()}: pinned {getattr(candidates[wrong.index(names)], name)}, measured {found[name]}"
        for name in names
    )
    return f"image {image} at {shape} booted to something else: {details}"


def _check_published(
    hashes: dict[str, Published], found: dict[str, str], identity: Identity, shape: Shape, vm_config: str
) -> Published | str:
    try:
        computed = lite_measurements(vm_config, identity.events, memory_mb=shape.memory_mb)
    except LiteInvalid as error:
        return f"the measurements of the published image cannot be computed: {error}"
    if computed.os_image_hash not in hashes:
        expected = " or ".join(sorted(hashes))
        return f"expected os_image_hash {expected}, the document is of {computed.os_image_hash}"
    wrong = [] if found["mrtd"] in {one.hex() for one in computed.mrtds} else ["MRTD"]
    wrong += [
        f"RTMR{number}"
        for number, value in enumerate((computed.rtmr0, computed.rtmr1, computed.rtmr2))
        if found[f"rtmr{number}"] != value.hex()
    ]
    if wrong:
        return f"the published image does not boot to the measured {', '.join(wrong)}"
    return hashes[computed.os_image_hash]


def _rows(
    value: dict[str, Any], name: str, keys: set[str], *, optional: AbstractSet[str] = frozenset()
) -> list[tuple[str, dict[str, Any]]]:
    rows = value.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ImagesInvalid(f"expected [[{name}]] tables")
    for number, row in enumerate(rows, 1):
        if row.keys() - optional != keys:
            odd = ", ".join(sorted((row.keys() - optional) ^ keys))
            raise ImagesInvalid(f"[[{name}]] {number}: expected {', '.join(sorted(keys))}; see {odd}")
    return [(f"[[{name}]] {number}", row) for number, row in enumerate(rows, 1)]


def _text_of(row: dict[str, Any], where: str, name: str, form: re.Pattern[str] | None) -> str:
    found = row[name]
    if not isinstance(found, str) or (form is not None and form.fullmatch(found) is None):
        expected = f"text like {form.pattern}" if form is not None else "text"
        raise ImagesInvalid(f"{where}: {name}: expected {expected}, got {str(found)[:120]!r}")
    return found


def _first_use(row: dict[str, Any], where: str) -> str | None:
    if "first_use" in row:
        return _text_of(row, where, "first_use", _MOMENT)
    told = _FIRST_USE_ORIGIN.match(_text_of(row, where, "origin", None))
    return told[1] if told is not None else None


def _count_of(row: dict[str, Any], where: str, name: str) -> int:
    found = row[name]
    if not isinstance(found, int) or isinstance(found, bool) or found < (name != "gpus"):
        raise ImagesInvalid(f"{where}: {name}: expected a count, got {str(found)[:120]!r}")
    return found


def _quoted(text: str) -> str:
    """A TOML basic string: what this writes is plain text; anything else is replaced."""
    plain = "".join(one if one.isprintable() and one not in '"\\' else "?" for one in text)
    return f'"{plain}"'
