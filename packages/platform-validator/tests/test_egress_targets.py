"""The egress proxy's decisions: targets in one spelling, and the policy over them."""

from __future__ import annotations

import ipaddress
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_validator.egress.client_hello import Hello
from platform_validator.egress.policy import Grant, check_hello, check_host_header, check_target
from platform_validator.egress.refusals import Reason, Refused
from platform_validator.egress.target import Target, absolute_url, authority

API = Target("api.example.com", 443)
GRANT = Grant(("api.example.com", "*.wild.example"), (443, 80))


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
    assert error.value.reason is Reason.BAD_TARGET


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
    assert error.value.reason is Reason.RAW_ADDRESS


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
    assert error.value.reason is Reason.BAD_TARGET


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
    assert error.value.reason is refused


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
    assert error.value.reason is refused


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
        assert error.value.reason is Reason.HOST_MISMATCH
