"""The demo's miners: made-up keys, real signed uploads."""

from __future__ import annotations

import io
import json
import secrets
import tarfile
import time
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from platform_protocol.signing import Keypair, audience_of, sign_request


@dataclass(frozen=True, slots=True)
class Upload:
    """A submission on its way: `examples/<challenge>/submissions/<miner>/<name>`."""

    challenge: str
    miner: str
    name: str
    folder: Path


def find_uploads(examples: Path) -> list[Upload]:
    """Every submission that ships with the examples."""
    found = sorted(examples.glob("*/submissions/*/*"))
    return [
        Upload(path.parents[2].name, path.parent.name, path.name, path)
        for path in found
        if path.is_dir() and not path.name.startswith("_")
    ]


def upload(base: str, challenge_id: str, miner: Keypair, what: Upload) -> dict[str, Any]:
    """Sign and send a submission; returns the API's answer.

    Raises:
        OSError: Refused or unreachable.
    """
    return send(base, challenge_id, miner, f"{what.name}.tar.gz", _archive(what.folder))


def send(base: str, challenge_id: str, miner: Keypair, filename: str, body: bytes) -> dict[str, Any]:
    """Sign and send these bytes as a submission; returns the API's answer.

    Raises:
        OSError: Refused or unreachable.
    """
    path = f"/challenges/{challenge_id}/submissions"
    headers = sign_request(
        miner,
        method="POST",
        path=path,
        body=body,
        audience=audience_of(base),
        instance="",
        timestamp_ms=time.time_ns() // 1_000_000,
        nonce=secrets.token_hex(16),
        role="miner",
    )
    headers |= {"X-Filename": filename, "Content-Type": "application/octet-stream"}
    request = urllib.request.Request(base + path, body, headers)  # noqa: S310 - our own loopback URL
    with urllib.request.urlopen(request, timeout=30) as response:  # noqa: S310 - as above
        answer: dict[str, Any] = json.load(response)
    return answer


def _archive(folder: Path) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                tar.add(path, path.relative_to(folder).as_posix())
    return out.getvalue()
