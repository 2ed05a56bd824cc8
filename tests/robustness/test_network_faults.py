"""Robustness 11 and 14: the real HTTP client, the real Platform API, and a network that breaks."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TypeVar

import pytest
from aiohttp import web
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from tests.network.proxy import TcpProxy
from tests.network.real_api import KEYS, RealApi, running_real_api
from tests.network.toxics import Bandwidth, BlackHole, Direction, Down, Latency, Limit, Reset, Slicer, Toxic

from platform_protocol.ids import ClaimId, JobId, LeaseToken
from platform_protocol.platform_messages import ReleaseReason
from platform_validator.clock import SystemClock
from platform_validator.platform_client.conformance import a_result
from platform_validator.platform_client.http import HttpPlatformClient
from platform_validator.platform_client.port import PlatformUnavailable
from platform_validator.platform_client.renewals import BlockingRenewals
from platform_validator.platform_client.signer import RequestSigner

SHORT = timedelta(seconds=1)
T = TypeVar("T")
LEASE = JobId("job"), LeaseToken("token")


@dataclass
class Line:
    """A Platform API, the proxy in front of it, and a validator's two clients behind that."""

    api: RealApi
    proxy: TcpProxy
    client: HttpPlatformClient
    renewals: BlockingRenewals


def signer(url: str) -> RequestSigner:
    """The first validator's."""
    return RequestSigner(
        keypair=KEYS[0], base_url=url, instance="00000000-0000-4000-8000-000000000000", clock=SystemClock()
    )


@pytest.fixture
async def line(tmp_path: Path) -> AsyncIterator[Line]:
    """Everything over loopback, and nothing broken yet."""
    with ExitStack() as stack:
        proxies: list[TcpProxy] = []

        def known_by(port: int) -> list[str]:
            proxies.append(stack.enter_context(TcpProxy(("127.0.0.1", port))))
            return [proxies[0].url]

        async with running_real_api(tmp_path, known_by) as api:
            url = proxies[0].url
            client = HttpPlatformClient(
                base_url=url, signer=signer(url), clock=SystemClock(), timeout=SHORT, download_timeout=SHORT
            )
            renewals = BlockingRenewals(base_url=url, signer=signer(url), clock=SystemClock(), timeout=SHORT)
            async with client:
                yield Line(api, proxies[0], client, renewals)


BROKEN: dict[str, tuple[Toxic, tuple[Direction, ...]]] = {
    "refused": (Down(), (Direction.UPSTREAM, Direction.DOWNSTREAM)),
    "half-open: requests vanish": (BlackHole(), (Direction.UPSTREAM,)),
    "half-open: answers vanish": (BlackHole(), (Direction.DOWNSTREAM,)),
    "reset at once": (Reset(), (Direction.DOWNSTREAM,)),
    "reset in mid answer": (Reset(40), (Direction.DOWNSTREAM,)),
    "closed in mid answer": (Limit(40), (Direction.DOWNSTREAM,)),
    "closed in mid request": (Limit(10), (Direction.UPSTREAM,)),
    "one byte at a time, too slow": (Slicer(1, delay=0.05), (Direction.DOWNSTREAM,)),
    "late": (Latency(5), (Direction.DOWNSTREAM,)),
}


@pytest.mark.robustness(11, "half-open", "reset")
@pytest.mark.parametrize("fault", BROKEN)
async def test_a_broken_line_is_unavailability_within_the_deadline_and_heals(line: Line, fault: str) -> None:
    """Robustness 11: nothing is believed of what did not come whole; the same client works when it heals."""
    challenge = await line.api.add_challenge()
    job_id = await line.api.add_job(challenge)
    claim = await line.client.claim(job_id, ClaimId("claim"))
    toxic, ways = BROKEN[fault]
    line.proxy.set(toxic, directions=ways)
    began = asyncio.get_running_loop().time()
    with pytest.raises(PlatformUnavailable):
        await line.client.pending_jobs([challenge])
    with pytest.raises(PlatformUnavailable):
        await asyncio.to_thread(line.renewals.renew, job_id, claim.lease.token)
    assert asyncio.get_running_loop().time() - began < 10 * SHORT.total_seconds()
    line.proxy.set()
    assert not await line.client.pending_jobs([challenge])
    assert await asyncio.to_thread(line.renewals.renew, job_id, claim.lease.token)


@pytest.mark.robustness(11, "one-byte")
@pytest.mark.parametrize("toxic", [Slicer(), Latency(0.05, jitter=0.05), Bandwidth(50_000)])
async def test_a_bad_line_that_is_in_time_is_good_enough(line: Line, toxic: Toxic) -> None:
    """Robustness 11: answers in single bytes, late ones and slow ones are answers."""
    challenge = await line.api.add_challenge()
    job_id = await line.api.add_job(challenge)
    line.proxy.set(toxic)
    [job] = await line.client.pending_jobs([challenge])
    claim = await line.client.claim(job.id, ClaimId("claim"))
    assert await asyncio.to_thread(line.renewals.renew, job_id, claim.lease.token)
    await line.client.submit_result(job_id, a_result(claim))


Act = Callable[[], Awaitable[T]]


async def twice(line: Line, act: Act[T]) -> T:
    """Do it with its answer lost, then again; returns what the second try was answered."""
    line.proxy.set(BlackHole(), directions=(Direction.DOWNSTREAM,))
    swallowed = line.proxy.swallowed[Direction.DOWNSTREAM]
    with pytest.raises(PlatformUnavailable):
        await act()
    assert line.proxy.swallowed[Direction.DOWNSTREAM] > swallowed, "no answer was sent"
    line.proxy.set()
    return await act()


@pytest.mark.robustness(14, "claim", "result", "renewal", "release")
async def test_whatever_answer_is_lost_after_the_commit_repeating_the_call_does_nothing_twice(
    line: Line,
) -> None:
    """Robustness 14: claim, renewal, result and release: the second time gets the answer of the first."""
    challenge = await line.api.add_challenge()
    first, second = [await line.api.add_job(challenge) for _ in range(2)]
    claim = await twice(line, lambda: line.client.claim(first, ClaimId("claim-1")))
    direct = await line.api.client().claim(first, ClaimId("claim-1"))
    assert (claim.attempt, claim.lease.token) == (1, direct.lease.token)
    await twice(line, lambda: line.client.renew(first, claim.lease.token))
    await twice(line, lambda: line.client.submit_result(first, a_result(claim)))
    other = await line.client.claim(second, ClaimId("claim-2"))
    await twice(line, lambda: line.client.release(second, other.lease.token, ReleaseReason.CAPACITY))
    again = await line.api.client(1).claim(second, ClaimId("claim-3"))
    assert again.attempt == 2


@pytest.mark.robustness(11, "dns")
async def test_a_name_that_does_not_resolve_is_unavailability() -> None:
    """Robustness 11: DNS failure, for both clients."""
    url = "http://platform-api.invalid:8080"
    keys = signer(url)
    async with HttpPlatformClient(base_url=url, signer=keys, clock=SystemClock(), timeout=SHORT) as client:
        with pytest.raises(PlatformUnavailable):
            await client.health()
    renewals = BlockingRenewals(base_url=url, signer=keys, clock=SystemClock(), timeout=SHORT)
    with pytest.raises(PlatformUnavailable):
        await asyncio.to_thread(renewals.renew, *LEASE)


def certificate(folder: Path, *, valid_from: datetime, valid_until: datetime) -> ssl.SSLContext:
    """A server's context with a certificate of its own making."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(valid_from)
        .not_valid_after(valid_until)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, SHA256())
    )
    path = folder / "server.pem"
    private = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(private + made.public_bytes(Encoding.PEM))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(path)
    return context


@pytest.mark.robustness(11, "tls")
@pytest.mark.parametrize("expired", [True, False])
async def test_a_certificate_that_has_expired_or_that_nobody_vouches_for_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expired: bool
) -> None:
    """Robustness 11: no request goes out over such a connection; the reason names the certificate."""
    now = datetime.now(UTC)
    until = now - timedelta(days=1) if expired else now + timedelta(days=1)
    context = certificate(tmp_path, valid_from=now - timedelta(days=2), valid_until=until)
    if expired:
        # Trusted, so that nothing but the date is wrong with it.
        monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "server.pem"))
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({})

    app = web.Application()
    app.router.add_route("*", "/{tail:.*}", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
    await site.start()
    url = f"https://localhost:{runner.addresses[0][1]}"
    try:
        async with HttpPlatformClient(base_url=url, signer=signer(url), clock=SystemClock()) as client:
            with pytest.raises(PlatformUnavailable, match="certificate"):
                await client.health()
        renewals = BlockingRenewals(base_url=url, signer=signer(url), clock=SystemClock())
        with pytest.raises(PlatformUnavailable, match="certificate"):
            await asyncio.to_thread(renewals.renew, *LEASE)
    finally:
        await runner.cleanup()
    assert asked == []


@pytest.mark.robustness(11, "redirect")
async def test_credentials_do_not_follow_a_redirect_to_another_host(tmp_path: Path) -> None:
    """Robustness 11: the other host hears nothing, neither a signature nor a lease's token."""
    asked: list[str] = []

    async def elsewhere(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"term_s": 9999})

    async def here(request: web.Request) -> web.Response:
        return web.Response(status=308, headers={"Location": f"http://localhost:{other}/steal"})

    runners = []
    for answer in (elsewhere, here):
        app = web.Application()
        app.router.add_route("*", "/{tail:.*}", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        runners.append(runner)
    other, port = (runner.addresses[0][1] for runner in runners)
    url = f"http://127.0.0.1:{port}"
    try:
        async with HttpPlatformClient(base_url=url, signer=signer(url), clock=SystemClock()) as client:
            for call in (client.health(), client.renew(*LEASE), client.submit_result(LEASE[0], b"{}")):
                with pytest.raises(PlatformUnavailable, match="redirect"):
                    await call
            with pytest.raises(PlatformUnavailable):
                await anext(client.notifications())
        renewals = BlockingRenewals(base_url=url, signer=signer(url), clock=SystemClock())
        with pytest.raises(PlatformUnavailable):
            await asyncio.to_thread(renewals.renew, *LEASE)
    finally:
        for runner in runners:
            await runner.cleanup()
    assert asked == []
