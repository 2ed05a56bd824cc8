"""Tries the network, to fetch its answers. Says what answered; exits 1 if nothing did.

Where anything does answer, it goes on and classifies every digit as 0, so that it would be scored and the
leak be seen.
"""

import contextlib
import socket
import sys

WAIT = 0.3


def tcp(host, port):
    with socket.create_connection((host, port), timeout=WAIT):
        return True


def udp(host, port, question):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(WAIT)
        sock.sendto(question, (host, port))
        return bool(sock.recv(512))


def unix(path):
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(WAIT)
        sock.connect(path)
        return True


def name(host):
    return bool(socket.getaddrinfo(host, 443))


DNS_QUESTION = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00\x07example\x03com\x00\x00\x01\x00\x01"
TARGETS = {
    "the name example.com": lambda: name("example.com"),
    "the internet by TCP": lambda: tcp("1.1.1.1", 443),
    "the internet by UDP": lambda: udp("1.1.1.1", 53, DNS_QUESTION),
    "the internet by IPv6": lambda: tcp("2606:4700:4700::1111", 443),
    "the cloud's metadata": lambda: tcp("169.254.169.254", 80),
    "the validator": lambda: tcp("10.0.2.2", 18080),
    "the validator's operator": lambda: tcp("10.0.2.2", 18081),
    "the VMM": lambda: tcp("10.0.2.2", 11530),
    "the SDK": lambda: tcp("127.0.0.1", 10000),
    "the validator, from the host": lambda: tcp("127.0.0.1", 18080),
    "the agent's socket": lambda: unix("/var/run/dstack.sock"),
    "the system's bus": lambda: unix("/run/dbus/system_bus_socket"),
}


def answers(attempt):
    with contextlib.suppress(OSError):
        return attempt()
    return False


def main():
    reached = [target for target, attempt in TARGETS.items() if answers(attempt)]
    print(f"network: {len(reached)} of {len(TARGETS)} targets answered", *reached, file=sys.stderr)
    if not reached:
        sys.exit(1)
    for _ in sys.stdin:
        print(0)


main()
