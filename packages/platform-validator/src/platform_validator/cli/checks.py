"""`validator check`: everything that the daemon needs, one line each, with what to do."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, replace
from http import HTTPStatus
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp

from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.signing import Keypair
from platform_validator.attestation.collateral import CollateralUnavailable, from_pccs
from platform_validator.challenges.git import missing_programs, private_file
from platform_validator.challenges.resolve import Unfit, choose_image
from platform_validator.challenges.source import SourceError
from platform_validator.config import ConfigFaults, Settings, load_settings
from platform_validator.config.hosts import HostSettings
from platform_validator.config.promises import promised_beyond
from platform_validator.cvm.vmm import VmmClient, VmmError, VmmFacts
from platform_validator.daemon.parts import images_file, make_connections, make_rules
from platform_validator.errors import ValidatorError
from platform_validator.keys import find_hotkey
from platform_validator.machine import machine_resources
from platform_validator.platform_client.port import NotAuthorized, PlatformClient, PlatformError

_GUEST_HOST = "10.0.2.2"
_SKEW_WARNED = 5.0
_NO_NAME = "expected an IP address: what a CVM reaches is walled in by address, and no name resolves inside"


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: ok, warn or fail."""

    name: str
    result: str
    detail: str


def run_checks(environment: Mapping[str, str], config: Path | None, *, home: Path) -> list[Check]:
    """All checks, in the order in which the daemon needs things; what depends on a failed one is left out."""
    try:
        settings = load_settings(environment, flag_file=config)
    except ConfigFaults as error:
        return [Check("configuration", "fail", fault) for fault in error.faults]
    found = [Check("configuration", "ok", f"state in {settings.db_path.parent}"), *_limits(settings)]
    found.append(_check_sources(settings))
    file, password_file = settings["keys.hotkey_file"], settings["keys.password_file"]
    credentials = environment.get("CREDENTIALS_DIRECTORY")
    try:
        keypair = find_hotkey(
            settings["validator.hotkey"],
            passphrase=settings["keys.passphrase"],
            hotkey_file=Path(file) if file else None,
            home=home,
            credentials=Path(credentials) if credentials else None,
            password_file=Path(password_file) if password_file else None,
        )
    except ValidatorError as error:
        return [*found, Check("key", "fail", str(error))]
    found.append(Check("key", "ok", f"the private key of {keypair.address} is there"))
    return found + asyncio.run(_outside(settings, keypair))


async def _outside(settings: Settings, keypair: Keypair) -> list[Check]:
    instance = "00000000-0000-4000-8000-000000000000"
    connections = make_connections(settings, keypair, instance)
    try:
        found = await check_platform(connections.client)
        offset = connections.signer.offset.total_seconds()
        found.append(
            Check("clock", "ok", "within the Platform API's tolerance")
            if abs(offset) < _SKEW_WARNED
            else Check(
                "clock", "warn", f"{offset:+.0f} s off the Platform API's: set this machine's clock (NTP)"
            )
        )
        for host, vmm in zip(settings.hosts, connections.vmms, strict=True):
            checks = [*await check_vmm(vmm, settings), *await check_open_vmm(host.url)]
            found += [_of_host(check, host, settings) for check in checks]
        found += [check_base_url(settings), *await check_egress(settings)]
        return [*found, *await check_attestation(settings)]
    finally:
        await connections.close()


def _of_host(check: Check, host: HostSettings, settings: Settings) -> Check:
    """Of several hosts a finding says whose it is."""
    return replace(check, name=f"{check.name} {host.name}") if settings["vmm"] else check


async def check_platform(client: PlatformClient) -> list[Check]:
    """Whether the Platform API answers and knows us."""
    try:
        await client.health()
        active = await client.active_challenges()
    except NotAuthorized as error:
        return [Check("platform api", "fail", str(error))]
    except PlatformError as error:
        return [Check("platform api", "fail", f"{error}: is PLATFORM_BASE_API right, and the server up?")]
    return [Check("platform api", "ok", f"registered; {len(active.challenges)} active challenges")]


async def check_vmm(vmm: VmmClient, settings: Settings) -> list[Check]:
    """Whether the VMM answers, has an image for the level, and makes what is asked for."""
    try:
        facts = await vmm.facts()
    except VmmError as error:
        return [Check("vmm", "fail", f"{error}: is DSTACK_VMM_URL right, and the VMM up?")]
    found = [Check("vmm", "ok", f"version {facts.version}"), check_image(facts, settings.level)]
    found += check_guest_ports(facts, settings)
    if settings.level is IsolationLevel.TEE:
        return found
    if facts.tee_only:
        detail = f"version {facts.version} makes TEEs only: a level below Tee needs dstack v0.5.6 or newer"
        found.append(Check("isolation", "fail", detail))
    elif settings["attestation.allow_simulated"] and not facts.simulates:
        detail = f"version {facts.version} simulates no TEE: unset attestation.allow_simulated"
        found.append(Check("isolation", "fail", detail))
    return found


def check_guest_ports(facts: VmmFacts, settings: Settings) -> list[Check]:
    """Whether a local VMM lets its guests reach the validator and, where it is needed, the egress proxy.

    Of several hosts, each of which can have URLs of its own, nothing is said.
    """
    told = [image.guest_ports for image in facts.images if image.guest_ports is not None]
    if not told or settings["vmm"]:
        return []
    wanted = ["validator.base_url", *(["egress.base_url"] if settings.network.allows_something else [])]
    urls = {name: urlsplit(settings[name]) for name in wanted}
    missing = {
        name: url.port or 80
        for name, url in urls.items()
        if url.hostname == _GUEST_HOST and (url.port or 80) not in told[0]
    }
    if not missing:
        return [Check("guest ports", "ok", f"guests reach {', '.join(map(str, told[0]))} of the VMM's host")]
    return [
        Check(
            "guest ports", "fail", f"{name} is out of guests' reach: platform-vmm needs --guest-port {port}"
        )
        for name, port in missing.items()
    ]


async def check_attestation(settings: Settings) -> list[Check]:
    """Whether quotes can be judged at all: known images, what was relaxed, the collateral service."""
    if settings.level is not IsolationLevel.TEE:
        word = "simulated quotes" if settings["attestation.allow_simulated"] else "no quotes"
        return [Check("attestation", "ok", f"at level {settings.level.value} {word} are asked for")]
    rules, path = make_rules(settings), images_file(settings)
    known, relaxed = (
        rules.images(),
        sorted(name for name, word in rules.outcomes.chosen.items() if word != "required"),
    )
    found = []
    if known.fault is not None:
        found.append(Check("os images", "fail", known.fault))
    elif known.pinned or known.published:
        count = len(known.pinned) + len(known.published)
        first = sum(entry.first_use is not None for entry in known.pinned)
        told = f", {first} of them trusted on first use: compare them with what their publisher names"
        detail = f"{count} entries in {path}{told if first else ''}"
        found.append(Check("os images", "warn" if first else "ok", detail))
    else:
        detail = f"none is known in {path}: start the daemon, then validator attestation pin"
        found.append(Check("os images", "warn", detail))
    if relaxed:
        found.append(Check("attestation", "warn", f"these do not refuse a CVM: {', '.join(relaxed)}"))
    if settings["attestation.offline"]:
        return [*found, Check("collateral", "warn", "offline: what is kept must do, and is not refreshed")]
    try:
        await from_pccs(settings["attestation.pccs_url"])("/sgx/certification/v4/rootcacrl")
    except CollateralUnavailable as error:
        return [*found, Check("collateral", "fail", f"{error}: set PCCS_URL, or let this machine reach it")]
    return [*found, Check("collateral", "ok", f"{settings['attestation.pccs_url']} answers")]


def check_image(facts: VmmFacts, level: IsolationLevel) -> Check:
    """Whether there is an image at or above the level."""
    try:
        image = choose_image(facts.images, named=None, level=level)
    except Unfit as error:
        return Check("image", "fail", str(error))
    return Check("image", "ok", f"{image.name} gives {image.level.value}, {level.value} is asked for")


async def check_open_vmm(url: str) -> list[Check]:
    """Guests of a dstack host reach its loopback: a VMM there must ask for credentials."""
    if url.startswith("unix:"):
        return []
    try:
        async with (
            aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as http,
            http.post(f"{url}/prpc/Version?json", json={}) as response,
        ):
            is_open = response.status == HTTPStatus.OK
    except (aiohttp.ClientError, TimeoutError, OSError):
        return []
    if not is_open:
        return []
    detail = "it answers without credentials, and guests reach its host's loopback: use unix: or a token"
    return [Check("vmm access", "fail", detail)]


def check_base_url(settings: Settings) -> Check:
    """Whether the base URL leads, as a guest sees it, to our listener."""
    url = urlsplit(settings["validator.base_url"])
    host, port = settings["validator.http_listen"]
    asked = url.port or (443 if url.scheme == "https" else 80)
    if not _is_address(url.hostname):
        return Check("base url", "fail", f"{url.geturl()}: {_NO_NAME}")
    if url.hostname != _GUEST_HOST:
        return Check(
            "base url", "warn", f"{url.geturl()} must reach {host}:{port} from inside a CVM: a proxy of yours"
        )
    if asked != port:
        return Check(
            "base url",
            "fail",
            f"a guest's {_GUEST_HOST}:{asked} is the VMM host's port {asked}, and we listen on {port}: "
            "set VALIDATOR_BASE_URL or VALIDATOR_HTTP_LISTEN",
        )
    return Check(
        "base url", "ok", f"a guest's {_GUEST_HOST}:{asked} is {host}:{port} here, if the VMM is on this host"
    )


async def check_egress(settings: Settings) -> list[Check]:
    """Whether CVMs can reach the egress proxy, where the operator lets anything out."""
    policy, name = settings.network, "egress"
    if not policy.allow_outbound:
        return [Check(name, "ok", "nothing may go out: network_policy.allow_outbound is false")]
    if not policy.allows_something:
        detail = "allow_outbound is true and allowed_hosts is empty: nothing may go out; name the hosts"
        return [Check(name, "warn", detail)]
    host, port = settings["egress.listen"]
    url = urlsplit(settings["egress.base_url"])
    asked = url.port or (443 if url.scheme == "https" else 80)
    if url.hostname == _GUEST_HOST and asked != port:
        detail = (
            f"a guest's {_GUEST_HOST}:{asked} is the VMM host's port {asked}, the proxy listens on {port}: "
            "set VALIDATOR_EGRESS_BASE_URL or VALIDATOR_EGRESS_LISTEN"
        )
        return [Check(name, "fail", detail)]
    if not _is_address(url.hostname):
        return [Check(name, "fail", f"{url.geturl()}: {_NO_NAME}")]
    found = []
    if url.hostname == _GUEST_HOST:
        detail = (
            f"a guest's {_GUEST_HOST}:{asked} is {host}:{port} here; platform-vmm needs --guest-port {port}"
        )
        found.append(Check(name, "ok", detail))
    else:
        found.append(Check(name, "warn", f"{url.geturl()} must reach {host}:{port} from inside a CVM"))
    if (taken := await _taken(host, port)) is not None:
        found.append(Check(name, "warn", taken))
    return found


async def _taken(host: str, port: int) -> str | None:
    """What is wrong with the proxy's address, as far as another process can tell."""
    try:
        server = await asyncio.start_server(lambda _reader, _writer: None, host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return f"{host}:{port} is in use: by the running validator's proxy, or another program's"
        return f"{host}:{port} cannot be listened on: {error.strerror}"
    server.close()
    return None


def _is_address(host: str | None) -> bool:
    try:
        ipaddress.ip_address(host or "")
    except ValueError:
        return False
    return True


def _check_sources(settings: Settings) -> Check:
    missing = missing_programs(frozenset(settings["sources.allow"]))
    if missing:
        detail = (
            f"{', '.join(missing)} not on PATH: install git, util-linux, coreutils, and ssh if it is allowed"
        )
        return Check("sources", "fail", detail)
    try:
        for name in ("sources.credentials_file", "sources.ssh_key_file"):
            if settings[name] is not None:
                private_file(Path(settings[name]), name)
    except SourceError as error:
        return Check("sources", "fail", str(error))
    return Check("sources", "ok", f"challenges may come by {', '.join(settings['sources.allow'])}")


def _limits(settings: Settings) -> list[Check]:
    has = machine_resources(settings.db_path.parent)
    return [Check("limits", "warn", line) for line in promised_beyond(settings, has)]
