"""The published vectors are what the code does, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from platform_protocol.session import v1
from platform_protocol.signing import signing_payload, verify

VECTORS = Path(__file__).parents[1] / "vectors"


def test_the_program_makes_the_published_files(tmp_path: Path) -> None:
    (tmp_path / "request-signing.json").write_text((VECTORS / "request-signing.json").read_text())
    subprocess.run([sys.executable, str(VECTORS / "make_vectors.py"), str(tmp_path)], check=True, timeout=50)
    for name in ("request-signing.json", "session-v2.json", "session-v1.json"):
        assert (tmp_path / name).read_text() == (VECTORS / name).read_text(), name


def test_both_sides_bind_the_same_report_data() -> None:
    vector = json.loads((VECTORS / "session-v2.json").read_text())
    assert vector["report_data"] == vector["report_data_of_the_challenge"]


def test_the_signature_verifies_over_the_payload() -> None:
    vector = json.loads((VECTORS / "request-signing.json").read_text())
    keys = ("method", "path", "timestamp_ms", "nonce", "audience", "instance")
    payload = signing_payload(**{key: vector[key] for key in keys}, body=vector["body"].encode())
    assert payload.decode() == vector["payload"]
    assert verify(vector["address"], payload, bytes.fromhex(vector["headers"]["X-Signature"]))
    assert not verify(vector["address"], payload + b" ", bytes.fromhex(vector["headers"]["X-Signature"]))


def test_version_1_is_what_deployed_challenges_speak() -> None:
    """Shared 01x32, salt 02x32, nonce 03x12: figures from a deployed implementation."""
    key = v1.derive_key(b"\x01" * 32, b"\x02" * 32)
    assert key.hex() == "da171ea3572314c3cac2acbaa16b50876b9f12057c8c5256e740f8e667f655d4"
    envelope = json.loads(v1.EnvelopeChannel(key, lambda size: b"\x03" * size).seal(b'{"type":"orm_ready"}'))
    assert envelope["ciphertext"] == "lxB12PPI7+yY/SiyKBiy3kASWa1fd5TTsiY0GeHmP0PYZunO"
