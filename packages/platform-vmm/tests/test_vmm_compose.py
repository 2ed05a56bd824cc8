"""The subset of docker-compose, key by key."""

from __future__ import annotations

import json
from typing import Any

import pytest

from platform_vmm.app_compose import Service, read_service
from platform_vmm.errors import ComposeUnsupported

IMAGE = "platform-runtime@sha256:" + "ab" * 32


def _service(**keys: Any) -> str:
    return json.dumps({"services": {"one": {"image": IMAGE, "command": ["true"]} | keys}})


def test_the_whole_subset_is_read() -> None:
    """Every key that is honoured, in its usual form."""
    found = read_service(
        _service(
            command=["a", "b$$c"],
            environment=["A=1", "B=x=y"],
            ports=["10000:10000", "127.0.0.1:80:80/tcp"],
            tmpfs="/scratch",
            read_only=True,
            mem_limit="512m",
            security_opt=["seccomp=unconfined", "systempaths=unconfined"],
            volumes=["/var/run/dstack.sock:/var/run/dstack.sock"],
        )
    )
    digest = "sha256:" + "ab" * 32
    environment = {"A": "1", "B": "x=y"}
    assert found == Service("platform-runtime", digest, ("a", "b$c"), environment, ("/scratch",), 512 * 2**20)


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"privileged": True}, "privileged"),
        ({"restart": "always"}, "restart"),
        ({"network_mode": "host"}, "network_mode"),
        ({"volumes": ["/etc:/etc"]}, "volumes"),
        ({"volumes": ["/var/run/dstack.sock:/elsewhere"]}, "volumes"),
        ({"volumes": [{"type": "bind"}]}, "volumes"),
        ({"ports": ["80:10000"]}, "ports"),
        ({"ports": ["53:53/udp"]}, "ports"),
        ({"tmpfs": ["/proc"]}, "tmpfs"),
        ({"tmpfs": ["/usr/lib"]}, "tmpfs"),
        ({"tmpfs": ["/a/../dstack"]}, "tmpfs"),
        ({"tmpfs": ["/a:size=1g"]}, "tmpfs"),
        ({"mem_limit": "much"}, "mem_limit"),
        ({"mem_limit": 0}, "mem_limit"),
        ({"read_only": "yes"}, "read_only"),
        ({"security_opt": ["label=disable"]}, "security_opt"),
        ({"security_opt": [["seccomp=unconfined"]]}, "security_opt"),
        ({"security_opt": "seccomp=unconfined"}, "security_opt"),
        ({"environment": {"A": None}}, "environment"),
        ({"environment": {"A": "${HOME}"}}, "environment"),
        ({"environment": ["A"]}, "environment"),
        ({"environment": {"A": [["x"]]}}, "environment"),
        ({"command": []}, "command"),
        ({"command": ["a\0b"]}, "command"),
        ({"image": "python:3"}, "image"),
    ],
)
def test_anything_else_is_refused_by_its_name(keys: dict[str, Any], named: str) -> None:
    """The message says services.<name>.<key>."""
    with pytest.raises(ComposeUnsupported, match=rf"services\.one\.{named}"):
        read_service(_service(**keys))


@pytest.mark.parametrize("text", ["", "[]", "a: [", "services: {}", "services: {a: {}, b: {}}", "[" * 60_000])
def test_what_is_no_compose_file_is_refused(text: str) -> None:
    """Also nesting without end."""
    with pytest.raises(ComposeUnsupported):
        read_service(text)


def test_aliases_that_multiply_are_refused_without_being_written_out() -> None:
    """A few hundred bytes that would be gigabytes as text."""
    lines = ["a0: &a0 [x,x,x,x,x,x,x,x,x,x]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 12)]
    inner = f"services: {{one: {{image: '{IMAGE}', command: *a11}}}}"
    with pytest.raises(ComposeUnsupported):
        read_service("\n".join([*lines, inner]))
    nested = f"services: {{one: {{image: '{IMAGE}', environment: {{A: &a [y], B: [*a, *a]}}, command: b}}}}"
    with pytest.raises(ComposeUnsupported, match="environment"):
        read_service(nested)
