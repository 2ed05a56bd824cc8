"""The other byte forms: bundles, app-compose, platform.toml, canonical JSON, event logs, addresses."""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol import ss58
from platform_protocol.bundle import BundleInvalid, TreeEntry, pack, unpack
from platform_protocol.canonical import NotCanonical, canonical_json
from platform_protocol.compose import ComposeInvalid, app_compose, compose_hash
from platform_protocol.event_log import EventLogInvalid, parse_event_log, replay, runtime_digest
from platform_protocol.evidence import payload_sha256, result_record, result_report_data
from platform_protocol.filesystem_policy import FilesystemPolicy
from platform_protocol.guest_init import INIT_SCRIPT
from platform_protocol.ids import ChallengeId, Hotkey, JobId, VmName
from platform_protocol.notifications import (
    Hello,
    NewJob,
    NotificationUnreadable,
    UnknownNotification,
    parse_notification,
)
from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.signing import BadUrl, audience_of
from platform_protocol.spec import SpecInvalid, parse_platform_toml
from platform_protocol.tokens import bundle_authorization, bundle_vm, check_bundle_authorization
from platform_protocol.user_config import UserConfig

TREE = [
    TreeEntry("platform.toml", b'name = "x"\nversion = "1"\n'),
    TreeEntry("bin/run", b"#!/bin/sh\n", executable=True),
    TreeEntry("link", link="bin/run"),
]
MINIMAL = b'name = "digits"\nversion = "1.0"\n'


def test_a_bundle_is_the_same_for_the_same_tree_in_any_order() -> None:
    """The golden hash: another implementation must get it too."""
    data = pack(TREE)
    assert pack(reversed(TREE)) == data
    assert (
        hashlib.sha256(data).hexdigest() == "a12d5add77f96696c7a876aab04b114001d6b0f89922d36b23cb7005f6380dd1"
    )
    assert {entry.path for entry in unpack(data)} == {"platform.toml", "bin/run", "link"}


@given(
    st.dictionaries(
        st.from_regex(r"[a-z]{1,8}(/[a-z]{1,8}){0,2}", fullmatch=True), st.binary(max_size=50), max_size=8
    )
)
def test_bundles_round_trip(files: dict[str, bytes]) -> None:
    if any(other.startswith(f"{path}/") for path in files for other in files):
        return
    entries = [TreeEntry(path, data) for path, data in files.items()]
    assert sorted(unpack(pack(entries)), key=lambda e: e.path) == sorted(entries, key=lambda e: e.path)


@pytest.mark.parametrize(
    "entries",
    [
        [TreeEntry("/absolute")],
        [TreeEntry("a/../b")],
        [TreeEntry("")],
        [TreeEntry("a//b")],
        [TreeEntry(".git/config")],
        [TreeEntry("a"), TreeEntry("a")],
        [TreeEntry("a"), TreeEntry("a/b")],
        [TreeEntry("l", link="/etc/passwd")],
        [TreeEntry("d/l", link="../../x")],
        [TreeEntry("x" * 300)],
    ],
)
def test_a_tree_that_leaves_itself_is_refused(entries: list[TreeEntry]) -> None:
    with pytest.raises(BundleInvalid):
        pack(entries)


@pytest.mark.parametrize("kind", [tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.LNKTYPE])
def test_only_files_and_links_are_unpacked(kind: bytes) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("x")
        info.type = kind
        info.linkname = "y"
        tar.addfile(info)
    with pytest.raises(BundleInvalid):
        unpack(out.getvalue())


def test_app_compose_depends_on_tree_and_runtime_alone() -> None:
    """The golden hash: anyone can compute it."""
    spec = parse_platform_toml(MINIMAL)
    runtime = "platform-runtime@sha256:" + "a" * 64
    compose = app_compose(spec, bundle_sha256="b" * 64, runtime=runtime)
    assert compose_hash(compose) == "c531ed6951d505b3f80d1122e42224619d4dd349ac9b0e2ea5ca72c4dcb1386b"
    document = json.loads(compose)
    assert (document["manifest_version"], document["key_provider"], document["public_logs"]) == (
        2,
        "none",
        False,
    )
    assert document["init_script"] == INIT_SCRIPT
    other = app_compose(spec, bundle_sha256="c" * 64, runtime=runtime)
    assert compose_hash(other) != compose_hash(compose)


@pytest.mark.parametrize(
    ("sha", "runtime"), [("x", "r@sha256:" + "a" * 64), ("b" * 64, "platform-runtime:latest")]
)
def test_app_compose_wants_exact_forms(sha: str, runtime: str) -> None:
    with pytest.raises(ComposeInvalid):
        app_compose(parse_platform_toml(MINIMAL), bundle_sha256=sha, runtime=runtime)


def test_platform_toml_has_defaults() -> None:
    spec = parse_platform_toml(MINIMAL)
    assert (spec.entry, spec.execution.cvm, spec.execution.ready, spec.cvm.runtime) == (
        "challenge",
        "per_job",
        1,
        "platform-runtime",
    )


def test_all_faults_of_platform_toml_are_told_with_line_and_nearest_name() -> None:
    text = b'name = "Bad Name"\n[cvm]\nmemory_md = 5\ncpu_cores = "two"\ncompose = "../x"\n'
    with pytest.raises(SpecInvalid) as refused:
        parse_platform_toml(text)
    told = "\n".join(refused.value.faults)
    assert "did you mean 'memory_mb'?" in told
    assert "line 3" in told
    assert "version: missing" in told
    assert len(refused.value.faults) == 5


@pytest.mark.parametrize("text", [b"\xff", b"a = ", b"x = 1\n" * 60_000, b"a = " + b"[" * 10_000])
def test_unusable_platform_toml_is_refused(text: bytes) -> None:
    with pytest.raises(SpecInvalid):
        parse_platform_toml(text)


@pytest.mark.parametrize(
    "value", [2**53, -(2**53), float("nan"), float("inf"), "\ud800", {"a": {"b": [2**60]}}, {1: 2}, b""]
)
def test_canonical_json_refuses_what_i_json_does_not_know(value: Any) -> None:
    with pytest.raises(NotCanonical, match=r"^\$"):
        canonical_json(value)


def test_canonical_json_is_sorted_and_compact() -> None:
    assert canonical_json({"b": 1.0, "a": [True, None, "é"]}) == '{"a":[true,null,"é"],"b":1}'.encode()


def test_evidence_covers_exactly_one_of_result_and_error() -> None:
    given: dict[str, Any] = {
        "job_id": JobId("j"),
        "attempt": 1,
        "validator": Hotkey("5v"),
        "challenge_id": ChallengeId("c"),
        "submission_sha256": None,
        "payload_sha256": payload_sha256({}),
    }
    record = result_record(**given, result={"score": 1})
    assert len(result_report_data(record)) == 64
    assert result_report_data(record) != result_report_data(result_record(**given, error={"code": "x"}))
    with pytest.raises(ValueError, match="exactly one"):
        result_record(**given)


def test_runtime_digests_are_recomputed_and_contradictions_refused() -> None:
    event = {"imr": 3, "event_type": 0x08000001, "digest": "", "event": "app-id", "event_payload": "ab"}
    expected = hashlib.sha384(bytes(48) + runtime_digest("app-id", b"\xab")).digest()
    assert replay(parse_event_log(json.dumps([event])), 3) == expected
    with pytest.raises(EventLogInvalid, match="not that of its payload"):
        replay(parse_event_log(json.dumps([event | {"digest": "00" * 48}])), 3)


def test_digests_of_both_event_versions_differ() -> None:
    assert runtime_digest("a", b"x") != runtime_digest("a", b"x", 2)
    with pytest.raises(EventLogInvalid):
        runtime_digest("a", b"x", 3)


@pytest.mark.parametrize(
    "text", ["", "{}", '[{"imr": 9}]', '[{"imr":0,"event_type":1,"digest":"zz"}]', "[" * 10_000]
)
def test_malformed_event_logs_are_refused(text: str) -> None:
    with pytest.raises(EventLogInvalid):
        parse_event_log(text)


@given(st.binary(min_size=32, max_size=32))
def test_addresses_round_trip(key: bytes) -> None:
    assert ss58.decode(ss58.encode(key)) == key


@pytest.mark.parametrize(
    "address", ["", "0OIl", "5GrwvaEF5zXb26Fz9rcQpDWS57CtERHpNehXCPcNoHGKutQX", "5Grwva"]
)
def test_mistyped_addresses_are_refused(address: str) -> None:
    with pytest.raises(ss58.BadAddress):
        ss58.decode(address)


@pytest.mark.parametrize(
    ("url", "audience"),
    [
        ("HTTPS://Platform.Example:443/x", "https://platform.example"),
        ("ws://127.0.0.1:8080/y?z", "http://127.0.0.1:8080"),
        ("http://[::1]:80", "http://[::1]"),
    ],
)
def test_audiences_are_normal(url: str, audience: str) -> None:
    assert audience_of(url) == audience


@pytest.mark.parametrize("url", ["ftp://x", "platform", "http://", "http://x:port"])
def test_what_is_no_url_has_no_audience(url: str) -> None:
    with pytest.raises(BadUrl):
        audience_of(url)


def test_a_bundle_token_is_of_one_vm_for_one_bundle() -> None:
    header = bundle_authorization(b"L" * 32, VmName("pv-1"), "a" * 64)
    assert bundle_vm(header) == "pv-1"
    assert check_bundle_authorization(header, b"L" * 32, VmName("pv-1"), "a" * 64)
    assert not check_bundle_authorization(header, b"L" * 32, VmName("pv-1"), "b" * 64)
    assert not check_bundle_authorization(header, b"M" * 32, VmName("pv-1"), "a" * 64)
    assert not check_bundle_authorization(header, b"L" * 32, VmName("pv-2"), "a" * 64)
    assert bundle_vm("Basic x") is None


def test_user_config_never_shows_its_secret() -> None:
    secret = UserConfig.encode_secret(b"L" * 32)
    config = UserConfig(
        vm=VmName("pv-1"),
        launch_secret=secret,
        validator_base_url="http://10.0.2.2:18080",
        proxy_url="http://pv-1:password@10.0.2.2:3128",
        max_lifetime_s=1,
        hard_lifetime_s=2,
    )
    assert config.secret == b"L" * 32
    assert secret not in repr(config)
    assert "password" not in repr(config)
    with pytest.raises(ValueError, match="32 bytes"):
        UserConfig.model_validate(config.model_dump() | {"launch_secret": "c2hvcnQ"})


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"allowed_paths": [path]}, "expected")
        for path in (
            "",
            "x",
            "//x",
            "/x/",
            "/x/../y",
            "/./x",
            "/",
            "/x\n",
            "/x\0",
            "/" + "x" * 255,
            "/run/x",
            "/etc/x",
        )
    ]
    + [
        ({"denied_paths": ["/proc"]}, "apart from /proc"),
        ({"denied_paths": ["/opt"]}, "apart from /opt/platform"),
        ({"denied_paths": ["/lib64"]}, "can start without"),
        ({"denied_paths": ["/a/b"], "allowed_paths": ["/a"]}, "apart from each other"),
        ({"denied_paths": ["/a"], "allowed_paths": ["/a"]}, "apart from each other"),
        ({"denied_paths": ["/a"] * 33}, "at most 32"),
        ({"tmpfs_size_mb": 15}, "greater than or equal to 16"),
    ],
)
def test_a_filesystem_policy_has_paths_that_a_vmm_can_mount(given: dict[str, object], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        FilesystemPolicy.model_validate(given)


def test_a_filesystem_policy_of_before_is_the_strict_one() -> None:
    """A user_config without it, and one with keys of tomorrow; `/ab` is not below `/a`."""
    assert FilesystemPolicy.model_validate({"tomorrow": 1}).read_only
    FilesystemPolicy(allowed_paths=("/a", "/var/lib/x"), denied_paths=("/ab", "/usr/bin/curl", "/tmp/x"))


def test_notifications_are_read_and_unknown_ones_passed_over() -> None:
    hello = parse_notification('{"type":"hello","stream":"s","seq":3,"server_time":"2026-01-01T00:00:00Z"}')
    assert isinstance(hello, Hello)
    assert isinstance(
        parse_notification('{"type":"new_job","seq":4,"job_id":"j","challenge_id":"c","x":1}'), NewJob
    )
    assert parse_notification('{"type":"later","seq":5}') == UnknownNotification(type="later", seq=5)
    for text in ("", "[]", '{"type":1}', '{"type":"new_job","seq":1}', "x" * 100_000):
        with pytest.raises(NotificationUnreadable):
            parse_notification(text)


def test_isolation_levels_are_ordered() -> None:
    ranks = [level.rank for level in IsolationLevel]
    assert ranks == [4, 3, 2, 1, 0]
