"""No secret is compared with `==`: how long that takes tells how much of a guess was right."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SECRET = re.compile(r"token|secret|hmac|(^|_)mac($|_)|auth|passw|credential|proof|signature", re.IGNORECASE)
_PUBLIC = re.compile(r"^[A-Z_]+$")
"""Constants: a status code, a length."""

ALLOWED = {
    ("platform_api/auth.py", "admin_tokens.c.sha256 == hash_token(token.strip())"): (
        "a lookup by the SHA-256 of the token, of which nothing can be guessed byte by byte"
    ),
    ("platform_api/queue.py", "jobs.c.token == token"): (
        "the condition of one SQL statement, behind a signed request and a comparison of the row's token"
    ),
    ("platform_api/services.py", "'authorization' in request.headers"): "whether the header is there",
    (
        "platform_validator/egress/accounts.py",
        "(before.password, before.grant) == (account.password, account.grant)",
    ): ("both are ours: whether an account changed"),
    ("platform_validator/wallet_file.py", "place == password_file"): "paths",
    ("platform_vmm/server.py", "key not in ('token', 'ids[]')"): "names of parameters",
    ("platform_api/results.py", "key != 'lease_token'"): "a member's name",
}
"""Comparisons that look like one, and why they are none."""

VERIFIERS = {
    "platform_api/queue.py": "lease tokens",
    "platform_protocol/session/v2.py": "the proof of the launch secret in a handshake",
    "platform_protocol/tokens.py": "a CVM's authorization for a bundle",
    "platform_validator/web/operators.py": "the operators' token",
    "platform_validator/egress/accounts.py": "a CVM's password at the egress proxy",
    "platform_vmm/server.py": "the local VMM's token",
}
"""Where what somebody sent is compared with a secret; each by `hmac.compare_digest`."""


@functools.cache
def sources() -> tuple[tuple[str, ast.Module], ...]:
    """The product's modules; twins in memory and conformance suites are no part of what is attacked."""
    return tuple(_read())


def _read() -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.glob("packages/*/src/**/*.py")):
        name = str(path).split("/src/")[1]
        if (
            not re.search(r"(^|[/_])(memory|conformance|testing)[._]", path.name)
            and "memory_" not in path.name
        ):
            yield name, ast.parse(path.read_text())


def words(node: ast.expr) -> Iterator[str]:
    """Every name in an expression."""
    for part in ast.walk(node):
        if isinstance(part, ast.Name):
            yield part.id
        elif isinstance(part, ast.Attribute):
            yield part.attr
        elif isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value


def compares_a_secret(node: ast.AST) -> bool:
    """`==`, `!=`, `in` or `not in` over something whose name is a secret's."""
    if not isinstance(node, ast.Compare):
        return False
    if not any(isinstance(each, ast.Eq | ast.NotEq | ast.In | ast.NotIn) for each in node.ops):
        return False
    sides = [node.left, *node.comparators]
    if any(isinstance(side, ast.Call) and ast.unparse(side.func) == "len" for side in sides):
        return False
    named = [word for side in sides for word in words(side) if not _PUBLIC.match(word)]
    return any(_SECRET.search(word) for word in named)


def found_in(module: ast.Module) -> set[str]:
    """The suspicious comparisons."""
    return {ast.unparse(node) for node in ast.walk(module) if compares_a_secret(node)}


@pytest.mark.slow(reason="reads every module of the product")
def test_no_secret_is_compared_but_in_constant_time() -> None:
    """Every comparison that names a token, secret, proof or the like is one of a list with reasons."""
    found = {(name, text) for name, module in sources() for text in found_in(module)}
    assert found - ALLOWED.keys() == set(), "use hmac.compare_digest, or say here why it need not be"
    assert ALLOWED.keys() - found == set(), "no longer there: take it out of the list"


@pytest.mark.slow(reason="reads every module of the product")
def test_what_compares_secrets_does_it_by_compare_digest() -> None:
    """In these modules and in no other."""
    found = {
        name
        for name, module in sources()
        if any(isinstance(n, ast.Attribute) and n.attr == "compare_digest" for n in ast.walk(module))
    }
    assert found == set(VERIFIERS)


def test_the_search_finds_what_it_is_for() -> None:
    """Each of these would be found, and what is public would not."""
    bad = "given == self._token\nif auth != expected: pass\nx = found['launch_secret'] == y\nmac(a) == b"
    assert len(found_in(ast.parse(bad))) == 4
    assert (
        found_in(ast.parse("status == _UNAUTHORIZED\nlen(secret) != 32\nname == other\na is token")) == set()
    )
