"""`validator challenges check DIR`: what an author is told."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from author import Author

from platform_protocol.bundle import TreeEntry, pack
from platform_protocol.canonical import sha256_hex
from platform_protocol.compose import app_compose, compose_hash
from platform_protocol.spec import parse_platform_toml
from platform_validator.challenges.check import Finding, check_folder
from platform_validator.challenges.git_source import GitSource

TOML = 'name = "digits"\nversion = "1"\n'
CODE = "@challenge.on_job()\nasync def f(ctx, payload): ...\n"
RUNTIME = f"platform-runtime@sha256:{'a' * 64}"


def folder_of(path: Path, toml: str = TOML, **files: str) -> Path:
    """A challenge's folder."""
    path.mkdir(exist_ok=True)
    (path / "platform.toml").write_text(toml)
    (path / "challenge.py").write_text(files.pop("challenge", CODE))
    for name, text in files.items():
        (path / name).write_text(text)
    return path


def failures(found: list[Finding]) -> list[tuple[str, int | None, str]]:
    """Check, line, and all that is said."""
    return [(one.check, one.line, f"{one.detail}; {one.suggestion}") for one in found if one.result == "fail"]


def test_a_good_challenge_gets_its_bundle_and_compose_hash(tmp_path: Path) -> None:
    """Both are those of the protocol: what the validator will compute from the commit."""
    found = check_folder(folder_of(tmp_path), RUNTIME)
    bundle = pack([TreeEntry("platform.toml", TOML.encode()), TreeEntry("challenge.py", CODE.encode())])
    spec = parse_platform_toml(TOML.encode())
    expected = compose_hash(app_compose(spec, bundle_sha256=sha256_hex(bundle), runtime=RUNTIME))
    assert failures(found) == []
    told = {one.check: one.detail for one in found}
    assert sha256_hex(bundle) in told["bundle"]
    assert str(len(bundle)) in told["bundle"]
    assert told["compose hash"] == f"{expected} under {RUNTIME}"


async def test_the_bundle_is_the_one_that_is_fetched(tmp_path: Path) -> None:
    """Of a repository, the files of a commit count, and not those that git ignores or does not know."""
    author = Author(tmp_path / "repository")
    author.write("run.sh", "#!/bin/sh\n")
    (author.folder / "run.sh").chmod(0o755)
    (author.folder / "link").symlink_to("challenge.py")
    at = author.commit()
    author.write("notes.txt", "not committed")
    found = {one.check: one for one in check_folder(author.folder)}
    source = GitSource(cache=tmp_path / "cache", allow=frozenset({"file"}))
    tree = await source.fetch(str(author), at)
    assert tree.bundle_sha256 in found["bundle"].detail
    assert found["tree"].detail == "1 files differ from what is committed"


@pytest.mark.parametrize(
    ("more", "line", "told"),
    [
        ("[cvm]\nmemory = 512\n", 4, "did you mean 'memory_mb'?"),
        ("[cvm]\nmemory_mb = 1\n", 4, "greater than or equal to 128, got 1"),
        ("[cvm]\nmemory_mb = '1G'\n", 4, "valid integer, got '1G'"),
        ("[execution]\n\ncvm = 'each'\n", 5, "'per_job' or 'shared', got 'each'"),
        ("[network]\nhosts = ['ok.example', 'HTTP://x']\n", 4, "network.hosts.1"),
        ("[env.'a b']\n", 3, "env.a b"),
        ("[env.KEY]\nsecrt = true\n", 4, "did you mean 'secret'?"),
        ("[scoring]\nweights.speed = -1\n", 4, "0 to 1000000"),
        ("[typo]\n", 3, "known here: "),
        ("x = \n", 3, "not TOML"),
        ("[cvm]\ncompose = '../x'\n", 4, "inside the tree"),
        ("name = 'twice'\n", 3, "not TOML"),
    ],
)
def test_each_fault_has_its_line_and_what_to_do(tmp_path: Path, more: str, line: int, told: str) -> None:
    """A fault names its key, its line, what was expected, what came and what to do."""
    found = failures(check_folder(folder_of(tmp_path, TOML + more)))
    assert [each[1] for each in found] == [line]
    assert told in found[0][2]


def test_all_faults_are_told_at_once_and_no_more_than_twenty(tmp_path: Path) -> None:
    """The first twenty are told, and how many more there are."""
    many = "".join(f"k{number} = 1\n" for number in range(3000))
    found = failures(check_folder(folder_of(tmp_path, many)))
    assert len(found) == 21
    assert "and 2982 faults more" in found[-1][2]


@pytest.mark.parametrize(
    ("toml", "code", "check", "told"),
    [
        (TOML + 'entry = "a.b"\n', CODE, "entry", "expected a/b.py or a/b/__init__.py in the tree"),
        (TOML, "x = = 1\n", "entry", "invalid syntax"),
        (TOML, "x = " + "(" * 100_000, "entry", "challenge.py"),
        (TOML + '[cvm]\ncompose = "compose.yaml"\n', CODE, "cvm.compose", "cannot be read"),
    ],
)
def test_what_platform_toml_names_must_be_there(
    tmp_path: Path, toml: str, code: str, check: str, told: str
) -> None:
    """The entry module, as Python, and the compose file."""
    found = failures(check_folder(folder_of(tmp_path, toml, challenge=code)))
    assert [each[0] for each in found] == [check]
    assert told in found[0][2]


def test_a_compose_file_of_its_own_lets_submissions_be_held(tmp_path: Path) -> None:
    """Without both words of `security_opt`, or with one of them, it is a warning that names the other."""
    folder = folder_of(tmp_path, TOML + '[cvm]\ncompose = "compose.yaml"\n')

    def told(options: str) -> tuple[str, str]:
        (folder / "compose.yaml").write_text(f"services: {{one: {{security_opt: [{options}]}}}}\n")
        (finding,) = [each for each in check_folder(folder) if each.check == "cvm.compose"]
        return finding.result, finding.detail

    assert told("seccomp=unconfined, systempaths=unconfined") == ("ok", "compose.yaml")
    level, detail = told("seccomp=unconfined")
    assert level == "warn"
    assert detail.startswith("compose.yaml has no systempaths=unconfined:")


def test_a_link_out_of_the_tree_fails(tmp_path: Path) -> None:
    """So does whatever else cannot be a bundle."""
    (folder_of(tmp_path) / "out").symlink_to("/etc/passwd")
    assert "'out'" in failures(check_folder(tmp_path))[0][2]


def test_a_folder_that_is_none(tmp_path: Path) -> None:
    """No folder, no platform.toml: each says what to do."""
    assert "name the challenge's folder" in failures(check_folder(tmp_path / "none"))[0][2]
    assert "write one" in failures(check_folder(tmp_path))[0][2]


def test_nothing_of_the_challenge_is_run(tmp_path: Path) -> None:
    """Code that would do harm when it is imported does none."""
    harm = tmp_path / "harm"
    folder_of(tmp_path / "x", challenge=f"open({str(harm)!r}, 'w')\n{CODE}")
    assert failures(check_folder(tmp_path / "x")) == []
    assert not harm.exists()


@pytest.mark.slow(reason="starts the command twice")
def test_the_command(tmp_path: Path) -> None:
    """Exit 0 and 1, lines for people and JSON for tools, and no configuration is needed."""
    command = [str(Path(sys.executable).parent / "validator"), "challenges", "check"]
    good = folder_of(tmp_path / "good")
    bad = folder_of(tmp_path / "bad", TOML + "[cvm]\nmemory = 1\n")
    done = subprocess.run([*command, str(good)], capture_output=True, text=True, timeout=50, check=False)
    assert done.returncode == 0, done.stderr
    assert "digits 1" in done.stdout
    done = subprocess.run(
        [*command, str(bad), "--json"], capture_output=True, text=True, timeout=50, check=False
    )
    assert done.returncode == 1
    assert json.loads(done.stdout)[0] == {
        "check": "platform.toml",
        "result": "fail",
        "detail": "cvm.memory: unknown key",
        "line": 4,
        "suggestion": "did you mean 'memory_mb'?",
    }
