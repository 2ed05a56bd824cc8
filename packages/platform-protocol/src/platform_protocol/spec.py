"""`platform.toml`: what a challenge says of itself. Unknown keys are faults; all faults are told at once."""

from __future__ import annotations

import difflib
import re
import tomllib
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from platform_protocol.errors import ProtocolError

MAX_SPEC_BYTES = 256 * 1024
MAX_RESULT_BYTES = 16 * 1024 * 1024
_MIB = 1024 * 1024
_MODULE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
_HOST = r"^(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$"

Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, Field(pattern=_HOST, max_length=253)]


class SpecInvalid(ProtocolError):
    """platform.toml cannot be used; `faults` has one line for each thing that is wrong."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("platform.toml: " + "; ".join(faults))
        self.faults = faults


def _inside_tree(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/") or "\0" in path or not path:
        raise ValueError("expected a relative path inside the tree")
    return path


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CvmSpec(_Table):
    """`[cvm]`: what a CVM of this challenge needs. None: what the challenge's row at the API says."""

    os_image: str | None = None
    runtime: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$", max_length=512)] = (
        "platform-runtime"
    )
    cpu_cores: Annotated[int, Field(ge=1, le=1024)] | None = None
    memory_mb: Annotated[int, Field(ge=128, le=16 * 1024 * 1024)] | None = None
    disk_mb: Annotated[int, Field(ge=64, le=64 * 1024 * 1024)] | None = None
    gpu_count: Annotated[int, Field(ge=0, le=64)] | None = None
    compose: Annotated[str, AfterValidator(_inside_tree), Field(max_length=255)] | None = None


class ExecutionSpec(_Table):
    """`[execution]`: how jobs run. `ready` is the size of the pool of booted CVMs."""

    cvm: Literal["per_job", "shared"] = "per_job"
    concurrency: Annotated[int, Field(ge=1, le=64)] = 1
    timeout_s: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] | None = None
    ready: Annotated[int, Field(ge=0, le=64)] = 1


class NetworkSpec(_Table):
    """`[network]`: what the challenge wants to reach; the operator's policy always narrows it."""

    hosts: list[Host] = Field(default_factory=list, max_length=256)
    ports: list[Port] = Field(default_factory=list, max_length=64)


class ResultSpec(_Table):
    """`[result]`: the largest result, in bytes, and the score's range, where the challenge declares one."""

    max_bytes: Annotated[int, Field(ge=1024, le=MAX_RESULT_BYTES)] = _MIB
    score_min: Annotated[float, Field(allow_inf_nan=False, strict=False)] | None = None
    score_max: Annotated[float, Field(allow_inf_nan=False, strict=False)] | None = None


class EnvSpec(_Table):
    """`[env.NAME]`: a variable that the operator gives."""

    description: str = ""
    optional: bool = False
    secret: bool = False


class ChallengeSpec(_Table):
    """The whole file. `[scoring]` is read and checked where scores are made."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)]
    version: Annotated[str, Field(min_length=1, max_length=64)]
    entry: Annotated[str, Field(pattern=_MODULE, max_length=255)] = "challenge"
    cvm: CvmSpec = Field(default_factory=CvmSpec)
    execution: ExecutionSpec = Field(default_factory=ExecutionSpec)
    network: NetworkSpec = Field(default_factory=NetworkSpec)
    result: ResultSpec = Field(default_factory=ResultSpec)
    env: dict[Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=255)], EnvSpec] = Field(
        default_factory=dict, max_length=256
    )
    scoring: dict[str, Any] = Field(default_factory=dict)


def parse_platform_toml(data: bytes) -> ChallengeSpec:
    """Read platform.toml (at most 256 KiB of UTF-8).

    Raises:
        SpecInvalid: With every fault, each naming the key, what was expected and, where it can be, the line.
    """
    if len(data) > MAX_SPEC_BYTES:
        raise SpecInvalid([f"expected at most {MAX_SPEC_BYTES} bytes, got {len(data)}"])
    try:
        text = data.decode("utf-8")
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        raise SpecInvalid([f"expected UTF-8, byte {error.start} is not"]) from error
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise SpecInvalid([f"not TOML: {error}" if str(error) else "nested too deep"]) from error
    try:
        return ChallengeSpec.model_validate(table)
    except ValidationError as error:
        raise SpecInvalid([_fault(dict(fault), text) for fault in error.errors()]) from error


def _fault(fault: dict[str, Any], text: str) -> str:
    path = [str(part) for part in fault["loc"]]
    line = _line_of(text, path[-1]) if path else None
    where = ".".join(path) + (f" (line {line})" if line else "")
    if fault["type"] == "extra_forbidden":
        known = _known_keys(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        meant = f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(known)}"
        return f"{where}: unknown key; {meant}"
    if fault["type"] == "missing":
        return f"{where}: missing"
    return f"{where}: {fault['msg']}, got {str(fault['input'])[:80]!r}"


def _known_keys(path: list[str]) -> list[str]:
    tables: dict[str, type[BaseModel]] = {
        "": ChallengeSpec,
        "cvm": CvmSpec,
        "execution": ExecutionSpec,
        "network": NetworkSpec,
        "result": ResultSpec,
        "env": EnvSpec,
    }
    return sorted(tables.get(path[0] if path else "", ChallengeSpec).model_fields)


def _line_of(text: str, key: str) -> int | None:
    name = re.escape(key)
    pattern = re.compile(rf'^\s*(?:"?{name}"?\s*=|\[[^\]]*\b{name}\b[^\]]*\])')
    return next((n for n, line in enumerate(text.splitlines(), 1) if pattern.match(line)), None)
