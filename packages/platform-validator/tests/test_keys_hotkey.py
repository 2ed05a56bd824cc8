"""The hotkey's private key: found by its address in every place where operators keep it."""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nacl import pwhash
from nacl.secret import SecretBox
from typer.main import get_command

from platform_protocol.signing import Keypair
from platform_validator import wallet_file
from platform_validator.cli.main import app
from platform_validator.keys import KeyNotFound, KeyUnusable, find_hotkey, keypair_from_text

# Substrate's published development accounts (docs.substrate.io, "Accounts, addresses, and keys").
PHRASE = "bottom drive obey lake curtain smoke basket hold race lonely fit walk"
ALICE = "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQY"
ALICE_SEED = "0xe5be9a5092b81bca64be81d212e7f2f9eba183bb7a90954f7b76361f6edb5c0a"


def find(home: Path, **places: object) -> Keypair:
    """Alice's key."""
    given: dict[str, object] = {"passphrase": None, "hotkey_file": None} | places
    return find_hotkey(ALICE, home=home, **given)  # type: ignore[arg-type] # each place has its own type


def private(path: Path, text: str) -> Path:
    """A file that only its owner reads."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o600)
    return path


@pytest.mark.parametrize(
    ("text", "address"),
    [
        (PHRASE, "5DfhGyQdFobKM8NsWvEeAKk5EQQgYe9AydgJ7rMB6E1EqRzV"),
        (f"{PHRASE}//Alice", ALICE),
        (f"  {PHRASE.replace(' ', '  ')} //Alice\n", ALICE),
        (f"{PHRASE}//Bob", "5FHneW46xGXgs5mUiveU4sbTyGBzmstUspZC92UhjJM694ty"),
        (f"{PHRASE}//Alice//stash", "5GNJqTPyNqANBkUVMN1LPPrxXnFouWXoe2wNSmmEoLctxiZY"),
        (ALICE_SEED, ALICE),
    ],
)
def test_secrets_give_their_published_addresses(text: str, address: str) -> None:
    assert keypair_from_text(text).address == address


def test_a_soft_junction_and_a_number_give_other_keys() -> None:
    """Three different children, each the same every time."""
    found = [keypair_from_text(f"{PHRASE}{path}").address for path in ("/Alice", "//1", "/1", "//1")]
    assert len(set(found)) == 3
    assert found[1] == found[3]


@pytest.mark.parametrize("text", ["", "abandon " * 12, PHRASE.replace("walk", "fit"), "0x12"])
def test_what_is_no_secret_is_refused_without_being_shown(text: str) -> None:
    with pytest.raises(KeyUnusable) as caught:
        keypair_from_text(text)
    assert "fit" not in str(caught.value)


def test_the_passphrase_is_enough(tmp_path: Path) -> None:
    assert find(tmp_path, passphrase=f"{PHRASE}//Alice").address == ALICE


@pytest.mark.parametrize(
    "text",
    [
        ALICE_SEED,
        f"{PHRASE}//Alice",
        json.dumps({"secretSeed": ALICE_SEED, "ss58Address": ALICE}),
        json.dumps({"secretPhrase": f"{PHRASE}//Alice"}),
    ],
)
def test_a_hotkey_file_holds_a_keyfile_a_mnemonic_or_a_seed(tmp_path: Path, text: str) -> None:
    path = private(tmp_path / "hotkey", text)
    assert find(tmp_path, hotkey_file=path).address == ALICE


def test_a_service_credential_is_used(tmp_path: Path) -> None:
    private(tmp_path / "credentials" / "hotkey", ALICE_SEED)
    assert find(tmp_path, credentials=tmp_path / "credentials").address == ALICE


def test_a_wallet_is_found_by_its_address(tmp_path: Path) -> None:
    """Others are passed over, whatever is in them."""
    wallets = tmp_path / ".bittensor" / "wallets"
    private(wallets / "a" / "hotkeys" / "broken", "{")
    private(wallets / "a" / "hotkeys" / "other", json.dumps({"ss58Address": "5other", "secretSeed": "0x"}))
    mine = {"ss58Address": ALICE, "secretSeed": ALICE_SEED, "publicKey": "0x00"}
    private(wallets / "b" / "hotkeys" / "mine", json.dumps(mine))
    assert find(tmp_path).address == ALICE


def test_coldkeys_are_never_opened(tmp_path: Path) -> None:
    """They lie beside the hotkeys; every file that is opened is noted."""
    wallet = tmp_path / ".bittensor" / "wallets" / "w"
    (wallet / "hotkeys").mkdir(parents=True)
    for name in ("coldkey", "coldkeypub.txt"):
        (wallet / name).write_text("{}")
    key = private(
        wallet / "hotkeys" / "default", json.dumps({"secretSeed": ALICE_SEED, "ss58Address": ALICE})
    )
    program = (
        "import json, sys\nfrom pathlib import Path\nfrom platform_validator.keys import find_hotkey\n"
        "opened = []\n"
        "sys.addaudithook(lambda event, what: opened.append(str(what[0])) if event == 'open' else None)\n"
        f"find_hotkey({ALICE!r}, passphrase=None, hotkey_file=None, home=Path({str(tmp_path)!r}))\n"
        "print(json.dumps([one for one in opened if '.bittensor' in one]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=50, check=True
    )
    opened = json.loads(done.stdout)
    assert str(key) in opened
    assert not [one for one in opened if "/coldkey" in one]


def test_no_command_takes_a_secret_as_a_word() -> None:
    """A command line is there for every user of the machine to read: secrets come from files and prompts."""
    words = re.compile("passw|secret|token|phrase|seed", re.IGNORECASE)

    def options(command: Any, path: tuple[str, ...]) -> Iterator[str]:
        for name, below in getattr(command, "commands", {}).items():
            yield from options(below, (*path, name))
        for parameter in command.params:
            if words.search(str(parameter.name)) and "path" not in type(parameter.type).__name__.lower():
                yield " ".join((*path, str(parameter.name)))

    assert list(options(get_command(app), ())) == []


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """Naming the command that mends it."""
    path = private(tmp_path / "hotkey", ALICE_SEED)
    path.chmod(0o640)
    with pytest.raises(KeyUnusable, match="chmod 600"):
        find(tmp_path, hotkey_file=path)


WALLET = Path(__file__).parent / "data" / "wallet" / "hotkey"
"""Made by bittensor-wallet 4.1.1 of the published phrase, under the password below."""
PASSWORD = "made-up password"
PHRASE_S = "5DfhGyQdFobKM8NsWvEeAKk5EQQgYe9AydgJ7rMB6E1EqRzV"


@pytest.mark.slow(reason="the wallet's key derivation: 8 passes over 512 MiB")
@pytest.mark.timeout(240)
def test_a_real_encrypted_wallet_key_is_opened_with_its_password(tmp_path: Path) -> None:
    """Found by the address that the wallet wrote beside it; the password from a file; the coldkey unread."""
    hotkeys = tmp_path / ".bittensor" / "wallets" / "mine" / "hotkeys"
    private(hotkeys.parent / "coldkey", "").chmod(0)
    private(hotkeys / "default", "").write_bytes(WALLET.read_bytes())
    private(hotkeys / "defaultpub.txt", json.dumps({"ss58Address": PHRASE_S}))
    password = private(tmp_path / "password", f"{PASSWORD}\n")
    found = find_hotkey(PHRASE_S, passphrase=None, hotkey_file=None, home=tmp_path, password_file=password)
    assert found.address == PHRASE_S


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The key derivation at its least cost."""
    monkeypatch.setattr(pwhash.argon2i, "OPSLIMIT_SENSITIVE", pwhash.argon2i.OPSLIMIT_MIN)
    monkeypatch.setattr(pwhash.argon2i, "MEMLIMIT_SENSITIVE", pwhash.argon2i.MEMLIMIT_MIN)


def locked(path: Path, text: str) -> Path:
    """An encrypted key file at that cost."""
    passes, memory = pwhash.argon2i.OPSLIMIT_MIN, pwhash.argon2i.MEMLIMIT_MIN
    key = pwhash.argon2i.kdf(
        SecretBox.KEY_SIZE, PASSWORD.encode(), wallet_file._SALT, opslimit=passes, memlimit=memory
    )
    private(path, "").write_bytes(b"$NACL" + SecretBox(key).encrypt(text.encode()))
    return path


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("given", [PASSWORD, "another"])
def test_a_password_is_zeroed_once_it_was_tried(tmp_path: Path, given: str) -> None:
    """Whether it was right or not."""
    path, password = locked(tmp_path / "hotkey", ALICE_SEED), bytearray(given.encode())
    with contextlib.suppress(wallet_file.PasswordUnusable):
        wallet_file.open_key_file(path, path.read_bytes(), lambda _path: password)
    assert password == bytes(len(given))


@pytest.mark.slow(reason="a traceback is coloured by a library that is loaded for it")
def test_a_crash_of_a_command_shows_no_secret() -> None:
    """A traceback for people has the lines of the source, and not what the variables held."""
    seed = "0x-hunter-four"
    program = (
        "import sys, platform_validator.cli.main\n"
        "commands = sys.modules['platform_validator.cli.main']\n"
        "def broken(address, *, passphrase, **places):\n"
        "    held = passphrase * 2\n"
        "    raise RuntimeError('a bug')\n"
        "commands.find_hotkey = broken\n"
        "commands.main()\n"
    )
    environment = {
        "VALIDATOR_HOTKEY": ALICE,
        "HOTKEY_PASSPHRASE": seed,
        "PLATFORM_BASE_API": "http://127.0.0.1:1",
        "DSTACK_VMM_URL": "http://127.0.0.1:1",
    }
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment,
        capture_output=True,
        text=True,
        timeout=50,
        check=False,
    )
    assert done.returncode == 1
    assert "RuntimeError: a bug" in done.stderr
    assert "hunter" not in done.stdout + done.stderr


@pytest.mark.usefixtures("quick")
def test_the_password_comes_from_a_file_a_credential_or_the_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In that order; without a terminal nobody is asked."""
    path = locked(tmp_path / "hotkey", json.dumps({"secretSeed": ALICE_SEED}))
    password = private(tmp_path / "password", PASSWORD)
    assert find(tmp_path, hotkey_file=path, password_file=password).address == ALICE
    private(tmp_path / "credentials" / "hotkey.password", f"{PASSWORD}\n")
    assert find(tmp_path, hotkey_file=path, credentials=tmp_path / "credentials").address == ALICE
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("getpass.getpass", lambda prompt: PASSWORD if str(path) in prompt else "")
    assert find(tmp_path, hotkey_file=path).address == ALICE


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("data", "password", "said"),
    [
        (None, None, "give its password in a file"),
        (None, "wrong", "is not that of this file"),
        (b"$NACLshort", PASSWORD, "is not that of this file"),
        (b"$ANSIBLE_VAULT;1.1", PASSWORD, "update it there"),
        (b"gAAAAABl", PASSWORD, "update it there"),
    ],
)
def test_an_encrypted_file_that_cannot_be_opened_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes | None, password: str | None, said: str
) -> None:
    """And shows neither password nor key."""
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    path = locked(tmp_path / "hotkey", json.dumps({"secretSeed": ALICE_SEED}))
    if data is not None:
        path.write_bytes(data)
    file = private(tmp_path / "password", password) if password is not None else None
    with pytest.raises(KeyUnusable, match=said) as caught:
        find(tmp_path, hotkey_file=path, password_file=file)
    assert PASSWORD not in str(caught.value)
    assert ALICE_SEED not in repr(caught.value.__cause__)


def test_a_password_that_others_can_read_is_refused(tmp_path: Path) -> None:
    """Like a key."""
    path = private(tmp_path / "hotkey", "$NACLxxxx")
    password = private(tmp_path / "password", PASSWORD)
    password.chmod(0o644)
    with pytest.raises(KeyUnusable, match="password can be read by others: chmod 600"):
        find(tmp_path, hotkey_file=path, password_file=password)


def test_an_encrypted_wallet_key_without_its_address_is_to_be_named(tmp_path: Path) -> None:
    """Its address cannot be seen: it is listed, and nobody is asked for every wallet's password."""
    path = private(tmp_path / ".bittensor" / "wallets" / "a" / "hotkeys" / "locked", "$NACLxxxx")
    with pytest.raises(KeyNotFound, match="encrypted, without its address beside it: name it") as caught:
        find(tmp_path)
    assert str(path) in str(caught.value)


def test_another_address_is_refused(tmp_path: Path) -> None:
    with pytest.raises(KeyUnusable, match="VALIDATOR_HOTKEY is 5Grw"):
        find(tmp_path, passphrase=PHRASE)


def test_a_malformed_file_does_not_show_what_is_in_it(tmp_path: Path) -> None:
    path = private(tmp_path / "hotkey", json.dumps({"secretSeed": "0xnotasecret"}))
    with pytest.raises(KeyUnusable) as caught:
        find(tmp_path, hotkey_file=path)
    assert "notasecret" not in str(caught.value)


def test_no_key_lists_where_it_looked(tmp_path: Path) -> None:
    other = private(tmp_path / ".bittensor" / "wallets" / "a" / "hotkeys" / "other", "{}")
    with pytest.raises(KeyNotFound) as caught:
        find(tmp_path, hotkey_file=tmp_path / "absent", credentials=tmp_path)
    message = str(caught.value)
    assert [str(tmp_path / "absent") in message, str(other) in message, "HOTKEY_PASSPHRASE" in message] == [
        True
    ] * 3
