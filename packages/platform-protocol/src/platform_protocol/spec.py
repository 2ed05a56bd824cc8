"""`platform.toml`: what a challenge says of itself. Unknown keys are faults; all faults are told at once.

`platform-toml.schema.json` beside this file is the same as JSON Schema (scripts/platform_toml.py makes it).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from platform_protocol.errors import ProtocolError
from platform_protocol.spec_faults import TOO_DEEP, SpecFault, faults_of, too_long_key, too_much

MAX_SPEC_BYTES = 256 * 1024
MAX_RESULT_BYTES = 16 * 1024 * 1024
_MIB = 1024 * 1024
_MODULE = r"^[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_][A-Za-z0-9_]*)*$"
_HOST = r"^(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*$"
_AT_LINE = re.compile(r"\(at line (\d+), column \d+\)")

Port = Annotated[int, Field(ge=1, le=65535)]
Host = Annotated[str, Field(pattern=_HOST, max_length=253)]
Number = Annotated[float, Field(allow_inf_nan=False)]
EnvName = Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=255)]


class SpecInvalid(ProtocolError):
    """platform.toml cannot be used; `faults` has a line for each thing that is wrong, `details` its parts."""

    def __init__(self, details: Sequence[SpecFault]) -> None:
        self.details = list(details)
        self.faults = [str(fault) for fault in self.details]
        super().__init__("platform.toml: " + "; ".join(self.faults))


def _inside_tree(path: str) -> str:
    if path.startswith("/") or ".." in path.split("/") or "\0" in path or not path:
        raise ValueError("expected a relative path inside the tree")
    return path


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class CvmSpec(_Table):
    """`[cvm]`: what a CVM of this challenge needs. None: what the challenge's row at the API says."""

    os_image: str | None = Field(
        default=None, description="an image of the VMM by name; unset: the strongest one that it has"
    )
    runtime: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:@-]*$", max_length=512)] = Field(
        default="platform-runtime",
        description="a runtime of the image by name, or repository@sha256:… on a dstack image",
    )
    cpu_cores: Annotated[int, Field(ge=1, le=1024)] | None = Field(
        default=None, description="CPU cores of one CVM, a whole number; unset: as the Platform API lists it"
    )
    memory_mb: Annotated[int, Field(ge=128, le=16 * 1024 * 1024)] | None = Field(
        default=None, description="memory of one CVM in MB, at least 128; unset: as the Platform API lists it"
    )
    disk_mb: Annotated[int, Field(ge=64, le=64 * 1024 * 1024)] | None = Field(
        default=None, description="disk of one CVM in MB, at least 64; unset: as the Platform API lists it"
    )
    gpu_count: Annotated[int, Field(ge=0, le=64)] | None = Field(
        default=None, description="GPUs of one CVM; unset: as the Platform API lists it"
    )
    compose: Annotated[str, AfterValidator(_inside_tree), Field(max_length=255)] | None = Field(
        default=None,
        description="path in the tree of a docker-compose file, for a challenge with its own image; its "
        'service needs `security_opt: ["seccomp=unconfined", "systempaths=unconfined"]`, or dstack\'s Docker '
        "[holds no submission](dstack.md#what-holds-submissions-there)",
    )


class ExecutionSpec(_Table):
    """`[execution]`: how jobs run."""

    cvm: Literal["per_job", "shared"] = Field(
        default="per_job", description='"per_job" (a CVM for each job) or "shared" (one for all)'
    )
    concurrency: Annotated[int, Field(ge=1, le=64)] = Field(
        default=1, description='jobs at once in one CVM, where cvm is "shared"'
    )
    timeout_s: Annotated[int, Field(ge=1, le=7 * 24 * 3600)] | None = Field(
        default=None, description="the longest time of a job in seconds; unset: an hour, or the job's own"
    )
    ready: Annotated[int, Field(ge=0, le=64)] = Field(
        default=1, description="CVMs kept booted and waiting for jobs; 0: each job boots its own"
    )


class NetworkSpec(_Table):
    """`[network]`: what the challenge wants to reach; the operator's policy always narrows it."""

    hosts: Annotated[list[Host], Field(max_length=256)] = Field(
        default_factory=list, description='lower-case host names, as "api.example.com" or "*.example.com"'
    )
    ports: Annotated[list[Port], Field(max_length=64)] = Field(
        default_factory=list, description="TCP ports from 1 to 65535; none: those that the operator allows"
    )


class ResultSpec(_Table):
    """`[result]`: the largest result, and the score's range, where the challenge declares one."""

    max_bytes: Annotated[int, Field(ge=1024, le=MAX_RESULT_BYTES)] = Field(
        default=_MIB, description="the largest result in bytes, from 1024 to 16777216"
    )
    score_min: Number | None = Field(default=None, description="the lowest raw score, a finite number")
    score_max: Number | None = Field(default=None, description="the highest raw score, a finite number")


class EnvSpec(_Table):
    """`[env.NAME]`: a variable that the operator gives."""

    description: Annotated[str, Field(max_length=1000)] = Field(
        default="", description="what the operator is to give, and where it is had"
    )
    optional: bool = Field(default=False, description="true: the challenge runs without it, too")
    secret: bool = Field(default=False, description="true: asked for without an echo, and never shown")


class ScoringSpec(_Table):
    """`[scoring]`: the operator's view of a score, `metrics.final_score`; wins over `[scoring_config]`."""

    algorithm: Literal["Linear", "Logarithmic", "Exponential"] | None = Field(
        default=None, description="Linear, Logarithmic or Exponential; unset: the operator's"
    )
    normalization: Literal["None", "MinMax", "ZScore", "Robust"] | None = Field(
        default=None, description="None, MinMax, ZScore or Robust; unset: the operator's"
    )
    min: Number | None = Field(
        default=None, description="MinMax: what becomes 0; unset: result.score_min, else 0"
    )
    max: Number | None = Field(
        default=None, description="MinMax: what becomes 1; unset: result.score_max, else 1"
    )
    centre: Number | None = Field(
        default=None, description="ZScore: the mean; Robust: the median; what becomes 0; unset: 0"
    )
    spread: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None, description="ZScore: the standard deviation; Robust: the interquartile range; unset: 1"
    )
    weights: dict[
        Annotated[str, Field(min_length=1, max_length=255)],
        Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)],
    ] = Field(
        default_factory=dict,
        max_length=256,
        description="what metrics count beside the score, which counts 1: numbers from 0 to 1000000",
    )


class ChallengeSpec(_Table):
    """The whole file."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", max_length=64)] = Field(
        description='lower-case letters, digits, ".", "_" and "-", at most 64, as "digits"'
    )
    version: Annotated[str, Field(min_length=1, max_length=64)] = Field(
        description='text of at most 64 characters, as "1.0"'
    )
    entry: Annotated[str, Field(pattern=_MODULE, max_length=255)] = Field(
        default="challenge", description='the module of the tree that is imported, as "challenge" or "a.b"'
    )
    cvm: CvmSpec = Field(default_factory=CvmSpec, description="a table [cvm]")
    execution: ExecutionSpec = Field(default_factory=ExecutionSpec, description="a table [execution]")
    network: NetworkSpec = Field(default_factory=NetworkSpec, description="a table [network]")
    result: ResultSpec = Field(default_factory=ResultSpec, description="a table [result]")
    env: Annotated[dict[EnvName, EnvSpec], Field(max_length=256)] = Field(
        default_factory=dict, description="tables [env.NAME], each a variable that the operator gives"
    )
    scoring: ScoringSpec = Field(default_factory=ScoringSpec, description="a table [scoring]")

    @model_validator(mode="after")
    def _ranges(self) -> ChallengeSpec:
        """What MinMax would go by, whoever chose it, is a range."""
        low, high = self.score_range
        if (0.0 if low is None else low) >= (1.0 if high is None else high):
            raise ValueError(
                f"expected the lowest score below the highest, got {low} (unset: 0) and {high} (unset: 1): "
                "see scoring.min, scoring.max, result.score_min and result.score_max"
            )
        return self

    @property
    def score_range(self) -> tuple[float | None, float | None]:
        """The lowest and the highest raw score: `[scoring]`'s, else `[result]`'s, else None."""
        scoring, result = self.scoring, self.result
        return (
            result.score_min if scoring.min is None else scoring.min,
            result.score_max if scoring.max is None else scoring.max,
        )


def parse_platform_toml(data: bytes) -> ChallengeSpec:
    """Read platform.toml (at most 256 KiB of UTF-8).

    Raises:
        SpecInvalid: With its faults, each naming the key, what was expected and, where it can be, the line.
    """
    if len(data) > MAX_SPEC_BYTES:
        raise SpecInvalid([SpecFault("", f"expected at most {MAX_SPEC_BYTES} bytes, got {len(data)}")])
    deep = SpecInvalid([SpecFault("", TOO_DEEP)])
    try:
        text = data.decode("utf-8")
        if too_long_key(text):
            raise deep
        table = tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecInvalid([SpecFault("", f"expected UTF-8, byte {error.start} is not", line)]) from error
    except ValueError as error:  # tomllib's own, or Python's about a number of over 4300 digits
        at = _AT_LINE.search(str(error))
        line_at = int(at[1]) if at else None
        raise SpecInvalid([SpecFault("", f"not TOML: {error}"[:200], line_at)]) from error
    except RecursionError:
        raise deep from None
    if (shape := too_much(table)) is not None:
        raise SpecInvalid([SpecFault("", shape)])
    try:
        return ChallengeSpec.model_validate(table)
    except ValidationError as error:
        raise SpecInvalid(faults_of(error, ChallengeSpec, text)) from error
