"""What operators give to challenges: sealed, for one repository, given out only in `configure`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pty
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from author import Author
from job_house import CHALLENGE, CVM, House
from typer.testing import CliRunner, Result

from platform_protocol.ids import ChallengeId
from platform_protocol.platform_messages import ActiveChallenge, IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.spec import parse_platform_toml
from platform_validator.challenges.environment import (
    MAX_NAMES,
    MAX_VALUE,
    Environments,
    EnvRefused,
    GivenEnv,
    ListEnv,
    SetEnv,
    UnsetEnv,
)
from platform_validator.challenges.instance import InstanceView
from platform_validator.challenges.resolve import HostRules, Unfit, resolve
from platform_validator.cli.main import app
from platform_validator.clock import SystemClock
from platform_validator.cvm.vmm import VmmFacts, VmmImage
from platform_validator.keyring import Keyring
from platform_validator.store.memory import MemoryStore
from platform_validator.store.records import InstanceState
from platform_validator.store.specimens import instance
from platform_validator.store.sqlite import SqliteStore

CANARY = "canary-of-the-operator"
HERE, MOVED = "https://git.example/x", "https://other.example/x"
HOTKEY = "5H728gLgx4yuCSVEwGCAfLo3RtzTau9F6cTNqNJtrqqjACWq"
TOML = (
    'name = "digits"\nversion = "1"\n[cvm]\ncpu_cores = 1\nmemory_mb = 256\ndisk_mb = 512\n'
    '[env.API_KEY]\ndescription = "of the model\'s host"\nsecret = true\n[env.REGION]\noptional = true\n'
)


@pytest.fixture
def store() -> MemoryStore:
    """An empty store."""
    return MemoryStore()


@pytest.fixture
def env(store: MemoryStore) -> Environments:
    """With a key of its own."""
    return Environments(store=store, keyring=Keyring(b"k" * 32), clock=SystemClock())


def giving(name: str = "API_KEY", value: str = CANARY, repository: str = HERE) -> SetEnv:
    """A command."""
    return SetEnv(challenge_id=CHALLENGE, repository=repository, name=name, value=value)


async def test_a_value_is_given_back_for_its_repository_alone(env: Environments) -> None:
    """For another repository only its name is known, until it is given again."""
    await env.perform(giving())
    assert (await env.given(CHALLENGE, HERE)).values == {"API_KEY": CANARY}
    moved = await env.given(CHALLENGE, MOVED)
    assert (moved.values, moved.elsewhere) == ({}, {"API_KEY": HERE})
    await env.perform(giving(repository=MOVED, value="another"))
    assert (await env.given(CHALLENGE, MOVED)).values == {"API_KEY": "another"}
    assert (await env.given(CHALLENGE, HERE)).elsewhere == {"API_KEY": MOVED}
    assert await env.given(ChallengeId("another"), HERE) == GivenEnv()


async def test_owner_and_name_is_the_same_repository_as_its_url(env: Environments) -> None:
    """The form in which the API lists it does not matter."""
    await env.perform(giving(repository="owner/name"))
    assert (await env.given(CHALLENGE, "https://github.com/owner/name")).values == {"API_KEY": CANARY}


async def test_it_is_sealed_and_bound_to_its_place(env: Environments, store: MemoryStore) -> None:
    """Not in clear in the store; under another challenge, name, repository or key it does not open."""
    await env.perform(giving())
    record = (await store.env())[0]
    assert CANARY.encode() not in record.sealed
    assert CANARY not in repr(await env.given(CHALLENGE, HERE)) + repr(giving())
    for moved in (
        replace(record, challenge_id=ChallengeId("another")),
        replace(record, name="OTHER"),
        replace(record, repository=MOVED),
        replace(record, sealed=record.sealed[:-1]),
    ):
        await store.put_env(moved)
        given = await env.given(moved.challenge_id, moved.repository)
        assert given.unreadable == {moved.name}
        assert moved.name not in given.values
        await store.remove_env(moved.challenge_id, moved.name)


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        ("A-B", "x", "bad_name"),
        ("1A", "x", "bad_name"),
        ("", "x", "bad_name"),
        ("A" * 256, "x", "bad_name"),
        ("A", "a\0b", "bad_value"),
        ("A", "x" * (MAX_VALUE + 1), "bad_value"),
        ("A", "\ud800", "bad_value"),
    ],
)
async def test_what_cannot_be_a_variable_is_refused(
    env: Environments, name: str, value: str, code: str
) -> None:
    """By its word, and without its value."""
    with pytest.raises(EnvRefused) as refused:
        await env.perform(giving(name, value))
    assert refused.value.code == code


async def test_a_challenge_has_so_many_variables_at_most(env: Environments) -> None:
    """One more is refused; one of them may be given again."""
    for number in range(MAX_NAMES):
        await env.perform(giving(f"N{number}"))
    with pytest.raises(EnvRefused, match="at most 256"):
        await env.perform(giving("MORE"))
    await env.perform(giving("N0", "again"))


async def test_names_are_listed_and_values_are_not(env: Environments) -> None:
    """Neither is a value in the answer to any command."""
    answers = [await env.perform(giving()), await env.perform(ListEnv(challenge_id=CHALLENGE))]
    row = answers[1]["env"][0]
    assert (row["name"], row["repository"]) == ("API_KEY", HERE)
    answers.append(await env.perform(UnsetEnv(challenge_id=CHALLENGE, name="API_KEY")))
    assert CANARY not in json.dumps(answers)
    assert await env.perform(ListEnv()) == {"env": []}
    with pytest.raises(EnvRefused, match="was not given"):
        await env.perform(UnsetEnv(challenge_id=CHALLENGE, name="API_KEY"))


# What becomes of a challenge


def planned(given: GivenEnv, limits: Resources | None = None) -> object:
    """Its CVMs' plan, or the reason why not."""
    digest = {"platform-runtime": f"sha256:{'d' * 64}"}
    image = VmmImage("local-sandbox", IsolationLevel.CONTAINER, digest, local=True)
    wanted = ActiveChallenge(
        id=CHALLENGE, name="digits", status="active", github_repo=HERE, github_commit="a" * 40, resources=CVM
    )
    everything = Resources(cpu_cores=4, memory_mb=2048, disk_mb=10240)
    try:
        return resolve(
            wanted,
            parse_platform_toml(TOML.encode()),
            key="key",
            bundle_sha256="b" * 64,
            compose_file=None,
            facts=VmmFacts("test", (image,)),
            rules=HostRules(level=IsolationLevel.CONTAINER, limits=limits or everything),
            env=given,
        ).env
    except Unfit as unfit:
        return unfit


@pytest.mark.parametrize(
    ("given", "reason", "told"),
    [
        (
            GivenEnv(),
            "env_missing",
            ("API_KEY (of the model's host)", f"validator env set {CHALLENGE} API_KEY"),
        ),
        (GivenEnv({"REGION": "x"}), "env_missing", ("API_KEY",)),
        (
            GivenEnv(elsewhere={"API_KEY": MOVED}),
            "env_needs_confirmation",
            (MOVED, HERE, f"validator env set {CHALLENGE} API_KEY"),
        ),
        (
            GivenEnv({"API_KEY": "x"}, {"REGION": MOVED}),
            "env_needs_confirmation",
            (f"validator env set {CHALLENGE} REGION",),
        ),
        (GivenEnv(unreadable=frozenset({"API_KEY"})), "env_unreadable", ("validator env set",)),
    ],
)
def test_why_a_challenge_does_not_get_its_environment(
    given: GivenEnv, reason: str, told: Sequence[str]
) -> None:
    """Each reason has its word, and the command that mends it."""
    unfit = planned(given)
    assert isinstance(unfit, Unfit)
    assert unfit.reason == reason
    assert all(words in str(unfit) for words in told)


def test_only_what_is_declared_goes_out() -> None:
    """A variable that platform.toml does not declare stays here."""
    given = GivenEnv({"API_KEY": "x", "OTHER": "y"}, elsewhere={"THIRD": MOVED})
    assert planned(given) == {"API_KEY": "x"}


@pytest.mark.parametrize("kind", ["cpu_cores", "memory_mb", "disk_mb"])
def test_a_challenge_above_the_limits_does_not_fit(kind: str) -> None:
    """It is Failed when it is provisioned, with the figures, whatever platform.toml asks for."""
    everything = {"cpu_cores": 4, "memory_mb": 2048, "disk_mb": 10240}
    smaller = Resources(**(everything | {kind: getattr(CVM, kind) - 1}))
    unfit = planned(GivenEnv({"API_KEY": "x"}), smaller)
    assert isinstance(unfit, Unfit)
    assert unfit.reason == "does_not_fit"
    assert f"{kind} = {getattr(CVM, kind)}" in str(unfit)


async def test_from_missing_to_active_and_to_confirmed(tmp_path: Path) -> None:
    """Missing: Failed. Given: Active at once. Another repository: Failed beside it, until confirmed."""
    store = MemoryStore()
    env = Environments(store=store, keyring=Keyring(b"k" * 32), clock=SystemClock())
    house = House(tmp_path, store=store, env=env)
    first, second = Author(tmp_path / "first"), Author(tmp_path / "second")
    for author in (first, second):
        author.write("platform.toml", TOML)

    async def failed(reason: str) -> InstanceView:
        while True:
            views = house.challenges.views()
            candidate = views[0].candidate if views else None
            if candidate is not None and candidate.state is InstanceState.FAILED:
                assert (candidate.reason or "").startswith(f"{reason}: ")
                return candidate
            await asyncio.sleep(0.002)

    async def give(value: str, author: Author) -> None:
        await env.perform(giving(value=value, repository=str(author)))
        house.challenges.env_changed(CHALLENGE)

    async with house.open():
        house.publish(first.commit(), repository=str(first))
        await failed("env_missing")
        await give("one", first)
        await house.state(InstanceState.ACTIVE)
        serving = house.challenges.acquire(CHALLENGE)
        assert serving is not None
        assert serving.plan.env == {"API_KEY": "one"}
        house.publish(second.commit(), repository=str(second))
        house.challenges.wake()
        await failed("env_needs_confirmation")
        assert house.challenges.views()[0].state is InstanceState.ACTIVE
        await give("two", second)
        while True:
            now = house.challenges.acquire(CHALLENGE)
            assert now is not None
            now.release()
            if now.plan.env == {"API_KEY": "two"}:
                break
            await asyncio.sleep(0.002)
        assert b"one" not in serving.kit(1.0)
        serving.release()
    assert {cvm.plan.env["API_KEY"] for cvm in house.fleet.booted} == {"one", "two"}


# The command


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state directory in which a validator once ran, and followed a challenge."""
    folder = tmp_path / "state"
    folder.mkdir(mode=0o700)
    monkeypatch.setenv("VALIDATOR_HOTKEY", HOTKEY)
    monkeypatch.setenv("PLATFORM_BASE_API", "http://127.0.0.1:1")
    monkeypatch.setenv("VALIDATOR_DB_PATH", str(folder / "validator.db"))
    monkeypatch.chdir(tmp_path)

    async def make() -> None:
        store = await SqliteStore.open(folder / "validator.db")
        await store.put_instance(replace(instance(), repository=HERE, name="digits"))
        await store.close()

    asyncio.run(make())
    return folder


def run(*words: str, stdin: str | None = None) -> Result:
    """One command."""
    return CliRunner().invoke(app, ["env", *words], input=stdin)


def test_a_variable_s_life(state: Path, tmp_path: Path) -> None:
    """Set by the challenge's name from stdin, set from a file, listed, unset; nowhere in clear."""
    done = run("set", "digits", "API_KEY", stdin=f"{CANARY}\n")
    assert done.exit_code == 0, done.output
    assert HERE in done.stdout
    (tmp_path / "file").write_text(f"{CANARY}\n")
    assert run("set", "challenge", "OTHER", "--file", str(tmp_path / "file")).exit_code == 0
    listed = json.loads(run("list", "--json").stdout)["env"]
    assert [(row["challenge_id"], row["name"], row["repository"]) for row in listed] == [
        ("challenge", "API_KEY", HERE),
        ("challenge", "OTHER", HERE),
    ]
    assert "API_KEY" in run("list", "digits").stdout
    for path in state.rglob("*"):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes()

    async def read() -> GivenEnv:
        store = await SqliteStore.open(state / "validator.db")
        keyring = Keyring.open_or_create(state / "keyring")
        try:
            env = Environments(store=store, keyring=keyring, clock=SystemClock())
            return await env.given(ChallengeId("challenge"), HERE)
        finally:
            await store.close()

    assert asyncio.run(read()).values == {"API_KEY": CANARY, "OTHER": f"{CANARY}\n"}
    assert run("unset", "digits", "API_KEY").exit_code == 0
    again = run("unset", "digits", "API_KEY", "--json")
    assert (again.exit_code, json.loads(again.stdout)["code"]) == (1, "not_found")


def test_what_cannot_be_given_is_refused(state: Path, tmp_path: Path) -> None:
    """An unknown challenge wants --repository; bad names, missing files and binary values are told."""
    unknown = run("set", "nobody", "A", stdin="x")
    assert unknown.exit_code == 2
    assert "--repository" in unknown.stderr
    assert run("set", "nobody", "A", "--repository", HERE, stdin="x").exit_code == 0
    bad = run("set", "digits", "A-B", "--json", stdin=CANARY)
    assert (bad.exit_code, json.loads(bad.stdout)["code"]) == (1, "bad_name")
    assert CANARY not in bad.output
    assert run("set", "digits", "A", "--file", str(tmp_path / "none")).exit_code == 2
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    binary = run("set", "digits", "A", "--file", str(tmp_path / "binary"))
    assert binary.exit_code == 2
    assert "UTF-8" in binary.stderr


def test_a_value_cannot_be_an_argument() -> None:
    """The command takes no third word: it would be in the shell's history and in every process list."""
    done = run("set", "digits", "API_KEY", CANARY)
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)


@pytest.mark.slow(reason="starts the command on a terminal")
def test_on_a_terminal_it_is_asked_for_without_an_echo(state: Path) -> None:
    """The question names the challenge and the repository; what is typed is not shown."""
    ours, theirs = pty.openpty()
    command = [str(Path(sys.executable).parent / "validator"), "env", "set", "digits", "API_KEY"]
    with subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    ) as process:
        os.close(theirs)
        shown = b""
        while b"API_KEY for challenge at" not in shown or not shown.rstrip().endswith(b":"):
            shown += os.read(ours, 4096)
        # The echo is off by the time the question is complete.
        while termios.tcgetattr(ours)[3] & termios.ECHO:
            time.sleep(0.01)
        os.write(ours, f"{CANARY}\n".encode())
        with contextlib.suppress(OSError):  # EIO: the other side has closed
            while part := os.read(ours, 4096):
                shown += part
    os.close(ours)
    assert process.returncode == 0, shown
    assert CANARY.encode() not in shown
    assert HERE.encode() in shown
    assert [row["name"] for row in json.loads(run("list", "--json").stdout)["env"]] == ["API_KEY"]
