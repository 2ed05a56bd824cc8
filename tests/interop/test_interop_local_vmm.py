"""The validator's CVM side against the real local VMM, its sandboxes and its simulated attestation."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from no_values import NoValues
from ports import free_port, free_range

from platform_protocol.bundle import TreeEntry, pack
from platform_protocol.canonical import sha256_hex
from platform_protocol.compose import app_compose, compose_hash
from platform_protocol.ids import ChallengeId, Hotkey, JobId
from platform_protocol.platform_messages import AttestationKind, IsolationLevel
from platform_protocol.resources import Resources
from platform_protocol.spec import parse_platform_toml
from platform_validator.attestation.collateral_cache import CollateralCache
from platform_validator.attestation.policy import AttestationPolicy
from platform_validator.attestation.quote import QuoteChecker
from platform_validator.clock import SystemClock
from platform_validator.cvm.collateral import from_vmm
from platform_validator.cvm.dstack import DstackVmm
from platform_validator.cvm.errors import AttestationRefused
from platform_validator.cvm.fleet import Fleet, FleetRules
from platform_validator.cvm.host_ports import HostPorts
from platform_validator.cvm.hosts import Hosts, VmmHost
from platform_validator.cvm.jobs import JobOrder
from platform_validator.cvm.plan import CvmPlan
from platform_validator.cvm.probe import HttpProbe
from platform_validator.cvm.quota import Limits, Quota, Reservation
from platform_validator.cvm.sampling import SAMPLE_EVERY
from platform_validator.cvm.vmm import VmmClient
from platform_validator.host_name import DEFAULT_HOST
from platform_validator.keyring import Keyring
from platform_validator.store.records import Purpose, StateIdentity
from platform_validator.store.sqlite import SqliteStore
from platform_vmm.simulation.pki import load_pki

pytestmark = [
    pytest.mark.slow,  # builds the runtime image and starts sandboxes
    pytest.mark.needs("root", "bwrap"),
]

IMAGE = "local-sandbox"
SIZE = Resources(cpu_cores=1, memory_mb=256, disk_mb=512)
PLATFORM_TOML = (
    b'name = "halves"\nversion = "1"\nentry = "challenge"\n[cvm]\ncpu_cores = 1\nmemory_mb = 256\n'
)
CODE = b"""
import tempfile
from pathlib import Path
from platform_challenge_sdk import Submission, challenge
from platform_challenge_sdk.means import Means, read_egress
from platform_challenge_sdk.trial import containment

ASK = "import urllib.request, urllib.error\\n" \\
    "try: urllib.request.urlopen('http://api.example/')\\n" \\
    "except urllib.error.HTTPError as error: print(error.code)"


@challenge.on_job()
async def handle(ctx, payload):
    nowhere = Means(None, read_egress("http://vm:password@127.0.0.1:1", "http://10.0.2.2:1"))
    submission = Submission(Path(tempfile.mkdtemp()), "", means=nowhere)
    asked = await submission.run(["python3", "-c", ASK], network=True)
    told = {"containment": str(containment()), "relay": asked.text.strip()}
    return {"score": payload["x"] / 2} | told
"""


@dataclass
class LocalVmm:
    """A running `platform-vmm serve`."""

    url: str
    token: str
    root: Path
    guest_port: int


@pytest.fixture(scope="module")
def local_vmm() -> Iterator[LocalVmm]:
    with tempfile.TemporaryDirectory(prefix="pvmm-") as folder:
        state, path = Path(folder, "state"), Path(folder, "vmm.sock")
        guest_port = free_port()
        command = [str(Path(sys.executable).parent / "platform-vmm"), "serve", "--listen", f"unix:{path}"]
        with subprocess.Popen(
            [*command, "--state-dir", str(state), "--guest-port", str(guest_port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as process:
            try:
                deadline = time.monotonic() + 50
                while not path.exists():
                    assert process.poll() is None, "the VMM ended"
                    assert time.monotonic() < deadline, "the VMM does not listen"
                    time.sleep(0.05)
                token = (state / "token").read_text().strip()
                yield LocalVmm(f"unix:{path}", token, state / "simulated-root.pem", guest_port)
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(20)


@pytest.fixture
async def client(local_vmm: LocalVmm) -> AsyncIterator[DstackVmm]:
    vmm = DstackVmm(local_vmm.url, token=local_vmm.token)
    yield vmm
    await vmm.close()


async def compose_for(client: VmmClient, bundle_sha256: str) -> bytes:
    [image] = [image for image in (await client.facts()).images if image.name == IMAGE]
    runtime = f"platform-runtime@{image.runtimes['platform-runtime']}"
    return app_compose(parse_platform_toml(PLATFORM_TOML), bundle_sha256=bundle_sha256, runtime=runtime)


@dataclass
class Real:
    """A fleet on the local VMM, and what it boots."""

    fleet: Fleet
    quota: Quota
    plan: CvmPlan
    client: DstackVmm

    def reserve(self) -> Reservation:
        reservation = self.quota.reserve(SIZE, "test")
        assert isinstance(reservation, Reservation)
        return reservation


@contextlib.asynccontextmanager
async def fleet_on(local: LocalVmm, client: DstackVmm, folder: Path, root: bytes) -> AsyncIterator[Real]:
    bundle = pack([TreeEntry("challenge.py", data=CODE), TreeEntry("platform.toml", data=PLATFORM_TOML)])
    digest = sha256_hex(bundle)
    compose = await compose_for(client, digest)
    plan = CvmPlan(
        challenge_id=ChallengeId("00000000-0000-4000-8000-000000000001"),
        instance_key="halves@1",
        commit="c" * 40,
        image=IMAGE,
        compose=compose,
        compose_hash=compose_hash(compose),
        bundle_sha256=digest,
        resources=SIZE,
        timeout=timedelta(minutes=1),
    )
    clock, quota = SystemClock(), Quota(Limits(Resources(cpu_cores=4, memory_mb=2048, disk_mb=9999), 4))
    collateral = CollateralCache(fetch=from_vmm(client.collateral), clock=clock, root=root)
    checker = QuoteChecker(collateral=collateral, clock=clock, root=root)
    store = await SqliteStore.open(folder / "validator.db")
    ports = HostPorts(*free_range(21))
    host = VmmHost(DEFAULT_HOST, client, HttpProbe(vmm=client, clock=clock), ports)
    fleet = Fleet(
        hosts=Hosts([host], clock=clock),
        store=store,
        keyring=Keyring(b"k" * 32),
        quota=quota,
        policy=AttestationPolicy(level=IsolationLevel.CONTAINER, allow_simulated=True, checker=checker),
        values=NoValues(),
        clock=clock,
        identity=StateIdentity("0123456789", "instance"),
        validator=Hotkey("5DD"),
        rules=FleetRules(
            IsolationLevel.CONTAINER,
            allow_simulated=True,
            base_url=f"http://10.0.2.2:{local.guest_port}",
            sample_every=SAMPLE_EVERY,
        ),
    )

    async def serve_bundle(request: web.Request) -> web.Response:
        allowed = fleet.may_fetch_bundle(request.headers.get("Authorization", ""), request.match_info["sha"])
        return web.Response(body=bundle) if allowed else web.Response(status=404)

    app = web.Application()
    app.router.add_get("/bundles/{sha}", serve_bundle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", local.guest_port).start()
    try:
        async with asyncio.TaskGroup() as group:
            running = group.create_task(fleet.run())
            await asyncio.sleep(0)  # the turn in which the fleet begins
            yield Real(fleet, quota, plan, client)
            async with asyncio.timeout(30):
                await fleet.destroyer.finish()
            running.cancel()
    finally:
        await runner.cleanup()
        await store.close()
    assert quota.view().cvms == 0
    assert not await client.list("pv-0123456789-")


async def test_a_real_sandbox_is_attested_runs_a_job_and_goes(
    local_vmm: LocalVmm, client: DstackVmm, tmp_path: Path
) -> None:
    """Its simulated quote verifies under the VMM's own root, and is marked simulated."""
    root = x509.load_pem_x509_certificate(local_vmm.root.read_bytes()).public_bytes(Encoding.DER)
    async with fleet_on(local_vmm, client, tmp_path, root) as real:
        cvm = await real.fleet.boot(
            real.plan,
            purpose=Purpose.JOB,
            reservation=real.reserve(),
            claim_id=None,
            on_stage=lambda _stage: None,
        )
        assert cvm.attestation is AttestationKind.SIMULATED
        order = JobOrder(
            JobId("22222222-2222-4222-8222-222222222222"), 1, cvm.plan.challenge_id, None, {"x": 1}, None
        )
        async with asyncio.timeout(20):
            result = await cvm.session.execute(
                order,
                None,
                on_started=lambda _already: None,
                on_progress=lambda percent, message: None,
                on_log=lambda level, message: None,
            )
        # 502 is the relay's own answer: it was reached, and that proxy was not.
        told = {"containment": "namespaces and seccomp", "relay": "502"}
        assert result.result == {"score": 0.5} | told
        assert result.evidence is not None
        used = await real.fleet.usage(cvm.name)
        assert used is not None
        assert (used.cpu_time_ms or 0) > 50, "a Python interpreter was started"
        assert 2**20 < (used.memory_bytes or 0) <= (used.memory_peak_bytes or 0) < 2**30
        assert (used.network_bytes or 0) > 1000, "the bundle and the session went through its relays"
        assert used.disk_bytes is not None
        [view] = real.fleet.views()
        assert view.usage == used
        await cvm.session.acknowledge(result)
        real.fleet.destroy(cvm.name)


async def test_a_sandbox_whose_quotes_have_another_root_is_refused(
    local_vmm: LocalVmm, client: DstackVmm, tmp_path: Path
) -> None:
    """Nothing goes in, and it is destroyed."""
    another = load_pki(tmp_path).root.public_bytes(Encoding.DER)
    async with fleet_on(local_vmm, client, tmp_path, another) as real:
        with pytest.raises(AttestationRefused) as refused:
            await real.fleet.boot(
                real.plan,
                purpose=Purpose.JOB,
                reservation=real.reserve(),
                claim_id=None,
                on_stage=lambda _stage: None,
            )
        assert refused.value.check == "pck_chain"
