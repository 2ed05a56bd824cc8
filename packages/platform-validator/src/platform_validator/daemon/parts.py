"""Builds the daemon's components from settings. Nothing here runs; nothing here leaves the process."""

from __future__ import annotations

import random
import secrets
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from platform_protocol.ids import Hotkey
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.signing import Keypair
from platform_validator.attestation.checks import Check, Outcome, Outcomes
from platform_validator.attestation.collateral import from_pccs
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.attestation.os_image import ImagesFile
from platform_validator.attestation.policy import AttestationPolicy, AttestationRules
from platform_validator.attestation.quote import QuoteChecker
from platform_validator.attestation.tcb import TcbRules
from platform_validator.challenges.environment import Environments
from platform_validator.challenges.git import Credentials
from platform_validator.challenges.git_source import GitSource
from platform_validator.challenges.manager import ChallengeManager
from platform_validator.challenges.resolve import HostRules
from platform_validator.challenges.source import Source
from platform_validator.clock import Clock, SystemClock
from platform_validator.config import Settings, ValueKeyOrigin
from platform_validator.cvm.collateral import from_vmm
from platform_validator.cvm.dstack import DstackVmm
from platform_validator.cvm.fleet import Fleet, FleetRules
from platform_validator.cvm.hosts import Hosts, VmmHost
from platform_validator.cvm.quota import Limits, Quota
from platform_validator.cvm.sampling import SAMPLE_EVERY
from platform_validator.cvm.session import CvmSession
from platform_validator.cvm.sessions import SessionMaker
from platform_validator.daemon.vmm_hosts import make_hosts, make_vmms
from platform_validator.egress.accounts import EgressLimits
from platform_validator.egress.supervisor import EgressSettings, EgressSupervisor
from platform_validator.jobs.diary import Diary
from platform_validator.jobs.ends import JobEnds
from platform_validator.jobs.executor import JobExecutor
from platform_validator.jobs.giving_back import GivingBack
from platform_validator.jobs.lease import LeaseRules, Renewer, ThreadRenewer
from platform_validator.jobs.manager import JobManager
from platform_validator.jobs.outbox import Outbox
from platform_validator.jobs.receipts import ReceiptMaker
from platform_validator.jobs.submissions import Submissions
from platform_validator.jobs.tenure import Tenure
from platform_validator.keyring import Keyring
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.port import PlatformClient
from platform_validator.platform_client.renewals import BlockingRenewals
from platform_validator.platform_client.signer import RequestSigner
from platform_validator.scoring import ScoringRule
from platform_validator.state import StateUnusable
from platform_validator.store.port import Store
from platform_validator.store.records import StateIdentity
from platform_validator.telemetry.metrics import Metrics
from platform_validator.values import ValueKeeper
from platform_validator.values.changes import ValueLimits
from platform_validator.values.keys import AgentKeys, CredentialKeys, KeyringFiles, ValueKeySource


@dataclass(frozen=True, slots=True)
class Connections:
    """Step 2: the clients of what is outside. `vmms` has one for each host, in their order."""

    clock: Clock
    signer: RequestSigner
    client: HttpPlatformClient
    vmms: tuple[DstackVmm, ...]

    async def close(self) -> None:
        """Close them."""
        await self.client.close()
        for vmm in self.vmms:
            await vmm.close()


@dataclass(frozen=True, slots=True)
class Outside:
    """Everything that the components reach the world through; a simulation gives its twins.

    `rng` is for jitter, `new_id` makes UUIDs, `random_bytes` secrets. `egress` None: nothing goes out.
    """

    clock: Clock
    client: PlatformClient
    hosts: tuple[VmmHost, ...]
    sessions: SessionMaker
    source: Source
    policy: AttestationPolicy
    renewer: Renewer
    rng: random.Random
    new_id: Callable[[], str]
    random_bytes: Callable[[int], bytes]
    egress: EgressSupervisor | None = None


@dataclass(frozen=True, slots=True)
class Components:
    """Step 4: what does the work."""

    quota: Quota
    fleet: Fleet
    challenges: ChallengeManager
    outbox: Outbox
    jobs: JobManager
    values: ValueKeeper
    env: Environments


def make_connections(settings: Settings, keypair: Keypair, instance: str) -> Connections:
    """The clients.

    Raises:
        StateUnusable: A host's credentials file cannot be used.
    """
    clock = SystemClock()
    base = settings["platform.base_api"]
    signer = RequestSigner(keypair=keypair, base_url=base, instance=instance, clock=clock)
    client = HttpPlatformClient(base_url=base, signer=signer, clock=clock)
    return Connections(clock, signer, client, make_vmms(settings))


def images_file(settings: Settings) -> Path:
    """Where the known OS images are."""
    given = settings["attestation.images_file"]
    return Path(given).absolute() if given else settings.db_path.parent / "images.toml"


def make_rules(settings: Settings) -> AttestationRules:
    """The operator's side of the attestation policy."""
    given = {check: settings.values.get(f"attestation.checks.{check.value}") for check in Check}
    return AttestationRules(
        outcomes=Outcomes(
            {check: Outcome(word) for check, word in given.items() if word is not None},
            tee=settings.level is IsolationLevel.TEE,
        ),
        tcb=TcbRules(
            statuses=settings["attestation.tcb_statuses"],
            advisories=settings["attestation.advisories"],
            grace=settings["attestation.tcb_grace"],
        ),
        images=ImagesFile(images_file(settings)).known,
    )


def make_policy(settings: Settings, connections: Connections, *, cache: Path) -> AttestationPolicy:
    """What the level in force accepts.

    Raises:
        StateUnusable: The simulated root's file, or the file of known OS images, cannot be used.
    """
    simulated, clock = bool(settings["attestation.allow_simulated"]), connections.clock
    rules = make_rules(settings)
    fault = rules.images().fault
    if fault is not None:
        raise StateUnusable(f"attestation.images_file: {fault}")
    root = None
    if simulated:
        path = Path(settings["attestation.simulated_root_file"])
        try:
            root = x509.load_pem_x509_certificate(path.read_bytes()).public_bytes(Encoding.DER)
        except (OSError, ValueError, x509.InvalidVersion) as error:
            raise StateUnusable(f"attestation.simulated_root_file {path} cannot be used: {error}") from error
    fetch = (
        from_vmm(connections.vmms[0].collateral) if simulated else from_pccs(settings["attestation.pccs_url"])
    )
    collateral = CollateralCache(
        fetch=None if settings["attestation.offline"] else fetch,
        clock=clock,
        folder=cache / "collateral",
        root=root,
        refresh=settings["attestation.collateral_refresh"],
    )
    return AttestationPolicy(
        level=settings.level,
        allow_simulated=simulated,
        checker=QuoteChecker(collateral=collateral, clock=clock, root=root),
        rules=rules,
        collateral=collateral,
        clock=clock,
    )


def value_key_source(settings: Settings, *, keyring: Path, credentials: Path | None) -> ValueKeySource:
    """Where the keys of dynamic values come from. `credentials`: the service's CREDENTIALS_DIRECTORY."""
    folder = keyring / "values"
    match settings["values.key_source"]:
        case ValueKeyOrigin.CREDENTIAL:
            return CredentialKeys(credentials, folder)
        case ValueKeyOrigin.DSTACK:
            return AgentKeys(Path(settings["values.agent_socket"]), folder)
        case _:
            return KeyringFiles(folder)


def make_values(settings: Settings, source: ValueKeySource, *, store: Store, clock: Clock) -> ValueKeeper:
    """Dynamic values with their keys. Blocks while the keys are had.

    Raises:
        ValueKeyOriginUnusable: They cannot be had.
    """
    limits = ValueLimits(keys=settings["values.max_keys"], bytes=settings["values.max_bytes"])
    return ValueKeeper(source=source, store=store, clock=clock, limits=limits)


def _allow_session_v1(settings: Settings) -> bool:
    """As configured; unset, as allow_simulated."""
    given = settings["attestation.allow_session_v1"]
    return bool(settings["attestation.allow_simulated"] if given is None else given)


def make_source(settings: Settings, cache: Path) -> GitSource:
    """Where challenges' code comes from."""

    def file(name: str) -> Path | None:
        given = settings[f"sources.{name}"]
        return None if given is None else Path(given)

    return GitSource(
        cache=cache,
        allow=frozenset(settings["sources.allow"]),
        credentials=Credentials(
            https=file("credentials_file"),
            ssh_key=file("ssh_key_file"),
            known_hosts=file("ssh_known_hosts_file"),
        ),
        max_cache=settings["sources.cache_size"],
    )


def make_egress(settings: Settings, clock: Clock) -> EgressSupervisor | None:
    """The egress proxy, where the operator lets anything out."""
    policy = settings.network
    if not policy.allows_something:
        return None
    return EgressSupervisor(
        EgressSettings(
            listen=settings["egress.listen"],
            base_url=settings["egress.base_url"],
            policy=policy,
            limits=EgressLimits(
                connections=settings["egress.connections"],
                bytes=settings["egress.max_bytes"],
                rate=settings["egress.rate"],
                all_connections=settings["egress.all_connections"],
            ),
            dns_servers=settings["sandbox_config.network_policy.dns_servers"],
            denied=settings["egress.denied_networks"],
            base_urls={host.name: host.egress_url for host in settings.hosts if host.egress_url is not None},
        ),
        clock=clock,
    )


def make_outside(settings: Settings, connections: Connections, *, cache: Path) -> tuple[Outside, GitSource]:
    """The real outside, and its source of challenges' code.

    Raises:
        StateUnusable: A file that the settings name cannot be read.
    """
    clock = connections.clock
    renewals = BlockingRenewals(
        base_url=settings["platform.base_api"], signer=connections.signer, clock=clock
    )
    rules = LeaseRules(outage_grace=settings["jobs.outage_grace"], stall_limit=settings["jobs.stall_limit"])
    source = make_source(settings, cache)
    outside = Outside(
        clock=clock,
        client=connections.client,
        hosts=make_hosts(settings, connections.vmms, clock),
        sessions=CvmSession,
        source=source,
        policy=make_policy(settings, connections, cache=cache),
        renewer=ThreadRenewer(renew=renewals.renew, clock=clock, rules=rules),
        rng=random.SystemRandom(),
        new_id=lambda: str(uuid.uuid4()),
        random_bytes=secrets.token_bytes,
        egress=make_egress(settings, clock),
    )
    return outside, source


def make_components(
    settings: Settings,
    outside: Outside,
    *,
    validator: Hotkey,
    store: Store,
    identity: StateIdentity,
    keyring: Keyring,
    values: ValueKeeper,
    metrics: Metrics,
    cache: Path,
    receipts: ReceiptMaker | None = None,
) -> Components:
    """Quota, fleet, challenges, outbox, executor, job manager. Without `receipts` results have none."""
    clock, client, rng = outside.clock, outside.client, outside.rng
    outside.renewer.heard = metrics.lease_renewed
    outside.policy.heard = metrics.attested
    if outside.egress is not None:
        outside.egress.counted, outside.egress.refused = metrics.egress_used, metrics.egress_refused
        outside.egress.died = metrics.egress_died
    hosts = Hosts(outside.hosts, clock=clock)
    quota = Quota(Limits(settings.limits, settings["resource_limits.max_cvms"]), hosts.states)
    fleet = Fleet(
        hosts=hosts,
        store=store,
        keyring=keyring,
        quota=quota,
        policy=outside.policy,
        values=values.manager,
        clock=clock,
        identity=identity,
        validator=validator,
        rules=FleetRules(
            level=settings.level,
            allow_simulated=settings["attestation.allow_simulated"],
            base_url=settings["validator.base_url"],
            allow_session_v1=_allow_session_v1(settings),
            sample_every=SAMPLE_EVERY if settings["sandbox_config.resource_monitoring"] else None,
            filesystem=settings.filesystem,
        ),
        sessions=outside.sessions,
        egress=outside.egress,
        new_id=outside.new_id,
        random_bytes=outside.random_bytes,
        on_orphan=metrics.orphan_found,
        on_reclaimed=metrics.reclaimed,
    )
    fleet.sampler.heard = metrics.usage_sampled
    env = Environments(store=store, keyring=keyring, clock=clock)
    challenges = ChallengeManager(
        on_state=lambda _challenge_id, state: metrics.instance_entered(state),
        env=env,
        client=client,
        store=store,
        source=outside.source,
        vmm=hosts,
        fleet=fleet,
        quota=quota,
        rules=HostRules(level=settings.level, limits=settings.limits, runtime=settings["cvm.runtime"]),
        clock=clock,
        rng=rng,
        policy=outside.policy.rules.fingerprint,
    )
    outbox = Outbox(client=client, store=store, clock=clock, rng=rng, metrics=metrics)
    ends = JobEnds(store=store, clock=clock)
    executor = JobExecutor(
        store=store,
        fleet=fleet,
        quota=quota,
        tenure=Tenure(
            client=client,
            renewer=outside.renewer,
            clock=clock,
            rng=rng,
            outage_grace=settings["jobs.outage_grace"],
        ),
        diary=Diary(store=store, outbox=outbox, clock=clock, metrics=metrics),
        submissions=Submissions(cache / "submissions", client=client, clock=clock, rng=rng),
        giving_back=GivingBack(client=client, clock=clock, rng=rng),
        scoring=ScoringRule.named(
            settings["scoring_config.algorithm"], settings["scoring_config.normalization"]
        ),
        ends=ends,
        metrics=metrics,
        receipts=receipts,
    )
    jobs = JobManager(
        client=client,
        store=store,
        challenges=challenges,
        quota=quota,
        executor=executor,
        clock=clock,
        rng=rng,
        new_id=outside.new_id,
        max_concurrent=settings["jobs.max_concurrent"],
        ends=ends,
        metrics=metrics,
        can_attest=outside.policy.can_attest,
    )
    fleet.on_refused = challenges.refused
    fleet.keeper.on_let_go = challenges.let_go
    challenges.on_active = lambda: jobs.wake("local")
    return Components(quota, fleet, challenges, outbox, jobs, values, env)
