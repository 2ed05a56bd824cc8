"""When the egress proxy is told of a CVM, and what `validator check` says of the way to it."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest
from fleet_world import LIMITS, PLAN, MakeWorld, fleet_worlds, restarted
from waiting import until

from platform_protocol.ids import VmName
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.spec import NetworkSpec
from platform_protocol.user_config import UserConfig
from platform_validator.cli.checks import check_base_url, check_egress, check_guest_ports
from platform_validator.config import Settings, load_settings
from platform_validator.cvm.quota import Quota
from platform_validator.cvm.vmm import VmmFacts, VmmImage
from platform_validator.egress.gate import ClosedGate, EgressUse
from platform_validator.host_name import DEFAULT_HOST, HostName

HOSTS = NetworkSpec(hosts=["api.example.com"])
POLICY = "[sandbox_config.network_policy]\nallow_outbound = true\nallowed_hosts = ['api.example.com']\n"


class NotedGate(ClosedGate):
    """Writes down what it is told, in the order of everything else."""

    def __init__(self, journal: list[str]) -> None:
        self.journal = journal
        self.secrets: list[bytes] = []

    def allow(
        self, vm: VmName, secret: bytes, wanted: NetworkSpec, *, host: HostName = DEFAULT_HOST
    ) -> str | None:
        self.journal.append(f"allow:{','.join(wanted.hosts)}")
        self.secrets.append(secret)
        return f"http://{vm}:x@10.0.2.2:3128"

    def forget(self, vm: VmName) -> None:
        self.journal.append("forget")

    def gone(self, vm: VmName) -> None:
        self.journal.append("proxy_gone")

    def use(self, vm: VmName) -> EgressUse | None:
        return EgressUse(connections=3)


@pytest.fixture
async def make_world(tmp_path: Path) -> AsyncIterator[MakeWorld]:
    async with fleet_worlds(tmp_path) as make:
        yield make


async def test_the_proxy_knows_a_cvm_before_it_is_made_and_forgets_it_when_it_ends(
    make_world: MakeWorld,
) -> None:
    """Between the journaled intent and CreateVm; its connections are cut before it is destroyed."""
    gate = NotedGate([])
    world = await make_world(egress=gate)
    gate.journal = world.journal
    cvm = await world.boot(replace(PLAN, network=HOSTS))
    config = UserConfig.model_validate_json(world.specs[0].user_config)
    assert config.proxy_url == f"http://{cvm.name}:x@10.0.2.2:3128"
    assert gate.secrets == [config.secret]
    [view] = world.fleet.views()
    assert view.egress == EgressUse(connections=3)
    world.fleet.destroy(cvm.name)
    await world.nothing_is_left()
    told = [each for each in world.journal if not each.startswith("vm_phase:ready")]
    assert told[:3] == ["intend_vm", "allow:api.example.com", "guest"]
    assert told.index("forget") < told.index("vm_phase:destroying") < told.index("proxy_gone")


async def test_a_cvm_that_is_adopted_is_let_out_again_by_the_policy_of_now(make_world: MakeWorld) -> None:
    """The proxy of a daemon that starts anew knows nobody; what is not adopted stays unknown."""
    world = await make_world()
    cvm = await world.boot()
    cvm.session.close()
    gate = NotedGate([])
    fleet = restarted(world, Quota(LIMITS), gate)
    await fleet.restore()
    assert gate.journal == []
    async with asyncio.TaskGroup() as group:
        running = group.create_task(fleet.run())
        await until(lambda: fleet.running)
        await fleet.adopt(cvm.name, replace(PLAN, network=HOSTS))
        running.cancel()
    assert gate.journal == ["allow:api.example.com"]


def settings_of(folder: Path, text: str = "", **environment: str) -> Settings:
    """A configuration."""
    (folder / "config.toml").write_text(text)
    required = {
        "VALIDATOR_HOTKEY": "5H728gLgx4yuCSVEwGCAfLo3RtzTau9F6cTNqNJtrqqjACWq",
        "PLATFORM_BASE_API": "http://nowhere",
    }
    return load_settings(required | environment, folder=folder)


def free() -> int:
    """A port that nobody has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def test_check_says_whether_cvms_can_reach_the_proxy(tmp_path: Path) -> None:
    """Nothing may go out; nobody is named; another port than the listener's; a name; a port that is taken."""
    assert [each.result for each in await check_egress(settings_of(tmp_path))] == ["ok"]
    nobody = settings_of(tmp_path, "[sandbox_config.network_policy]\nallow_outbound = true\n")
    [found] = await check_egress(nobody)
    assert (found.result, "name the hosts" in found.detail) == ("warn", True)
    port = free()
    listens = {"VALIDATOR_EGRESS_LISTEN": f"127.0.0.1:{port}"}
    [found] = await check_egress(settings_of(tmp_path, POLICY, **listens))
    assert (found.result, "VALIDATOR_EGRESS_BASE_URL" in found.detail) == ("fail", True)
    named = listens | {"VALIDATOR_EGRESS_BASE_URL": "http://proxy.example:3128"}
    [found] = await check_egress(settings_of(tmp_path, POLICY, **named))
    assert (found.result, "expected an IP address" in found.detail) == ("fail", True)
    fits = settings_of(tmp_path, POLICY, **listens, VALIDATOR_EGRESS_BASE_URL=f"http://10.0.2.2:{port}")
    assert [each.result for each in await check_egress(fits)] == ["ok"]
    with socket.create_server(("127.0.0.1", port)):
        assert [each.result for each in await check_egress(fits)] == ["ok", "warn"]


def test_check_wants_the_validator_by_address(tmp_path: Path) -> None:
    """What a CVM reaches is walled in by address."""
    found = check_base_url(settings_of(tmp_path, VALIDATOR_BASE_URL="https://validator.example"))
    assert (found.result, "expected an IP address" in found.detail) == ("fail", True)
    found = check_base_url(settings_of(tmp_path, VALIDATOR_BASE_URL="http://192.0.2.7:18080"))
    assert found.result == "warn"


@pytest.mark.parametrize(
    ("policy", "ports", "expected"),
    [
        ("", None, []),
        ("", (18080,), ["ok"]),
        ("", (3128,), ["fail"]),
        (POLICY, (18080,), ["fail"]),
        (POLICY, (18080, 3128), ["ok"]),
        (POLICY, (), ["fail", "fail"]),
    ],
)
def test_check_says_when_the_vmm_keeps_guests_from_us(
    tmp_path: Path, policy: str, ports: tuple[int, ...] | None, expected: list[str]
) -> None:
    """A local VMM tells its guest ports; the proxy's counts where anything may go out."""
    image = VmmImage("local-sandbox", IsolationLevel.CONTAINER, local=True, guest_ports=ports)
    found = check_guest_ports(VmmFacts("0", (image,)), settings_of(tmp_path, policy))
    assert [each.result for each in found] == expected
