"""A contained submission, the SDK's relay and the validator's egress proxy, each as it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from egress_world import PUBLIC, VM, World, world

from platform_challenge_sdk import Outcome, Submission
from platform_challenge_sdk.means import Means, read_egress

NAMES = {"api.test.example": [[PUBLIC]], "other.example": [[PUBLIC]]}
PROGRAM = """
import ssl, urllib.error, urllib.request
trust = ssl.create_default_context(cafile="/workspace/ca.pem")

def ask(url):
    try:
        return urllib.request.urlopen(url, timeout=30, context=trust).read()[:99]
    except urllib.error.HTTPError as error:
        return (error.code, error.headers["X-Egress-Refused"])
    except OSError as error:
        return str(error)

print(ask("http://api.test.example/path"))
print(ask("http://other.example/"))
print(ask("https://other.example/"))
print(ask("http://169.254.169.254/latest/meta-data/"))
print(ask("http://10.0.2.2:18080/"))

import http.client
tunnel = http.client.HTTPSConnection("127.0.0.1", 3128, context=trust, timeout=30)
tunnel.set_tunnel("api.test.example", 443)
tunnel.connect()
tunnel.sock.sendall(b"hello")
print(tunnel.sock.recv(5), tunnel.sock.server_hostname)
"""

pytestmark = pytest.mark.slow(reason="starts the proxy's process and a contained run")


async def run(made: World, folder: Path) -> Outcome:
    """The program as a submission that may go out as the CVM may."""
    assert made.proxy_url is not None
    assert made.supervisor.listen is not None
    host, port = made.supervisor.listen
    url = made.proxy_url.replace("10.0.2.2:3128", f"{host}:{port}")
    tree = folder / "submission"
    tree.mkdir(mode=0o755)
    (tree / "main.py").write_text(PROGRAM)
    submission = Submission(tree, "", means=Means(None, read_egress(url, "http://10.0.2.2:18080")))
    files = {"ca.pem": (folder / "server.pem").read_bytes()}
    return await submission.run(["python3", "main.py"], network=True, files=files)


async def test_a_submission_reaches_what_its_cvm_may_and_nothing_else(tmp_path: Path) -> None:
    """Plain HTTP and TLS to a declared host; other hosts, addresses and the validator are refused."""
    async with world(tmp_path, NAMES, hosts=("api.test.example",)) as made:
        outcome = await run(made, tmp_path)
        assert outcome.stderr == b""
        plain, foreign, secure, metadata, validator, tunnel = outcome.text.splitlines()
        assert plain.startswith("b'GET /path HTTP/1.1"), plain
        assert foreign == "(403, 'host_not_allowed')"
        assert "403" in secure
        assert metadata == "(403, 'raw_address')"
        assert validator == "(403, None)"  # the relay's own answer
        assert tunnel == "b'hello' api.test.example"
        assert made.dialled() == [f"{PUBLIC}:80", f"{PUBLIC}:443"]


async def test_a_cvm_that_is_gone_takes_its_submissions_way_out_along(tmp_path: Path) -> None:
    """The relay's credentials are the CVM's: forgotten, they open nothing."""
    async with world(tmp_path, NAMES, hosts=("api.test.example",)) as made:
        made.supervisor.forget(VM)
        await made.until(lambda: made.use().open == 0)
        outcome = await run(made, tmp_path)
        assert outcome.text.splitlines()[0] == "(407, 'unauthenticated')"
        assert made.dialled() == []
