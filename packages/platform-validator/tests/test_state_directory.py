"""The state directory and its keyring: private, refused where others can write, one daemon at a time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from platform_validator.keyring import Keyring, KeyringBroken
from platform_validator.state import StateDirectory, StateLocked, StateUnusable


def test_what_is_missing_is_made_private(tmp_path: Path) -> None:
    """Folders 0700; a folder that was there keeps its mode."""
    tmp_path.chmod(0o755)
    state = StateDirectory(tmp_path / "new" / "validator.db")
    state.prepare()
    made = [state.folder, state.folder / "cache", state.folder / "keyring"]
    assert [path.stat().st_mode & 0o777 for path in made] == [0o700] * 3
    assert tmp_path.stat().st_mode & 0o777 == 0o755


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o722])
def test_a_folder_that_others_can_write_is_refused(tmp_path: Path, mode: int) -> None:
    """Naming the command that mends it, and leaving it as it is."""
    tmp_path.chmod(mode)
    with pytest.raises(StateUnusable, match=f"chmod go-w {tmp_path}"):
        StateDirectory(tmp_path / "validator.db").prepare()
    assert tmp_path.stat().st_mode & 0o777 == mode


def test_one_lock_at_a_time(tmp_path: Path) -> None:
    """Released by close, and private."""
    first, second = (StateDirectory(tmp_path / "validator.db") for _ in range(2))
    first.lock()
    with pytest.raises(StateLocked, match="another validator uses"):
        second.lock()
    assert (tmp_path / "validator.lock").stat().st_mode & 0o777 == 0o600
    first.close()
    second.lock()
    second.close()


def test_a_killed_holder_leaves_no_lock(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\nfrom platform_validator.state import StateDirectory\n"
        "state = StateDirectory(pathlib.Path(sys.argv[1]))\nstate.lock()\n"
        "print('locked', flush=True)\ninput()"
    )
    state = StateDirectory(tmp_path / "validator.db")
    with subprocess.Popen(
        [sys.executable, "-c", program, str(state.database)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(StateLocked):
            state.lock()
        holder.kill()
    state.lock()
    state.close()


def test_a_socket_path_that_is_too_long_goes_to_a_private_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """107 bytes are the kernel's limit; the folder is the same at each start."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    short = StateDirectory(Path("/s/validator.db"))
    assert short.socket == Path("/s/validator.sock")
    long = StateDirectory(tmp_path / ("x" * 120) / "validator.db")
    path = long.prepare_socket()
    assert path == long.prepare_socket()
    assert path.parent.parent == tmp_path
    assert path.parent.stat().st_mode & 0o777 == 0o700
    path.parent.chmod(0o750)
    with pytest.raises(StateUnusable, match="not private"):
        long.prepare_socket()


def test_sealed_data_opens_under_the_same_key_and_context(tmp_path: Path) -> None:
    """Also after a restart; never in clear, and never twice the same."""
    ring = Keyring.open_or_create(tmp_path / "keyring")
    sealed = ring.seal(b"launch secret", b"pv-1")
    assert b"launch secret" not in sealed
    assert sealed != ring.seal(b"launch secret", b"pv-1")
    assert Keyring.open_or_create(tmp_path / "keyring").open(sealed, b"pv-1") == b"launch secret"
    modes = [path.stat().st_mode & 0o777 for path in (tmp_path / "keyring", tmp_path / "keyring/master.key")]
    assert modes == [0o700, 0o600]


def test_what_was_changed_does_not_open(tmp_path: Path) -> None:
    """Another context, another key, another version, a cut or turned byte."""
    ring = Keyring.open_or_create(tmp_path / "one")
    sealed = ring.seal(b"secret", b"pv-1")
    other = Keyring.open_or_create(tmp_path / "two")
    turned = sealed[:-1] + bytes([sealed[-1] ^ 1])
    for keyring, data, context in (
        (ring, sealed, b"pv-2"),
        (other, sealed, b"pv-1"),
        (ring, b"\x02" + sealed[1:], b"pv-1"),
        (ring, turned, b"pv-1"),
        (ring, sealed[:8], b"pv-1"),
        (ring, b"", b"pv-1"),
    ):
        with pytest.raises(KeyringBroken):
            keyring.open(data, context)


def test_a_cut_key_file_is_refused(tmp_path: Path) -> None:
    """Rather than replaced, which would lose what it sealed."""
    (tmp_path / "master.key").write_bytes(b"short")
    with pytest.raises(KeyringBroken, match="expected 32 bytes, found 5"):
        Keyring.open_or_create(tmp_path)
