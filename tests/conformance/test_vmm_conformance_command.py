"""`validator vmm conformance`: what it says of a VMM that conforms, of one that does not, of an old one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.conformance.conftest import TOKEN, Server
from tests.dstack_double import DstackDouble, Fault, Running
from tests.dstack_double.server import IMAGE
from typer.testing import CliRunner

from platform_validator.cli.main import app
from platform_validator.cvm.dstack.judge import all_checks


@pytest.fixture
def started(tmp_path: Path) -> Iterator[Callable[[str], Running]]:
    """Starts a double of the test's own."""
    made: list[Running] = []
    contexts = []

    def start(version: str) -> Running:
        running = Running(DstackDouble(version, token=TOKEN), tmp_path / "vmm.sock")
        context = running.serving()
        context.__enter__()
        made.append(running)
        contexts.append(context)
        return running

    yield start
    for context in contexts:
        context.__exit__(None, None, None)


def run(url: str, *more: str, token: str | None = TOKEN) -> tuple[int, list[str], str]:
    """Exit code, lines of stdout, stderr."""
    done = CliRunner().invoke(
        app,
        ["vmm", "conformance", "--url", url, "--image", IMAGE, *more],
        env={"DSTACK_VMM_TOKEN": token, "DSTACK_VMM_AUTH_USER": None},
    )
    return done.exit_code, done.stdout.splitlines(), done.stderr


def test_vmm_conformance_has_a_name_for_each_check() -> None:
    """Of its own: a name that two have would select or skip both."""
    names = [check.__name__ for check in all_checks()]
    assert len(names) == len(set(names))


def test_vmm_conformance_of_a_vmm_that_conforms(server_of: Callable[[str], Server]) -> None:
    """Nothing failed; what would have started a VM was skipped by name; the last line says how many."""
    code, lines, _ = run(server_of("head").url)
    summary = json.loads(lines[-1])
    assert (code, summary["failed"]) == (0, 0), lines
    assert summary["checks"] >= 60
    skipped = [line for line in lines[:-1] if line.startswith("skipped: ")]
    assert len(skipped) == summary["skipped"] == len(lines) - 1
    assert any("a_vm_starts_and_stops" in line for line in skipped)


def test_vmm_conformance_starts_no_vm_unless_told_to(started: Callable[[str], Running]) -> None:
    """Neither where `stopped` is known, nor where it is not: there no VM is made at all."""
    for version in ("0.6.0", "0.5.2"):
        running = started(version)
        code, lines, _ = run(running.url)
        assert code == 0, lines
        made = [json.loads(body) for method, body in running.double.calls if method == "CreateVm"]
        assert all(message.get("stopped") is True for message in made)
        assert running.double.host.starts == 0
        assert (version == "0.5.2") == (made == [])


def test_vmm_conformance_names_each_deviation(started: Callable[[str], Running]) -> None:
    """A line for each, exit code 1, and nothing of the run stays behind."""
    running = started("0.6.0")
    running.double.faults.always("StopVm", Fault(effects=1, status=200, body='{"stopped": true}'))
    running.double.faults.always("ListGpus", Fault(status=200, body='{"gpus": {}}'))
    code, lines, _ = run(running.url)
    deviations = [line for line in lines if line.startswith("deviation: ")]
    assert code == 1
    assert json.loads(lines[-1])["failed"] == len(deviations)
    named = {line.split(": ")[1] for line in deviations}
    assert {"stopping_a_stopped_vm_is_no_error", "gpus_are_a_list"} <= named
    assert running.double.host.machines == {}


def test_vmm_conformance_leaves_vms_of_others_alone(started: Callable[[str], Running]) -> None:
    """Also one whose name is like those of its own."""
    running = started("0.6.0")
    compose = json.dumps({"manifest_version": 2, "name": "x", "runner": "bash"})
    mine = {"name": "conformance-mine", "image": IMAGE, "compose_file": compose, "stopped": True}
    running.double.rpc.call("CreateVm", mine)
    code, lines, _ = run(running.url)
    assert code == 0, lines
    assert [one.configuration["name"] for one in running.double.host.machines.values()] == [
        "conformance-mine"
    ]


def test_vmm_conformance_says_what_it_could_not_begin_with(started: Callable[[str], Running]) -> None:
    """No VMM, no credentials, no such image, no URL: exit code 2 and one line."""
    running = started("0.6.0")
    for url, token, word in (
        ("unix:/nowhere/vmm.sock", TOKEN, "no answer"),
        (running.url, "wrong", "DSTACK_VMM_TOKEN"),
        ("ftp://x", TOKEN, "--url"),
    ):
        code, _, told = run(url, token=token)
        assert code == 2
        assert word in told
    done = CliRunner().invoke(
        app,
        ["vmm", "conformance", "--url", running.url, "--image", "none"],
        env={"DSTACK_VMM_TOKEN": TOKEN},
    )
    assert (done.exit_code, "no image 'none'" in done.stderr) == (2, True)
