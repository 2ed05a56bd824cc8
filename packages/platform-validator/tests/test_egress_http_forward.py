"""The egress proxy's decisions: HTTP requests and answers as they go on."""

from __future__ import annotations

import h11
import pytest

from platform_validator.egress.http_forward import backward, credentials, onward
from platform_validator.egress.refusals import Reason, Refused


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
        assert error.value.reason is Reason.BAD_REQUEST
