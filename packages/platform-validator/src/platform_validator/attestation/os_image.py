"""Which OS images are known: the operator's file of measurements, and a quote against it.

The event log's identity means something only because a known kernel and initrd measured it: an image of an
attacker's could extend RTMR3 with whatever it likes.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import tempfile
import tomllib
from dataclasses import dataclass
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
    """The measurements (hex) of an image at a shape. `origin` says where they come from."""

    image: str
    shape: Shape
    mrtd: str
    rtmr0: str
    rtmr1: str
    rtmr2: str
    origin: str


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
            **{name: _text_of(row, where, name, _REGISTER) for name in _REGISTERS},
        )
        for where, row in _rows(value, "pinned", {"image", "origin", *_SHAPE, *_REGISTERS})
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
) -> str | None:
    """What is wrong with what booted, or None: it is what the image is known to boot to at that shape."""
    if known.fault is not None:
        return known.fault
    candidates = [one for one in known.pinned if (one.image, one.shape) == (image, shape)]
    found = {
        "mrtd": body.mrtd.hex(),
        **{f"rtmr{number}": body.rtmrs[number].hex() for number in range(3)},
    }
    wrong = [[name for name in _REGISTERS if getattr(one, name) != found[name]] for one in candidates]
    if [] in wrong:
        return None
    hashes = {one.os_image_hash for one in known.published if one.image == image}
    if hashes and carries_document(vm_config):
        return _check_published(hashes, found, identity, shape, vm_config)
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
    hashes: set[str], found: dict[str, str], identity: Identity, shape: Shape, vm_config: str
) -> str | None:
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
    return f"the published image does not boot to the measured {', '.join(wrong)}" if wrong else None


def _rows(value: dict[str, Any], name: str, keys: set[str]) -> list[tuple[str, dict[str, Any]]]:
    rows = value.get(name, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ImagesInvalid(f"expected [[{name}]] tables")
    for number, row in enumerate(rows, 1):
        if row.keys() != keys:
            odd = ", ".join(sorted(row.keys() ^ keys))
            raise ImagesInvalid(f"[[{name}]] {number}: expected {', '.join(sorted(keys))}; see {odd}")
    return [(f"[[{name}]] {number}", row) for number, row in enumerate(rows, 1)]


def _text_of(row: dict[str, Any], where: str, name: str, form: re.Pattern[str] | None) -> str:
    found = row[name]
    if not isinstance(found, str) or (form is not None and form.fullmatch(found) is None):
        expected = f"text like {form.pattern}" if form is not None else "text"
        raise ImagesInvalid(f"{where}: {name}: expected {expected}, got {str(found)[:120]!r}")
    return found


def _count_of(row: dict[str, Any], where: str, name: str) -> int:
    found = row[name]
    if not isinstance(found, int) or isinstance(found, bool) or found < (name != "gpus"):
        raise ImagesInvalid(f"{where}: {name}: expected a count, got {str(found)[:120]!r}")
    return found


def _quoted(text: str) -> str:
    """A TOML basic string: what this writes is plain text; anything else is replaced."""
    plain = "".join(one if one.isprintable() and one not in '"\\' else "?" for one in text)
    return f'"{plain}"'
