"""Checks a challenge's folder as an author has it, with the code that reads it when it is published."""

from __future__ import annotations

import ast
import hashlib
import io
import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from platform_protocol.bundle import MAX_BUNDLE_BYTES, BundleInvalid, TreeMember, pack_into
from platform_protocol.compose import NESTING, ComposeInvalid, app_compose, compose_hash
from platform_protocol.spec import ChallengeSpec, SpecInvalid, parse_platform_toml
from platform_validator.challenges.git_source import MAX_NAMED_FILE
from platform_validator.challenges.tree import MAX_FILES, MAX_PLATFORM_TOML

_SKIPPED = frozenset({".git", "__pycache__", ".venv", ".mypy_cache", ".pytest_cache", ".ruff_cache"})
_TIMEOUT = 30.0


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: `result` is ok, warn or fail; the line counts from 1."""

    check: str
    result: str
    detail: str
    line: int | None = None
    suggestion: str | None = None


def check_folder(folder: Path, runtime: str | None = None) -> list[Finding]:
    """Everything that is right and wrong with a challenge's folder; nothing of it is imported or run.

    Args:
        folder: With platform.toml at its root.
        runtime: `name@sha256:…`, for the compose hash, where platform.toml names none with its digest.
    """
    if not folder.is_dir():
        return [Finding("folder", "fail", f"{folder} is no folder", suggestion="name the challenge's folder")]
    spec, found = _check_toml(folder)
    if spec is not None:
        found += [*_check_entry(folder, spec), *_check_env(spec)]
    sha256, about_bundle = _check_bundle(folder)
    found += about_bundle
    compose_file = None
    if spec is not None and spec.cvm.compose is not None:
        compose_file, about = _check_compose_file(folder, spec.cvm.compose)
        found.append(about)
    if spec is not None and sha256 is not None and not any(one.result == "fail" for one in found):
        found.append(_check_compose_hash(spec, sha256, runtime, compose_file))
    return found


def compose_of_folder(folder: Path, runtime: str) -> bytes | str:
    """The app-compose bytes that a challenge's folder makes under a runtime, or why it makes none."""
    spec, found = _check_toml(folder)
    sha256, about_bundle = _check_bundle(folder)
    found += about_bundle
    compose_file = None
    if spec is not None and spec.cvm.compose is not None:
        compose_file, about = _check_compose_file(folder, spec.cvm.compose)
        found.append(about)
    fails = [f"{one.check}: {one.detail}" for one in found if one.result == "fail"]
    if spec is None or sha256 is None or fails:
        return "; ".join(fails)
    try:
        return app_compose(spec, bundle_sha256=sha256, runtime=runtime, compose_file=compose_file)
    except ComposeInvalid as error:
        return str(error)


def _check_toml(folder: Path) -> tuple[ChallengeSpec | None, list[Finding]]:
    path = folder / "platform.toml"
    if path.is_symlink() or not path.is_file():
        hint = 'write one: name = "my-challenge" and version = "1" are enough'
        return None, [Finding("platform.toml", "fail", "there is no such file", suggestion=hint)]
    with path.open("rb") as file:
        data = file.read(MAX_PLATFORM_TOML + 1)
    try:
        spec = parse_platform_toml(data)
    except SpecInvalid as error:
        return None, [
            Finding(
                "platform.toml",
                "fail",
                ": ".join(part for part in (fault.key, fault.problem) if part),
                fault.line,
                fault.suggestion,
            )
            for fault in error.details
        ]
    return spec, [Finding("platform.toml", "ok", f"{spec.name} {spec.version}")]


def _check_entry(folder: Path, spec: ChallengeSpec) -> Iterator[Finding]:
    stem = PurePosixPath(*spec.entry.split("."))
    candidates = [folder / f"{stem}.py", folder / stem / "__init__.py"]
    path = next((each for each in candidates if each.is_file()), None)
    if path is None:
        names = " or ".join(str(each.relative_to(folder)) for each in candidates)
        hint = "write it, or name another module as entry in platform.toml"
        yield Finding("entry", "fail", f"{spec.entry!r}: expected {names} in the tree", suggestion=hint)
        return
    shown = str(path.relative_to(folder))
    try:
        source = path.read_bytes()
        ast.parse(source, shown)
    except SyntaxError as error:
        yield Finding(
            "entry", "fail", f"{shown}: {error.msg}", error.lineno, "mend it: it cannot be imported"
        )
        return
    except (ValueError, RecursionError, MemoryError) as error:
        yield Finding("entry", "fail", f"{shown} cannot be read as Python: {error}")
        return
    if b"on_job" not in source:
        hint = "decorate a function with @challenge.on_job(), here or in what it imports"
        yield Finding("entry", "warn", f"{shown} registers no handler itself", suggestion=hint)
        return
    yield Finding("entry", "ok", shown)


def _check_env(spec: ChallengeSpec) -> Iterator[Finding]:
    for name, declared in sorted(spec.env.items()):
        if not declared.description:
            hint = f"add description under [env.{name}]: operators are asked for it"
            yield Finding("env", "warn", f"{name} has no description", suggestion=hint)


def _check_compose_file(folder: Path, name: str) -> tuple[str | None, Finding]:
    path = folder / name
    try:
        if path.stat().st_size > MAX_NAMED_FILE:
            return None, Finding("cvm.compose", "fail", f"{name}: expected at most {MAX_NAMED_FILE} bytes")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        hint = "name a file of the tree, in UTF-8"
        return None, Finding("cvm.compose", "fail", f"{name} cannot be read: {error}", suggestion=hint)
    # A word search: what the file means is for dstack's Docker to say, which reads more than we know.
    if missing := [option for option in NESTING if option not in text]:
        hint = f"add security_opt: {json.dumps(NESTING)} to the service"
        told = f"{name} has no {' and no '.join(missing)}: dstack's Docker then lets no submission be held"
        return text, Finding("cvm.compose", "warn", told, suggestion=hint)
    return text, Finding("cvm.compose", "ok", name)


def _check_bundle(folder: Path) -> tuple[str | None, list[Finding]]:
    found = []
    paths, how = _files(folder)
    if how:
        found.append(Finding("tree", "warn", how, suggestion="commit what is to be published"))
    try:
        members = [_member(folder, path) for path in paths]
        if len(members) > MAX_FILES:
            raise BundleInvalid(f"expected at most {MAX_FILES} files, got {len(members)}")
        with tempfile.TemporaryFile() as file:
            pack_into(file, members)
            size = file.tell()
            file.seek(0)
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    except (BundleInvalid, OSError) as error:
        found.append(Finding("bundle", "fail", str(error), suggestion="leave it out of the tree"))
        return None, found
    shown = f"{len(members)} files, {size} bytes of at most {MAX_BUNDLE_BYTES}, sha256 {sha256}"
    return sha256, [*found, Finding("bundle", "ok", shown)]


def _member(folder: Path, path: str) -> TreeMember:
    full = folder / path
    status = full.lstat()
    if stat.S_ISLNK(status.st_mode):
        return TreeMember(path, link=str(full.readlink()))
    if not stat.S_ISREG(status.st_mode):
        raise BundleInvalid(f"{path!r} is neither a file nor a symlink")
    executable = bool(status.st_mode & stat.S_IXUSR)

    return TreeMember(path, status.st_size, lambda: io.BytesIO(full.read_bytes()), executable=executable)


def _files(folder: Path) -> tuple[Sequence[str], str | None]:
    """The files that a commit would have, as git says, and what it would not; without git, all of them."""
    listed = _git(folder, "ls-files", "-z", "--cached", "--", ".")
    if not listed:
        return sorted(_walk(folder)), None
    aside = _git(folder, "status", "--porcelain", "-z", "--", ".") or b""
    names = [name for name in os.fsdecode(listed).split("\0") if name and os.path.lexists(folder / name)]
    changed = len([each for each in aside.split(b"\0") if each])
    return names, f"{changed} files differ from what is committed" if changed else None


def _git(folder: Path, *arguments: str) -> bytes | None:
    safe = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null"]
    try:
        done = subprocess.run(
            ["git", *safe, *arguments], cwd=folder, capture_output=True, timeout=_TIMEOUT, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _walk(folder: Path) -> Iterator[str]:
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        linked = [name for name in folders if (here / name).is_symlink()]
        folders[:] = [name for name in folders if name not in _SKIPPED and name not in linked]
        for name in [*names, *linked]:
            yield (here / name).relative_to(folder).as_posix()


def _check_compose_hash(
    spec: ChallengeSpec, sha256: str, runtime: str | None, compose_file: str | None
) -> Finding:
    named = runtime or (spec.cvm.runtime if "@sha256:" in spec.cvm.runtime else None)
    if named is None:
        hint = "name it with --runtime NAME@sha256:…; a local VMM's ListImages has its own"
        return Finding("compose hash", "warn", "it depends on the runtime's digest", suggestion=hint)
    try:
        compose = app_compose(spec, bundle_sha256=sha256, runtime=named, compose_file=compose_file)
    except ComposeInvalid as error:
        return Finding("compose hash", "fail", str(error))
    return Finding("compose hash", "ok", f"{compose_hash(compose)} under {named}")
