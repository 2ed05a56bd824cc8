"""The guest agent as a guest sees it: quotes that verify under the simulated root, and who gets none."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from typing import Any

import dcap_qvl
import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from guests import Guests

from platform_protocol.event_log import parse_event_log, replay
from platform_vmm.app_compose import read_app_compose
from platform_vmm.simulation.pki import Pki
from platform_vmm.simulation.quote import collateral

ASK = """
import http.client, json, socket
def ask(method, **body):
    connection = http.client.HTTPConnection('agent')
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect('/var/run/dstack.sock')
    connection.request('POST', '/' + method, json.dumps(body), {'Content-Type': 'application/json'})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())
"""


async def test_a_guests_quote_verifies_and_its_log_replays_and_names_its_compose(
    guests: Guests, pki: Pki
) -> None:
    """UpToDate under our root; RTMR0-3 replay; dstack's events in order, each once; report data raw."""
    script = ASK + "print(json.dumps([ask('GetQuote', report_data='ab' * 64), ask('Info'), ask('Version')]))"
    answers = await guests.run(script, simulated_tee="dstack-tdx")
    (status, quoted), (_, info), (_, version) = answers
    assert status == 200
    raw, now = bytes.fromhex(quoted["quote"]), datetime.now(UTC)
    papers = dcap_qvl.QuoteCollateralV3.from_json(json.dumps(collateral(pki, now)))
    root = pki.root.public_bytes(Encoding.DER)
    verified = dcap_qvl.verify_with_root_ca(raw, papers, root, int(time.time()))
    assert verified.status == "UpToDate"
    report = json.loads(verified.to_json())["report"]["TD10"]
    assert report["report_data"] == "ab" * 64
    events = parse_event_log(quoted["event_log"])
    assert [report[f"rt_mr{imr}"] for imr in range(4)] == [replay(events, imr).hex() for imr in range(4)]
    assert [event.event for event in events if event.imr == 3] == [
        "system-preparing",
        "app-id",
        "compose-hash",
        "instance-id",
        "boot-mr-done",
        "key-provider",
        "system-ready",
    ]
    assert all(event.event.startswith("simulated-") for event in events if event.imr != 3)
    compose = read_app_compose(guests.made[0].configuration.compose_file)
    named = {event.event: event.event_payload for event in events}
    assert named["compose-hash"] == compose.hash == info["compose_hash"]
    assert named["app-id"] == compose.app_id == info["app_id"]
    assert bytes.fromhex(named["key-provider"]) == b'{"name":"none","id":""}'
    assert report["mr_config_id"] == ("01" + compose.hash).ljust(96, "0")
    assert json.loads(info["tcb_info"])["rtmr3"] == report["rt_mr3"]
    assert "local" in version["version"]


async def test_without_simulated_tee_there_is_no_quote(guests: Guests) -> None:
    """An answer that says so, not an empty quote."""
    status, answer = await guests.run(ASK + "print(json.dumps(ask('GetQuote', report_data='00')))")
    assert status == 400
    assert "simulated_tee" in answer["error"]


@pytest.mark.parametrize("data", ["zz", "00" * 65, 5, None])
async def test_bad_report_data_is_refused(guests: Guests, data: Any) -> None:
    """Hex of at most 64 bytes."""
    script = ASK + f"print(json.dumps(ask('GetQuote', report_data={data!r})))"
    status, answer = await guests.run(script, simulated_tee="dstack-tdx")
    assert status == 400
    assert "report_data" in answer["error"]


async def test_what_a_guest_sends_the_agent_cannot_hurt_it(guests: Guests) -> None:
    """Garbage, a huge body, forty idle connections: the next guest's question is still answered."""
    found = await guests.run(
        ASK
        + """
def raw(data):
    with socket.socket(socket.AF_UNIX) as s:
        s.connect('/var/run/dstack.sock')
        s.settimeout(5)
        try:
            s.sendall(data)
            return len(s.recv(100))
        except OSError as error: return type(error).__name__
raw(b'\\0' * 1000)
raw(b'POST /GetQuote HTTP/1.1\\r\\nHost: a\\r\\nContent-Length: 99999999\\r\\n\\r\\n' + b'x' * 500_000)
idle = []
for _ in range(40):
    idle.append(socket.socket(socket.AF_UNIX))
    idle[-1].connect('/var/run/dstack.sock')
for one in idle: one.close()
import time
for _ in range(100):
    try:
        print(json.dumps(ask('Version')))
        break
    except OSError: time.sleep(0.05)
"""
    )
    assert found[0] == 200
