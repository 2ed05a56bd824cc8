"""The guest's init_script, run by a real bash against real packet filters, in network namespaces.

`h` is the host with the validator, `g` the guest, `c` a container on a bridge of `g` that is set up as
dockerd does: its own rules come after the script's and before what it does not know. systemd-run is a
stand-in that writes down what it was asked for: there is no systemd here to power off.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from platform_protocol.guest_init import INIT_SCRIPT

_PATH = f"{os.environ['PATH']}:/usr/sbin:/sbin"
pytestmark = [
    pytest.mark.slow(reason="makes network namespaces, and waits for what is dropped"),
    pytest.mark.needs("root", "ip", "iptables", "jq", "bwrap"),
]

SERVERS = r"""
import socket, sys, threading
for arg in sys.argv[1:]:
    host, port = arg.rsplit(",", 1)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    server = socket.create_server((host, int(port)), family=family)
    def serve(server=server):
        while True:
            server.accept()[0].close()
    threading.Thread(target=serve, daemon=True).start()
print("up", flush=True)
sys.stdin.read()
"""
TRY = r"""
import json, socket, sys, threading
found = {}
def attempt(arg):
    host, port = arg.rsplit(",", 1)
    try:
        socket.create_connection((host, int(port)), timeout=2).close()
        found[arg] = True
    except OSError:
        found[arg] = False
threads = [threading.Thread(target=attempt, args=(arg,)) for arg in sys.argv[1:]]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(json.dumps({arg: found[arg] for arg in sys.argv[1:]}))
"""
DOCKERD = """
{t} -N DOCKER-USER 2>/dev/null || true
{t} -A DOCKER-USER -j RETURN
{t} -P FORWARD DROP
{t} -I FORWARD -i br-app -j ACCEPT
{t} -I FORWARD -o br-app -j ACCEPT
{t} -D FORWARD -j DOCKER-USER 2>/dev/null || true
{t} -I FORWARD -j DOCKER-USER
{t} -t nat -A POSTROUTING -o eth0 -j MASQUERADE
"""


@dataclass
class Net:
    """Three namespaces; `folder` has what the guest is told."""

    tag: str
    folder: Path

    def run(self, where: str, *argv: str, check: bool = True) -> str:
        """Run a command in one of them."""
        done = subprocess.run(
            ["ip", "netns", "exec", f"{self.tag}{where}", *argv],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            env={"PATH": _PATH},
        )
        assert not check or done.returncode == 0, (argv, done.stderr)
        return done.stdout if check else f"{done.returncode} {done.stderr}"

    def start(self, where: str, *argv: str) -> subprocess.Popen[str]:
        """Start a program in one of them."""
        inside = ["ip", "netns", "exec", f"{self.tag}{where}", *argv]
        pipe = subprocess.PIPE
        return subprocess.Popen(inside, stdin=pipe, stdout=pipe, text=True, env={"PATH": _PATH})

    def reached(self, where: str, *targets: str) -> dict[str, bool]:
        """Which of `host,port` can be connected to."""
        found: dict[str, bool] = json.loads(self.run(where, sys.executable, "-IS", "-c", TRY, *targets))
        return found

    def dockerd(self) -> None:
        """As dockerd sets up its bridge: forwards all of it, and publishes port 10000."""
        for table in ("iptables", "ip6tables"):
            self.run("g", "sh", "-ec", DOCKERD.format(t=f"{table} -w"))
        publish = "-t nat -A PREROUTING -p tcp --dport 10000 ! -i br-app -j DNAT --to-destination"
        self.run("g", "iptables", "-w", *publish.split(), "172.30.0.2:10000")

    def boot(
        self, config: object, *, script: str = INIT_SCRIPT, fake: str = "systemd-run", fails: bool = False
    ) -> str:
        """The guest's boot as far as the script: code and errors. /dstack is there in its own root alone."""
        told = self.folder / "config"
        told.write_text(json.dumps(config))
        bin_ = self.folder / "bin"
        bin_.mkdir(exist_ok=True)
        timer = bin_ / fake
        timer.write_text(f'#!/bin/sh\necho "$@" > /out/timer\nexit {int(fails)}\n')
        timer.chmod(0o755)
        (self.folder / "out").mkdir(exist_ok=True)
        root = (
            "bwrap --tmpfs / --ro-bind /usr /usr --symlink usr/bin /bin --symlink usr/sbin /sbin "
            "--symlink usr/lib /lib --symlink usr/lib64 /lib64 --ro-bind /etc /etc --proc /proc --dev /dev "
            f"--tmpfs /run --tmpfs /tmp --ro-bind {bin_} /fake --bind {self.folder / 'out'} /out "
            f"--ro-bind {told} /dstack/.host-shared/.user-config --cap-add ALL "
            "--setenv PATH /fake:/usr/sbin:/usr/bin"
        ).split()
        # As dstack does it, though where "set -e" has no effect.
        sourced = "source <(printf '%s' \"$1\") || true\necho booted"
        return self.run("g", *root, "bash", "-c", sourced, "bash", INIT_SCRIPT, check=False)


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Net]:
    """With a server on each address that matters."""
    made = Net(f"pv{uuid.uuid4().hex[:6]}", tmp_path)
    spaces = [f"{made.tag}{each}" for each in "hgc"]
    for space in spaces:
        subprocess.run(["ip", "netns", "add", space], check=True, env={"PATH": _PATH}, timeout=30)
    servers: list[subprocess.Popen[str]] = []
    try:
        for line in f"""
            h link add eth0 type veth peer name eth0 netns {made.tag}g
            h addr add 10.0.2.2/24 dev eth0
            h addr add fd00::2/64 dev eth0 nodad
            h link set eth0 up
            h link set lo up
            g addr add 10.0.2.15/24 dev eth0
            g addr add fd00::15/64 dev eth0 nodad
            g link set eth0 up
            g link set lo up
            g route add default via 10.0.2.2
            g link add br-app type bridge
            g link add veth0 type veth peer name eth0 netns {made.tag}c
            g link set veth0 master br-app
            g link set veth0 up
            g link set br-app up
            g addr add 172.30.0.1/24 dev br-app
            g addr add fd01::1/64 dev br-app nodad
            c addr add 172.30.0.2/24 dev eth0
            c addr add fd01::2/64 dev eth0 nodad
            c link set eth0 up
            c link set lo up
            c route add default via 172.30.0.1
            c -6 route add default via fd01::1
        """.strip().splitlines():
            where, *words = line.split()
            made.run(where, "ip", *words)
        for switch in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            made.run("g", "sh", "-c", f"echo 1 > /proc/sys/net/{switch}")
        listeners = {
            "h": ["10.0.2.2,18080", "10.0.2.2,3128", "10.0.2.2,11530", "fd00::2,18080", "fd00::2,11530"],
            "g": ["172.30.0.1,8090", "10.0.2.15,8090", "fd01::1,8090"],
            "c": ["172.30.0.2,10000", "fd01::2,10001"],
        }
        for where, places in listeners.items():
            server = made.start(where, sys.executable, "-IS", "-c", SERVERS, *places)
            servers.append(server)
            assert server.stdout is not None
            assert server.stdout.readline() == "up\n"
        yield made
    finally:
        for server in servers:
            server.kill()
            server.communicate(timeout=30)
        for space in spaces:
            with contextlib.suppress(subprocess.SubprocessError):
                subprocess.run(["ip", "netns", "del", space], check=False, env={"PATH": _PATH}, timeout=30)


def config(**more: object) -> dict[str, object]:
    """What a validator tells a guest, as far as the script reads it."""
    told = {"validator_base_url": "http://10.0.2.2:18080", "proxy_url": "http://pv-a:00@10.0.2.2:3128"}
    return {**told, "hard_lifetime_s": 7200, **more}


ELSEWHERE = ("10.0.2.2,11530", "fd00::2,18080", "fd00::2,11530")
OF_THE_GUEST = ("172.30.0.1,8090", "10.0.2.15,8090", "fd01::1,8090")
OUTSIDE = ELSEWHERE + OF_THE_GUEST
VALIDATOR, PROXY = "10.0.2.2,18080", "10.0.2.2,3128"


def test_without_the_script_a_container_reaches_everything(net: Net) -> None:
    """The control: the VMM's API on the host, IPv6, the guest's own services."""
    net.dockerd()
    assert all(net.reached("c", VALIDATOR, PROXY, *OUTSIDE).values())
    assert net.reached("h", "10.0.2.15,10000") == {"10.0.2.15,10000": True}


def test_containers_reach_validator_and_proxy_and_nothing_else(net: Net) -> None:
    """Before and after dockerd has made its rules; the guest itself reaches on, and its port is served."""
    assert net.boot(config()) == "0 "
    net.dockerd()
    found = net.reached("c", VALIDATOR, PROXY, *OUTSIDE)
    assert [place for place, reached in found.items() if reached] == [VALIDATOR, PROXY]
    assert all(net.reached("g", VALIDATOR, "10.0.2.2,11530", "fd00::2,11530", "172.30.0.2,10000").values())
    assert all(net.reached("h", "10.0.2.15,10000", "10.0.2.15,8090").values())
    timer = (net.folder / "out" / "timer").read_text()
    assert "--on-active=7200s" in timer
    assert timer.endswith("systemctl --force poweroff\n")


def test_each_boot_sets_it_up_anew(net: Net) -> None:
    """Without a proxy nothing goes out, though an earlier boot had one; IPv6 addresses are understood."""
    assert net.boot(config()) == "0 "
    assert net.boot(config(proxy_url=None)) == "0 "
    net.dockerd()
    found = net.reached("c", VALIDATOR, PROXY, *OUTSIDE)
    assert [place for place, reached in found.items() if reached] == [VALIDATOR]
    assert net.boot(config(validator_base_url="http://[fd00::2]:18080/x", proxy_url=None)) == "0 "
    found = net.reached("c", VALIDATOR, PROXY, *OUTSIDE)
    assert [place for place, reached in found.items() if reached] == ["fd00::2,18080"]


NO_ADDRESSES = """
http://validator.example:18080
ftp://10.0.2.2:18080
http://10.0.2.2:18080 -j ACCEPT
http://$(reboot)
http://10.0.2.2:18080@evil.example/
http://10.0.2.2:11530@x
"""


def test_what_is_no_address_opens_nothing(net: Net) -> None:
    """The host can write what it likes into the user config: the script takes addresses and ports alone."""
    net.dockerd()
    for url in NO_ADDRESSES.splitlines():
        assert net.boot(config(validator_base_url=url, proxy_url=None)).startswith("0 "), url
        rules = net.run("g", "iptables", "-w", "-S", "DOCKER-USER").splitlines()
        assert [rule for rule in rules if "tcp" in rule] == [], url
        assert rules[-1] == "-A DOCKER-USER -j DROP"
    assert not any(net.reached("c", VALIDATOR, PROXY, *OUTSIDE).values())


def test_without_a_lifetime_or_a_packet_filter_there_is_no_boot(net: Net) -> None:
    """The sourcing shell ends, though its own `set -e` is without effect."""
    for lifetime in (None, "1; reboot", 0, 10**9):
        assert net.boot(config(hard_lifetime_s=lifetime)).startswith("1 "), lifetime
    done = net.boot(config(), fake="iptables", fails=True)
    assert done.startswith("1 ")
    assert "no boot" in done
