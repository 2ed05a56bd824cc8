"""`network=True`: a relay to the egress proxy on the run's own loopback, and nothing else."""
# ruff: noqa: E501 - a line of a submission's program stays one line

from __future__ import annotations

import contextlib
import resource
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from platform_challenge_sdk import ContainmentUnavailable, Outcome, Submission, relay
from platform_challenge_sdk.contained import MIB, Order, run_contained
from platform_challenge_sdk.containment import Containment
from platform_challenge_sdk.means import Egress, Means, read_egress
from platform_challenge_sdk.proxy_head import MAX_HEAD, HeadRefused, own_answer, rewrite_head

EGRESS = Egress("10.0.2.2", 3128, b"Basic c2VjcmV0", frozenset({"10.0.2.2", "validator.example"}))


class TestHeads:
    @pytest.mark.parametrize(
        ("head", "kept"),
        [
            (b"CONNECT a.example:443 HTTP/1.1\r\nHost: a.example:443", b"Host: a.example:443"),
            (
                b"GET http://a.example/x?y=%20 HTTP/1.1\r\nHost: a.example\r\nX: \t1 ",
                b"Host: a.example\r\nX: \t1 ",
            ),
            (b"POST http://a.example:8080 HTTP/1.0\r\nContent-Length: 3", b"Content-Length: 3"),
        ],
    )
    def test_ours_are_the_only_credentials_and_the_rest_is_kept(self, head: bytes, kept: bytes) -> None:
        hop = b"\r\nPROXY-authorization: Basic eA==\r\nProxy-Connection: keep-alive\r\nConnection: close, X"
        first = head.split(b"\r\n")[0]
        expected = first + b"\r\n" + kept + b"\r\nProxy-Authorization: Basic c2VjcmV0\r\n\r\n"
        assert rewrite_head(head + hop + b"\r\n\r\n", EGRESS) == expected

    @pytest.mark.parametrize(
        ("head", "status"),
        [
            (b"", 400),
            (b"GET / HTTP/1.1", 400),
            (b"GET https://a.example/ HTTP/1.1", 400),
            (b"GET http://user@a.example/ HTTP/1.1", 400),
            (b"GET http://a.example/ HTTP/2", 400),
            (b"GET  http://a.example/ HTTP/1.1", 400),
            (b"get http://a.example/ HTTP/1.1", 400),
            (b"GET http://a.example/\xc3\xa9 HTTP/1.1", 400),
            (b"GET http://a.example:99999999/ HTTP/1.1", 400),
            (b"CONNECT a.example HTTP/1.1", 400),
            (b"CONNECT [::1]:443 HTTP/1.1", 400),
            (b"CONNECT a.example:443/x HTTP/1.1", 400),
            (b"TRACE http://a.example/ HTTP/1.1\r\nMax-Forwards: 0", 405),
            (b"BREW http://a.example/ HTTP/1.1", 405),
            (b"CONNECT validator.example:18080 HTTP/1.1", 403),
            (b"GET http://VALIDATOR.example./sdk HTTP/1.1", 403),
            (b"CONNECT 10.0.2.2:3128 HTTP/1.1", 403),
            (b"GET http://a.example/ HTTP/1.1\r\nA: 1\r\n folded", 400),
            (b"GET http://a.example/ HTTP/1.1\r\nA : 1", 400),
            (b"GET http://a.example/ HTTP/1.1\r\nA: 1\nProxy-Authorization: x", 400),
            (b"GET http://a.example/ HTTP/1.1\r\nA: 1\rB: 2", 400),
            (b"GET http://a.example/ HTTP/1.1\r\nA: \x00", 400),
            (b"GET http://a.example/ HTTP/1.1" + b"\r\nA: 1" * 200, 431),
        ],
    )
    def test_anything_else_is_answered_by_the_relay(self, head: bytes, status: int) -> None:
        with pytest.raises(HeadRefused) as refused:
            rewrite_head(head + b"\r\n\r\n", EGRESS)
        assert refused.value.status == status
        assert own_answer(refused.value).startswith(f"HTTP/1.1 {status} ".encode())

    def test_user_config_names_the_proxy_and_what_is_never_asked_for(self) -> None:
        assert read_egress(None, "http://10.0.2.2:18080") is None
        found = read_egress("http://pv-1:ab%3Acd@Proxy.example:3128", "http://10.0.2.2:18080")
        assert found == Egress(
            "proxy.example", 3128, b"Basic cHYtMTphYjpjZA==", frozenset({"proxy.example", "10.0.2.2"})
        )
        assert "cHYt" not in repr(found)


class Proxy:
    """Plays the egress proxy: keeps heads, answers plain requests, echoes tunnels in upper case."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.ended = threading.Semaphore(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: socket.socket) -> None:
        with connection:
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += connection.recv(1)
            self.heads.append(head)
            try:
                if head.startswith(b"CONNECT"):
                    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                    while chunk := connection.recv(65536):
                        connection.sendall(chunk.upper())
                else:
                    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nplain")
            except OSError:
                pass
        self.ended.release()

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # or the waiting accept keeps it open
        self._listener.close()


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    made = Proxy()
    yield made
    made.close()


@pytest.fixture
def submission(tmp_path: Path, proxy: Proxy) -> Submission:
    folder = tmp_path / "submission"
    folder.mkdir()
    folder.chmod(0o755)
    egress = read_egress(f"http://pv-1:canary@127.0.0.1:{proxy.port}", "http://validator.example:18080")
    return Submission(folder, "", means=Means(None, egress))


TUNNEL = "import socket\ns = socket.create_connection(('127.0.0.1', 3128)); s.sendall(b'CONNECT a.example:443 HTTP/1.1\\r\\n\\r\\n'); s.recv(99)\n"


def run(submission: Submission, program: str, *, network: bool = True, timeout: float = 30.0) -> Outcome:
    (submission.path / "main.py").write_text(program)
    return submission.run_sync(["python3", "main.py"], network=network, timeout=timeout)


class TestRuns:
    def test_ordinary_clients_find_it_and_tunnels_carry_both_ways(
        self, submission: Submission, proxy: Proxy
    ) -> None:
        program = (
            "import urllib.request\nprint(urllib.request.urlopen('http://a.example/x').read())\n" + TUNNEL
        )
        outcome = run(submission, program + "s.sendall(b'tls'); s.shutdown(1); print(s.recv(9), s.recv(9))")
        assert (outcome.text, outcome.stderr) == ("b'plain'\nb'TLS' b''\n", b"")
        assert [head.count(b"Proxy-Authorization: Basic cHYtMTpjYW5hcnk=\r\n") for head in proxy.heads] == [
            1,
            1,
        ]

    def test_nothing_else_is_there_and_the_credentials_are_nowhere(
        self, submission: Submission, proxy: Proxy
    ) -> None:
        program = (
            "import os, socket\n"
            f"for address in (('127.0.0.1', {proxy.port}), ('10.0.2.2', 3128), ('10.0.2.2', 18080), ('1.1.1.1', 53), ('169.254.169.254', 80)):\n"
            "    try: socket.create_connection(address, 1); print('reached', address)\n    except OSError: pass\n"
            "print([name for _, name in socket.if_nameindex()])\n"
            "try: socket.create_server(('127.0.0.1', 3128), reuse_port=True); print('taken')\nexcept OSError: pass\n"
            "seen = repr(os.environ)\n"
            "for pid in filter(str.isdigit, os.listdir('/proc')):\n"
            "    for name in ('environ', 'cmdline', 'maps'):\n"
            "        try: seen += repr(open(f'/proc/{pid}/{name}', 'rb').read())\n"
            "        except OSError: pass\n"
            "print('canary' in seen, 'cHYt' in seen, sorted(map(int, filter(str.isdigit, os.listdir('/proc')))))"
        )
        outcome = run(submission, program)
        assert (outcome.text, outcome.stderr) == ("['lo']\nFalse False [1, 2]\n", b"")
        assert proxy.heads == []

    def test_what_it_asks_wrongly_never_reaches_the_proxy(self, submission: Submission, proxy: Proxy) -> None:
        program = (
            "import socket\n"
            f"for head in (b'TRACE http://a.example/ HTTP/1.1', b'CONNECT validator.example:18080 HTTP/1.1', b'CONNECT 127.0.0.1:{proxy.port} HTTP/1.1', b'x' * {2 * MAX_HEAD}):\n"
            "    s = socket.create_connection(('127.0.0.1', 3128)); s.sendall(head + b'\\r\\n\\r\\n'); print(s.recv(12).decode()[-3:])"
        )
        assert run(submission, program).text.split() == ["405", "403", "403", "431"]
        assert proxy.heads == []

    def test_a_killed_run_leaves_no_connection_thread_or_descriptor(
        self, submission: Submission, proxy: Proxy
    ) -> None:
        run(submission, "")
        before = len(list(Path("/proc/self/fd").iterdir()))
        outcome = run(
            submission, TUNNEL + "import time; print('open', flush=True); time.sleep(50)", timeout=1.5
        )
        assert (outcome.text, outcome.killed_by) == ("open\n", "timeout")
        assert proxy.ended.acquire(timeout=30)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
        assert "relay" not in {thread.name for thread in threading.enumerate()}

    def test_so_many_connections_at_once_and_no_more(
        self, submission: Submission, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(relay, "MAX_CONNECTIONS", 2)
        program = TUNNEL + "first = s\n" + TUNNEL.split("\n", 1)[1] + "second = s\n"
        program += "s = socket.create_connection(('127.0.0.1', 3128)); print(s.recv(12))"
        assert run(submission, program).text == "b'HTTP/1.1 503'\n"

    def test_so_many_bytes_and_no_more(self, submission: Submission, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(relay, "MAX_BYTES", 300_000)
        program = TUNNEL + (
            "import threading\n"
            "def send():\n    try:\n        while True: s.sendall(bytes(65536))\n    except OSError: pass\n"
            "threading.Thread(target=send, daemon=True).start()\ncount = 0\n"
            "try:\n    while chunk := s.recv(65536): count += len(chunk)\nexcept OSError: pass\n"
            "print(count <= 300000)"
        )
        assert run(submission, program).text == "True\n"

    def test_a_proxy_that_is_away_is_said(self, submission: Submission, proxy: Proxy) -> None:
        proxy.close()
        outcome = run(
            submission,
            "import urllib.request\ntry: urllib.request.urlopen('http://a.example/x')\nexcept OSError as error: print(error)",
        )
        assert outcome.text == "HTTP Error 502: Bad Gateway\n"

    def test_without_it_there_is_no_proxy(self, submission: Submission) -> None:
        program = "import os, socket\nprint([n for n in os.environ if 'proxy' in n.lower()])\ntry: socket.create_connection(('127.0.0.1', 3128))\nexcept OSError: print('refused')"
        assert run(submission, program, network=False).text == "[]\nrefused\n"

    def test_where_nothing_may_go_out_it_is_refused(self, submission: Submission) -> None:
        closed = Submission(submission.path, "")
        with pytest.raises(ContainmentUnavailable, match="network=True: nothing may go out of this CVM"):
            run(closed, "")

    def test_without_network_namespaces_it_is_refused(self, submission: Submission) -> None:
        order = Order(["true"], submission.path, b"", 9.0, 64 * MIB, {}, MIB, egress=EGRESS)
        with pytest.raises(ContainmentUnavailable, match=r"needs a network namespace; here is Landlock 7"):
            run_contained(order, (), Containment("landlock", True, 7))


class TestMeans:
    def test_the_sdk_keeps_its_128_mib_and_a_run_that_asks_for_more_is_refused(self, tmp_path: Path) -> None:
        submission = Submission(tmp_path, "", means=Means(512 * MIB))
        with pytest.raises(ValueError, match=f"memory: expected at most {384 * MIB} bytes"):
            submission.run_sync(["true"], memory=384 * MIB + 1)
        with pytest.raises(ValueError, match=f"disk: expected at most {384 * MIB} bytes"):
            submission.run_sync(["true"], disk=384 * MIB + 1)
        with pytest.raises(ValueError, match="needs more than 128 MiB"):
            Submission(tmp_path, "", means=Means(128 * MIB)).run_sync(["true"])

    @pytest.mark.parametrize(
        ("declared", "asked", "given"),
        [
            (512, (None, None), (256, 256, 64)),
            (192, (None, None), (64, 256, 64)),
            (160, (None, None), (32, 256, 32)),
            (512, (384, 384), (384, 384, 384)),
        ],
    )
    def test_what_is_not_asked_for_is_what_there_is(
        self, declared: int, asked: tuple[int | None, int | None], given: tuple[int, int, int]
    ) -> None:
        memory, disk = (None if part is None else part * MIB for part in asked)
        assert Means(declared * MIB).share(memory, disk) == tuple(part * MIB for part in given)

    @pytest.mark.parametrize(
        ("most", "jobs", "each"), [(512, 1, 128), (512, 3, 128), (512, 4, 109), (512, 16, 25), (512, 64, 16)]
    )
    def test_the_jobs_of_a_cvm_share_its_processes(self, most: int, jobs: int, each: int) -> None:
        """Fork bombs in all but one of them leave that one, and the SDK, theirs."""
        before = resource.getrlimit(resource.RLIMIT_NPROC)
        resource.setrlimit(resource.RLIMIT_NPROC, (most, before[1]))
        try:
            assert Means(jobs=jobs).processes == each
        finally:
            resource.setrlimit(resource.RLIMIT_NPROC, before)

    def test_it_is_never_more_than_the_machine_has(self) -> None:
        assert Means(1 << 60).most == Means().most < 1 << 50
