"""The whole system at level Vm: one signed submission, through a virtual machine, to a signed receipt."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from examples.demo.guest_image import offer_guest_image
from examples.demo.miners import Upload, upload
from examples.demo.processes import end_all
from examples.demo.repositories import make_repository
from examples.demo.stack import make_stack

from platform_protocol.receipts import open_receipt
from platform_protocol.signing import Keypair

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CHALLENGE = HERE / "in_a_vm"
PATIENCE = 600.0


@pytest.mark.needs("root", "bwrap", "git", "qemu-system-x86_64", "mksquashfs")
@pytest.mark.slow(reason="starts the whole system, and a virtual machine on an emulated processor")
@pytest.mark.timeout(900)
def test_a_submission_runs_in_a_virtual_machine_and_its_receipt_says_so(tmp_path: Path) -> None:
    """The validator demands Vm; the submission sees another kernel than this one; the receipt is signed."""
    tmp_path.chmod(0o711)
    state = tmp_path / "state"
    state.mkdir(mode=0o711)
    stack = make_stack(state, level="Vm")
    # One core: no second machine, for a next job, boots beside the first.
    stack.validator_environment = {"VALIDATOR_CPU_CORES": "1"}
    try:
        offer_guest_image(state / "vmm")
        stack.start()
        repository = state / "repositories" / "in_a_vm"
        tree = shutil.copytree(CHALLENGE, tmp_path / "tree", ignore=shutil.ignore_patterns("submission"))
        challenge = stack.add_challenge("in-a-vm", repository, make_repository(tree, repository), 300)
        miner = Keypair.from_seed(b"miner".ljust(32, b"."))
        upload(stack.base, challenge, miner, Upload("in-a-vm", "miner", "one", CHALLENGE / "submission"))
        stack.processes.wait_for(
            "validator", "done with the job", lambda: stack.jobs()[0]["outcome"] is not None, PATIENCE
        )
        [job] = stack.jobs()
        receipt = stack.receipt(job["id"])
        board = stack.leaderboard(challenge)
        shutil.copy(state / "vmm" / "simulated-root.pem", tmp_path)
        [collateral] = (state / "validator" / "cache" / "collateral").glob("*/*.json")
        shutil.copy(collateral, tmp_path / "collateral.json")
        codes = stack.stop()
    finally:
        stack.stop()
        end_all(state)
    assert (job["outcome"], job["score"], job["attempt"]) == ("succeeded", 1.0, 1), job
    [line] = [line for line in json.loads(job["result"])["logs"] if "kernel" in line]
    told = json.loads(line[line.index("{") :])
    assert told["kernel"] != os.uname().release
    assert told["pid"] <= 3, "a submission has a process namespace of its own"
    assert receipt is not None
    opened = open_receipt(receipt)
    assert opened.signer == stack.validator.keypair.address
    assert opened.facts.isolation_level == "Vm"
    assert [entry["job_id"] for entry in board] == [job["id"]]
    assert codes == {"validator": 0, "vmm": 0, "platform-api": 0}
    (tmp_path / "receipt.json").write_text(json.dumps(receipt))
    words = [sys.executable, str(ROOT / "examples" / "verify_receipt.py")]
    words += [str(tmp_path / name) for name in ("receipt.json", "simulated-root.pem", "collateral.json")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "the quote's signatures hold" in done.stdout
