"""Tries to get out, and says of each try what came of it."""

import json
import os
import socket
import ssl
import urllib.error
import urllib.request

from platform_challenge_sdk import Context, challenge, run

TRUSTING = ssl.create_default_context()
TRUSTING.check_hostname = False
TRUSTING.verify_mode = ssl.CERT_NONE


def fetched(url: str) -> str:
    """What an ordinary client gets, with the proxy of the environment."""
    try:
        with urllib.request.urlopen(url, timeout=20, context=TRUSTING) as answer:  # noqa: S310 - http and https
            return str(answer.read(1000).decode())
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.headers.get('X-Egress-Refused')}"
    except OSError as error:
        return f"error {error}"


def connected(place: str) -> bool:
    """Whether a plain TCP connection comes about."""
    host, _, port = place.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError:
        return False
    return True


def resolved(name: str) -> bool:
    """Whether a name leads anywhere."""
    try:
        socket.getaddrinfo(name, 443)
    except OSError:
        return False
    return True


@challenge.on_job()
def job(ctx: Context, payload: dict[str, list[str]]) -> dict[str, object]:
    """Everything that is asked for."""
    found = {
        "fetched": {url: fetched(url) for url in payload["fetch"]},
        "connected": {place: connected(place) for place in payload["connect"]},
        "resolved": {name: resolved(name) for name in payload["resolve"]},
        "proxy": "HTTPS_PROXY" in os.environ,
    }
    return {"score": 1.0, "logs": [json.dumps(found)]}


run()
