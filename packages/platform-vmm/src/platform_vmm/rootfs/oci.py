"""An OCI image layout, written without a container engine: a folder that registries' clients take."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from platform_vmm.rootfs.errors import PackageRefused

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
_NO_TIME = "1970-01-01T00:00:00Z"


class Blob(NamedTuple):
    """Where a blob lies, its digest (`sha256:…`) and its size in bytes."""

    path: Path
    digest: str
    size: int


class Layout(NamedTuple):
    """What a layout holds, read back and checked blob by blob."""

    digest: str
    layers: tuple[Blob, ...]
    config: dict[str, Any]
    size: int
    """Of all blobs together."""


def write_layout(
    folder: Path, *, layer: Path, content_sha256: str, run: Mapping[str, Any], name: str
) -> Layout:
    """Make the layout of an image with one layer.

    Args:
        folder: Where; made here.
        layer: The compressed layer, which is moved into the layout.
        content_sha256: SHA-256 (hex) of the layer before it was compressed.
        run: The configuration's `config`: Cmd, User, Env, Labels.
        name: What the only image of the layout is called in its index.

    Raises:
        OSError: It could not be written.
    """
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)
    packed = _describe(layer)
    layer.rename(blobs / packed.digest.removeprefix("sha256:"))
    config = {
        "architecture": "amd64",
        "config": dict(run),
        "created": _NO_TIME,
        "history": [{"created": _NO_TIME, "created_by": "platform-vmm image build"}],
        "os": "linux",
        "rootfs": {"diff_ids": [f"sha256:{content_sha256}"], "type": "layers"},
    }
    described = _put(blobs, config)
    manifest = _put(
        blobs,
        {
            "config": {"digest": described.digest, "mediaType": CONFIG, "size": described.size},
            "layers": [{"digest": packed.digest, "mediaType": LAYER, "size": packed.size}],
            "mediaType": MANIFEST,
            "schemaVersion": 2,
        },
    )
    entry = {
        "annotations": {"org.opencontainers.image.ref.name": name},
        "digest": manifest.digest,
        "mediaType": MANIFEST,
        "platform": {"architecture": "amd64", "os": "linux"},
        "size": manifest.size,
    }
    index = {
        "manifests": [entry],
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "schemaVersion": 2,
    }
    (folder / "index.json").write_bytes(_bytes(index))
    (folder / "oci-layout").write_bytes(_bytes({"imageLayoutVersion": "1.0.0"}))
    return read_layout(folder)


def read_layout(folder: Path) -> Layout:
    """Read a layout of one image and check every blob against its digest and size.

    Raises:
        PackageRefused: It is no such layout, or a blob is not what it should be.
    """
    try:
        index = json.loads((folder / "index.json").read_bytes())
        version = json.loads((folder / "oci-layout").read_bytes())["imageLayoutVersion"]
        (entry,) = index["manifests"]
        manifest = json.loads(_checked(folder, entry).path.read_bytes())
        config = json.loads(_checked(folder, manifest["config"]).path.read_bytes())
        layers = tuple(_checked(folder, layer) for layer in manifest["layers"])
        size = entry["size"] + manifest["config"]["size"] + sum(layer.size for layer in layers)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PackageRefused(f"{folder}: expected an OCI image layout of one image: {error!r}") from error
    if version != "1.0.0":
        raise PackageRefused(f"{folder}: expected an image layout of version 1.0.0, got {version!r}")
    return Layout(entry["digest"], layers, config, size)


def _checked(folder: Path, descriptor: Mapping[str, Any]) -> Blob:
    algorithm, _, value = str(descriptor["digest"]).partition(":")
    if algorithm != "sha256" or not value.isalnum():
        raise PackageRefused(f"{folder}: expected a digest sha256:…, got {descriptor['digest']!r}")
    found = _describe(folder / "blobs/sha256" / value)
    if (found.digest, found.size) != (descriptor["digest"], descriptor["size"]):
        raise PackageRefused(f"{found.path}: expected {descriptor['size']} bytes of {descriptor['digest']}")
    return found


def _describe(path: Path) -> Blob:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Blob(path, f"sha256:{digest}", path.stat().st_size)


def _put(blobs: Path, document: Mapping[str, Any]) -> Blob:
    data = _bytes(document)
    path = blobs / hashlib.sha256(data).hexdigest()
    path.write_bytes(data)
    return _describe(path)


def _bytes(document: Mapping[str, Any] | Sequence[Any]) -> bytes:
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
