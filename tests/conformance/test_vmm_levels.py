"""The table of isolation levels: which image a level takes, what the VMM must be able to do, what is said."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.dstack_double import DstackDouble

from platform_protocol.platform_messages import IsolationLevel
from platform_protocol.signing import Keypair
from platform_validator.challenges.resolve import Unfit, choose_image
from platform_validator.cli.checks import check_vmm
from platform_validator.config import ConfigFaults, Settings, load_settings
from platform_validator.cvm.dstack import DstackVmm
from platform_validator.cvm.vmm import VmmImage

LEVELS = list(IsolationLevel)
IMAGES = {
    "dstack-0.5.5": IsolationLevel.TEE,
    "local-qemu": IsolationLevel.VM,
    "local-sandbox": IsolationLevel.CONTAINER,
    "local-process": IsolationLevel.NONE,
}
TAKES = {
    IsolationLevel.TEE: {"dstack-0.5.5"},
    IsolationLevel.VM: {"dstack-0.5.5", "local-qemu"},
    IsolationLevel.CONTAINER: {"dstack-0.5.5", "local-qemu", "local-sandbox"},
    IsolationLevel.PROCESS: {"dstack-0.5.5", "local-qemu", "local-sandbox"},
    IsolationLevel.NONE: set(IMAGES),
}


def settings(
    folder: Path, level: IsolationLevel, *, simulated: bool = False, unsafe: bool = True
) -> Settings:
    """Of a validator at this level."""
    folder.mkdir(exist_ok=True)
    file = folder / "config.toml"
    rules = "[attestation]\nallow_simulated = true\nsimulated_root_file = 'root.pem'\n" if simulated else ""
    none = f"unsafe_no_isolation = {str(unsafe).lower()}\n" if level is IsolationLevel.NONE else ""
    file.write_text(f"[sandbox_config]\nisolation_level = '{level.value}'\n{none}{rules}")
    file.chmod(0o600)
    environment = {
        "PLATFORM_BASE_API": "http://127.0.0.1:1",
        "VALIDATOR_HOTKEY": Keypair.from_seed(bytes(32)).address,
        "VALIDATOR_BASE_URL": "http://10.0.2.2:18080",
    }
    return load_settings(environment, flag_file=file)


@pytest.mark.parametrize("level", LEVELS)
def test_vmm_images_below_the_level_are_refused(level: IsolationLevel) -> None:
    """A level is a minimum: each image at or above it is taken, and each below it is not."""
    for name, given in IMAGES.items():
        if name in TAKES[level]:
            assert choose_image([VmmImage(name, given)], named=name, level=level).name == name
            continue
        with pytest.raises(Unfit) as caught:
            choose_image([VmmImage(name, given)], named=name, level=level)
        assert caught.value.reason == "image_below_level"


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("version", ["0.5.2", "0.5.5", "0.5.7", "0.5.11", "0.6.0"])
@pytest.mark.parametrize("simulated", [False, True])
async def test_vmm_that_cannot_make_the_level_fails_the_check(
    level: IsolationLevel, version: str, simulated: bool, tmp_path: Path
) -> None:
    """Below Tee v0.5.6 is needed, and with allow_simulated the head; at Tee that pair is no configuration."""
    if level is IsolationLevel.TEE and simulated:
        with pytest.raises(ConfigFaults) as caught:
            settings(tmp_path, level, simulated=True)
        assert "only a TDX quote" in str(caught.value.faults)
        return
    async with DstackDouble(version).listening() as url:
        client = DstackVmm(url)
        found = await check_vmm(client, settings(tmp_path, level, simulated=simulated))
        await client.close()
    failed = [one.detail for one in found if one.result == "fail"]
    old, head = version in ("0.5.2", "0.5.5"), version == "0.6.0"
    if level is IsolationLevel.TEE or (head or (not old and not simulated)):
        assert failed == []
    else:
        assert [("v0.5.6" in text, "allow_simulated" in text) for text in failed] == [(old, not old)]


def test_vmm_without_isolation_is_only_had_by_saying_so(tmp_path: Path) -> None:
    """None needs unsafe_no_isolation."""
    assert settings(tmp_path / "a", IsolationLevel.NONE).level is IsolationLevel.NONE
    with pytest.raises(ConfigFaults) as caught:
        settings(tmp_path / "b", IsolationLevel.NONE, unsafe=False)
    assert "unsafe_no_isolation" in str(caught.value.faults)
