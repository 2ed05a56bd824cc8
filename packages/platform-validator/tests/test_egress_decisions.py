"""The egress proxy's decisions: targets, addresses, ClientHellos, policies, accounts. No I/O."""

from __future__ import annotations

import ipaddress
import ssl
from contextlib import suppress

import h11
import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol.ids import VmName
from platform_validator.egress.accounts import Account, Accounts, EgressLimits, has_room
from platform_validator.egress.addresses import dialable, is_public
from platform_validator.egress.client_hello import MAX_HELLO, Hello, HelloReader
from platform_validator.egress.control import RefusedRequest
from platform_validator.egress.http_forward import backward, credentials, onward
from platform_validator.egress.policy import Grant, check_hello, check_host_header, check_target
from platform_validator.egress.process import RefusalTelling
from platform_validator.egress.refusals import Reason, Refused
from platform_validator.egress.target import Target, absolute_url, authority

API = Target("api.example.com", 443)
GRANT = Grant(("api.example.com", "*.wild.example"), (443, 80))


def reason_of(error: pytest.ExceptionInfo[Refused]) -> Reason:
    """Why."""
    return error.value.reason


# Targets


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("api.example.com:443", API),
        ("API.Example.COM:443", API),
        ("xn--bcher-kva.example:80", Target("xn--bcher-kva.example", 80)),
        ("a_b.example:1", Target("a_b.example", 1)),
        ("api.example.com:65535", Target("api.example.com", 65535)),
    ],
)
def test_a_target_has_one_spelling(text: str, expected: Target) -> None:
    """A name in lower case and a decimal port."""
    assert authority(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "", ":", ":443", "api.example.com", "api.example.com:", "api.example.com:0", "api.example.com:0443",
        "api.example.com:65536", "api.example.com:+443", "api.example.com:4 43", "api.example.com:\u0664",
        "api.example.com.:443", ".example.com:443", "api..example.com:443", "-a.example.com:443",
        "a-.example.com:443", "user@api.example.com:443", "u:p@api.example.com:443", "localhost:443",
        "bücher.example:443", "a\u3002example:443", "api.example.com\x00.evil:443", "api.example.com/x:443",
        "api.example.com#:443", "api.example.com\\:443", "api%2eexample.com:443", " api.example.com:443",
        "a" * 64 + ".example:443", "a." * 130 + "example:443", "*.wild.example:443", "api.example.com:443\n",
        "api.ex\u017fample.com:443",
    ],
)  # fmt: skip
def test_what_has_two_readings_is_no_target(text: str) -> None:
    """User information, dots at the end, other digits, control characters, escapes."""
    with pytest.raises(Refused) as error:
        authority(text)
    assert reason_of(error) is Reason.BAD_TARGET


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1", "127.1", "2130706433", "0177.0.0.1", "0x7f.0.0.1", "0x7f000001", "0X7F.1", "127.0.0.1.",
        "169.254.169.254", "1.2.3", "[::1]", "[::ffff:127.0.0.1]", "[fe80::1%25eth0]", "::1", "2001:db8::1",
        "api.example.0x1", "api.example.123", "0x", "127.0.0.0x1",
    ],
)  # fmt: skip
def test_an_address_is_refused_in_every_spelling(host: str) -> None:
    """Whatever some program would take for a number is no name."""
    with pytest.raises(Refused) as error:
        authority(f"{host}:80")
    assert reason_of(error) is Reason.RAW_ADDRESS


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://a.example", (Target("a.example", 80), "/")),
        ("HTTP://A.example:8080/x/../y?q=1", (Target("a.example", 8080), "/x/../y?q=1")),
        ("http://a.example?q", (Target("a.example", 80), "/?q")),
    ],
)
def test_a_url_is_a_target_and_a_path(url: str, expected: tuple[Target, str]) -> None:
    """The path goes on as it came."""
    assert absolute_url(url) == expected


@pytest.mark.parametrize(
    "url",
    ["https://a.example/", "ftp://a.example/", "/path", "a.example", "http:/a.example/", "http://a.example/#x",
     "http://a.example/\x7f", "http://a.example/ü", "http://u@a.example/", "http:///x", "//a.example/"],
)  # fmt: skip
def test_other_urls_are_refused(url: str) -> None:
    """Other schemes, no scheme, fragments, what is no ASCII."""
    with pytest.raises(Refused) as error:
        absolute_url(url)
    assert reason_of(error) is Reason.BAD_TARGET


@given(st.text(max_size=80) | st.from_regex(r"[a-z0-9.:\[\]@%x-]{0,40}"))
def test_whatever_comes_is_a_plain_name_and_port_or_refused(text: str) -> None:
    """And what is taken says the same when it is read again, and is no address for anybody."""
    with suppress(Refused):
        target = authority(text)
        assert authority(str(target)) == target
        assert text.lower() == str(target)
        with pytest.raises(ValueError):
            ipaddress.ip_address(target.host)


# The policy


@pytest.mark.parametrize(
    ("target", "refused"),
    [
        (API, None),
        (Target("x.wild.example", 80), None),
        (Target("x.y.wild.example", 80), None),
        (Target("wild.example", 80), Reason.HOST_NOT_ALLOWED),
        (Target("notwild.example", 80), Reason.HOST_NOT_ALLOWED),
        (Target("x.api.example.com", 443), Reason.HOST_NOT_ALLOWED),
        (Target("api.example.com", 8443), Reason.PORT_NOT_ALLOWED),
    ],
)
def test_exact_names_patterns_and_ports(target: Target, refused: Reason | None) -> None:
    """`*.name` is every name below it, and not itself."""
    if refused is None:
        check_target(target, GRANT)
        return
    with pytest.raises(Refused) as error:
        check_target(target, GRANT)
    assert reason_of(error) is refused


@pytest.mark.parametrize(
    ("hello", "refused"),
    [
        (Hello("api.example.com", encrypted=False), None),
        (Hello(None, encrypted=False), Reason.NO_SNI),
        (Hello("other.example", encrypted=False), Reason.SNI_MISMATCH),
        (Hello("api.example.com.", encrypted=False), Reason.SNI_MISMATCH),
        (Hello("api.example.com", encrypted=True), Reason.ENCRYPTED_HELLO),
    ],
)
def test_a_hello_asks_for_the_target_and_hides_nothing(hello: Hello, refused: Reason | None) -> None:
    """ECH could carry another name."""
    if refused is None:
        check_hello(hello, API)
        return
    with pytest.raises(Refused) as error:
        check_hello(hello, API)
    assert reason_of(error) is refused


def test_the_host_header_is_the_target() -> None:
    """With or without the default port; one that is missing is made; anything else is refused."""
    target = Target("api.example.com", 80)
    check_host_header([], target)
    check_host_header([b"API.example.com"], target)
    check_host_header([b"api.example.com:80"], target)
    for values in (
        [b"other.example"],
        [b"api.example.com:81"],
        [b"10.0.0.1"],
        [b"a b"],
        [b"api.example.com"] * 2,
    ):
        with pytest.raises(Refused) as error:
            check_host_header(values, target)
        assert reason_of(error) is Reason.HOST_MISMATCH


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "0.0.0.0", "10.1.2.3", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254",
        "169.254.169.254",
        "168.63.129.16", "172.16.0.1", "192.0.0.192", "192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1",
        "198.51.100.1", "203.0.113.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
        "::", "::1", "::7f00:1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "64:ff9b::7f00:1", "64:ff9b:1::1",
        "100::1", "2001::1", "2001:0:4136:e378::1", "2001:db8::1", "2002:7f00:1::1", "3fff::1", "5f00::1",
        "fc00::1", "fd00:ec2::254", "fe80::1", "fec0::1", "ff02::1", "2a00:1450::5efe:7f00:1",
        "2a00:1450::200:5efe:a00:1", "fe80::1%eth0",
    ],
)  # fmt: skip
def test_no_address_that_is_not_of_the_public_internet_is_dialled(address: str) -> None:
    """Nor one that hides such a one: mapped, compatible, NAT64, 6to4, Teredo, ISATAP."""
    assert not is_public(ipaddress.ip_address(address))


@pytest.mark.parametrize("address", ["8.8.8.8", "93.184.216.34", "2606:4700:4700::1111", "2a00:1450:4001::1"])
def test_public_addresses_are(address: str) -> None:
    """Unless the operator denies their network."""
    found = ipaddress.ip_address(address)
    assert is_public(found)
    assert not is_public(found, [ipaddress.ip_network(f"{address}/{16}", strict=False)])


@given(st.ip_addresses(v=4))
def test_an_ipv4_address_is_dialled_only_if_it_is_global(address: ipaddress.IPv4Address) -> None:
    """And never in the form of an IPv6 one."""
    if is_public(address):
        assert address.is_global
        assert not address.is_multicast
    assert not is_public(ipaddress.IPv6Address(f"::ffff:{address}"))
    assert not is_public(ipaddress.IPv6Address((0x2002 << 112) | (int(address) << 80)))


def test_of_many_answers_the_public_foreign_ones_are_kept() -> None:
    """In their order, each once; what remains of nothing is refused with a word of its own."""

    def of(*texts: str) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
        return [ipaddress.ip_address(text) for text in texts]

    ours = of("9.9.9.9")
    found = dialable(of("10.0.0.1", "8.8.8.8", "9.9.9.9", "8.8.8.8", "1.1.1.1"), is_own=ours.__contains__)
    assert list(found.addresses) == of("8.8.8.8", "1.1.1.1")
    for addresses, reason in (
        ([], Reason.NAME_UNKNOWN),
        (of("10.0.0.1", "::1"), Reason.PRIVATE_ADDRESS),
        (of("9.9.9.9"), Reason.OWN_ADDRESS),
    ):
        with pytest.raises(Refused) as error:
            dialable(addresses, is_own=ours.__contains__)
        assert reason_of(error) is reason


# ClientHellos


def a_hello(server_name: str | None = "api.example.com") -> bytes:
    """What a real TLS client sends first."""
    context = ssl.create_default_context()
    context.check_hostname = False
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = context.wrap_bio(incoming, outgoing, server_hostname=server_name)
    with suppress(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def in_records(message: bytes, size: int) -> bytes:
    """The same message in records of at most so many bytes."""
    parts = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\x03\x01" + len(part).to_bytes(2) + part for part in parts)


def made_hello(extensions: bytes, *, suites: bytes = b"\x13\x01", compression: bytes = b"\0") -> bytes:
    """A hello with these extensions, in one record."""
    body = b"\x03\x03" + bytes(32) + b"\0" + len(suites).to_bytes(2) + suites
    body += len(compression).to_bytes(1) + compression + extensions
    return in_records(b"\x01" + len(body).to_bytes(3) + body, 16384)


def extension(kind: int, data: bytes) -> bytes:
    """One of them."""
    return kind.to_bytes(2) + len(data).to_bytes(2) + data


def all_of(*extensions: bytes) -> bytes:
    """The vector of them."""
    joined = b"".join(extensions)
    return len(joined).to_bytes(2) + joined


def names(*entries: tuple[int, bytes]) -> bytes:
    """A server_name extension."""
    joined = b"".join(kind.to_bytes(1) + len(name).to_bytes(2) + name for kind, name in entries)
    return extension(0, len(joined).to_bytes(2) + joined)


NAME = (0, b"API.example.com")


@given(st.integers(1, 64), st.integers(1, 64))
def test_a_real_hello_is_read_however_it_is_cut(record: int, piece: int) -> None:
    """Over records and over TCP segments, the name comes out when the last byte of it is there."""
    data = in_records(HELLO[5:], record)
    reader = HelloReader()
    found = [reader.feed(data[at : at + piece]) for at in range(0, len(data), piece)]
    assert found[:-1] == [None] * (len(found) - 1)
    assert found[-1] == Hello("api.example.com", encrypted=False)


HELLO = a_hello()


def test_hellos_without_a_name_and_with_a_hidden_one() -> None:
    """No extensions, none of that kind, ECH and its draft."""
    assert HelloReader().feed(made_hello(b"")) == Hello(None, encrypted=False)
    assert HelloReader().feed(made_hello(all_of(extension(10, b"x")))) == Hello(None, encrypted=False)
    for kind in (0xFE0D, 0xFFCE):
        hello = made_hello(all_of(names(NAME), extension(kind, b"x")))
        assert HelloReader().feed(hello) == Hello("api.example.com", encrypted=True)


@pytest.mark.parametrize(
    "data",
    [
        made_hello(all_of(names(NAME, (0, b"other.example")))),
        made_hello(all_of(names(NAME), names((0, b"other.example")))),
        made_hello(all_of(names((1, b"api.example.com")))),
        made_hello(all_of(names((0, b"")))),
        made_hello(all_of(names((0, b"\xff")))),
        made_hello(all_of(extension(0, b""))),
        made_hello(all_of(extension(0, b"\0\0"))),
        made_hello(all_of(names(NAME)) + b"x"),
        made_hello(b"\0"),
        made_hello(b"\0\1"),
        made_hello(b"", suites=b""),
        made_hello(b"", suites=b"\x13"),
        made_hello(b"", compression=b""),
        HELLO[:5] + b"\x02" + HELLO[6:],
        b"\x16\x03\x01\x00\x00",
        b"\x16\x03\x01\xff\xff",
        in_records(HELLO[5:] + b"more", 16384),
        in_records(b"\x01\xff\xff\xff", 4),
        HELLO[:5] + HELLO[5:9] + b"\x02" + HELLO[10:],
        in_records(HELLO[5:], 8)[:13] + b"\x17\x03\x03\x00\x01x",
        in_records(b"\x01\x00\xff\xff" + bytes(0xFFFF), 1),
    ],
    ids=lambda data: f"{len(data)}-bytes",
)
def test_a_hello_of_two_readings_or_none_is_refused(data: bytes) -> None:
    """Two names, another kind of name, lengths that do not add up, something between its records."""
    with pytest.raises(Refused) as error:
        HelloReader().feed(data)
    assert reason_of(error) is Reason.BAD_HELLO


@pytest.mark.parametrize(
    "data", [b"GET / HTTP/1.1\r\n", b"\x80\x2e\x01", b"\x15\x03\x01\x00\x02\x02\x28", b"\x16\x02\x01"]
)
def test_what_is_no_tls_is_seen_at_its_first_bytes(data: bytes) -> None:
    """HTTP, SSL 2, an alert."""
    with pytest.raises(Refused) as error:
        HelloReader().feed(data)
    assert reason_of(error) is Reason.NOT_TLS


@given(st.lists(st.binary(max_size=64), max_size=8), st.integers(0, len(HELLO)), st.binary(max_size=4))
def test_whatever_comes_is_a_hello_more_or_refused(pieces: list[bytes], at: int, put: bytes) -> None:
    """Nothing else is raised, by noise or by a hello with something put into it."""
    for data in ([*pieces], [HELLO[:at] + put + HELLO[at + len(put) :]]):
        reader = HelloReader()
        with suppress(Refused):
            for piece in data:
                found = reader.feed(piece)
                assert found is None or isinstance(found, Hello)
    assert len(HELLO) < MAX_HELLO


# HTTP


def test_credentials_are_given_once_and_in_one_form() -> None:
    """Basic, base64 of name and password."""
    good = (b"proxy-authorization", b"Basic YTpi")
    found = credentials([good])
    assert found is not None
    assert (found.vm, found.password) == ("a", "b")
    for headers in ([], [good, good], [(good[0], b"Basic YQ==")], [(good[0], b"Basic _")], [(good[0], b"x")],
                    [(good[0], b"Basic /w==")]):  # fmt: skip
        assert credentials(headers) is None


def test_a_request_goes_on_with_its_own_host_and_without_the_hop() -> None:
    """What Connection names goes, its length stays."""
    request = h11.Request(
        method="POST",
        target="http://a.example/",
        headers=[("Host", "A.example"), ("Connection", "x-a, content-length"), ("X-A", "1"),
                 ("Content-Length", "1"),
                 ("Proxy-Authorization", "Basic x"), ("Expect", "100-continue")],
    )  # fmt: skip
    made = onward(request, path="/p", host="a.example")
    assert made.target == b"/p"
    assert list(made.headers) == [
        (b"host", b"a.example"),
        (b"content-length", b"1"),
        (b"connection", b"close"),
    ]
    answer = h11.Response(
        status_code=200, headers=[("Keep-Alive", "1"), ("Connection", "x-b"), ("X-B", "1"), ("X-C", "2")]
    )
    assert list(backward(answer).headers) == [(b"x-c", b"2"), (b"connection", b"close")]


def test_two_lengths_are_refused() -> None:
    """Whoever reads the other one sees another request."""
    headers = [("Host", "a.example"), ("Content-Length", "1"), ("Transfer-Encoding", "chunked")]
    for version, given_headers in (("1.1", headers), ("1.0", [headers[0], headers[2]])):
        request = h11.Request(method="POST", target="/", headers=given_headers, http_version=version)
        with pytest.raises(Refused) as error:
            onward(request, path="/", host="a.example")
        assert reason_of(error) is Reason.BAD_REQUEST


# Accounts


def account(vm: str = "a", password: str = "1" * 64, *, most: int = 100, rate: int = 0) -> Account:
    """One that may move so much."""
    return Account(VmName(vm), password, GRANT, EgressLimits(2, most, rate, 4))


def test_only_the_right_password_of_a_cvm_that_exists_is_known() -> None:
    """And who has none is counted together."""
    accounts = Accounts()
    accounts.allow(known := account())
    assert accounts.authenticate("a", "1" * 64) is known
    assert accounts.authenticate("a", "2" * 64) is None
    assert accounts.authenticate("b", "1" * 64) is None
    assert accounts.authenticate("b", "0" * 64) is None
    assert accounts.authenticate("a", "\u00e9") is None
    assert accounts.unauthenticated == 4
    accounts.forget(VmName("a"))
    assert accounts.authenticate("a", "1" * 64) is None


def test_what_a_cvm_used_counts_on_when_it_is_told_again() -> None:
    """A new password or policy makes no new budget; one that is gone is seen once more."""
    accounts = Accounts()
    accounts.allow(account())
    [first] = accounts.look()
    first.count(sent=60, now=0)
    accounts.allow(account())
    assert accounts.look() == [first]
    accounts.allow(account(password="2" * 64))
    [second] = accounts.look()
    with pytest.raises(Refused) as error:
        second.count(received=60, now=0)
    assert reason_of(error) is Reason.BYTES_SPENT
    with pytest.raises(Refused):
        second.enter()
    accounts.forget(VmName("a"))
    assert accounts.look() == [second]
    assert accounts.look() == []


@pytest.mark.parametrize(
    ("held", "others", "room"),
    [
        (0, [], True),
        (63, [], True),
        (64, [], False),
        (0, [64], False),
        (8, [0, 30, 0], True),  # 26 are free, 16 of them are the others'
        (8, [0, 40, 0], False),
        (7, [0, 40, 0], True),
        (7, [0, 40, 16], True),
        (0, [1] * 62, True),
        (1, [1] * 62, True),
        (1, [1] * 63, False),
    ],
)
def test_of_all_connections_half_are_kept_in_equal_shares(held: int, others: list[int], room: bool) -> None:
    """Of 64: whoever takes many, as several CVMs, takes no other's last."""
    assert has_room(held, others, 64) is room


@given(st.lists(st.integers(0, 9), max_size=200))
def test_however_many_others_want_each_cvm_gets_its_share(wants: list[int]) -> None:
    """Ten CVMs ask in any order; then each of them can still have a twentieth of all."""
    held = [0] * 10
    for each in wants:
        held[each] += has_room(held[each], [*held[:each], *held[each + 1 :]], 100)
    for each in range(10):
        while held[each] < 5:
            assert has_room(held[each], [*held[:each], *held[each + 1 :]], 100)
            held[each] += 1
    assert sum(held) <= 100


def test_a_rate_is_kept_after_a_second_of_grace() -> None:
    """Ten bytes a second: the wait grows with what is ahead, and goes with time."""
    paced = account(most=10**6, rate=10)
    assert paced.count(sent=10, now=100.0) == 0
    assert paced.count(sent=30, now=100.0) == pytest.approx(3.0)
    assert paced.count(sent=10, now=104.0) == pytest.approx(0.0)
    assert account(most=10**6).count(sent=10**5, now=0) == 0


def test_refusals_are_told_five_times_a_minute_escaped_and_capped() -> None:
    """Of each CVM and reason; the rest is counted into the next one that is told."""
    said: list[RefusedRequest] = []
    now = 0.0
    telling = RefusalTelling(said.append, lambda: now)
    for _ in range(9):
        telling.tell("a", Reason.NO_SNI, "x\r\n\x1b[31m\u00fc" + "y" * 500)
    telling.tell("b", Reason.NO_SNI, "")
    assert [(one.vm, one.more) for one in said] == [("a", 0)] * 5 + [("b", 0)]
    assert said[0].target.startswith(r"x\r\n\x1b[31m\xfcyyy")
    assert len(said[0].target) < 220
    now = 61.0
    telling.tell("a", Reason.NO_SNI, "")
    assert said[-1].more == 4
    telling.forget("a")
    telling.tell("a", Reason.NO_SNI, "")
    assert said[-1].more == 0
