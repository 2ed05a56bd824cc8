"""The example challenges: their trees, their data, and what becomes of each submission."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from platform_challenge_sdk import SubmissionFailed, challenge
from platform_challenge_sdk.agent import Agent
from platform_challenge_sdk.job import JobRun
from platform_challenge_sdk.values import Values
from platform_protocol.ids import ChallengeId, Hotkey, JobId
from platform_protocol.session.messages import JobExecute, JobResult, SubmissionChunk
from platform_protocol.spec import parse_platform_toml

EXAMPLES = Path(__file__).parents[2] / "examples"
EXPECTATIONS: list[dict[str, Any]] = json.loads((EXAMPLES / "expectations.json").read_text())["submissions"]
GOOD = [each for each in EXPECTATIONS if each["outcome"] == "succeeded"]
BAD = [each for each in EXPECTATIONS if each["outcome"] != "succeeded"]

Load = Callable[[str], ModuleType]


def name_of(expectation: dict[str, Any]) -> str:
    """How a case is shown."""
    return f"{expectation['challenge']}-{expectation['miner']}-{expectation['name']}"


def cases(expectations: list[dict[str, Any]]) -> list[Any]:
    """Test cases. `words` is slow: it codes 83,000 tokens one by one in Python, and decodes them again."""
    return [
        pytest.param(each, id=name_of(each), marks=[pytest.mark.slow] if each["name"] == "words" else [])
        for each in expectations
    ]


def folder_of(expectation: dict[str, Any]) -> Path:
    """Where a submission is."""
    challenge_name, miner, name = (str(expectation[key]) for key in ("challenge", "miner", "name"))
    return EXAMPLES / challenge_name / "submissions" / miner / name


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Load:
    """Imports an example's challenge.py as platform-boot does, into a process without handlers."""

    def loaded(name: str) -> ModuleType:
        monkeypatch.setattr(challenge, "_jobs", {})
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / name / "challenge.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return loaded


def program(folder: Path, arguments: list[str], stdin: bytes) -> bytes:
    """Run a submission as the challenge does, but uncontained: only for those we know to be harmless."""
    done = subprocess.run(
        [sys.executable, "main.py", *arguments],
        cwd=folder,
        input=stdin,
        capture_output=True,
        check=True,
        timeout=30,
    )
    return done.stdout


@pytest.mark.parametrize("name", ["digits", "compression"])
class TestTree:
    def test_platform_toml_is_valid_and_declares_the_range_of_scores(self, name: str, load: Load) -> None:
        spec = parse_platform_toml((EXAMPLES / name / "platform.toml").read_bytes())
        assert spec.name == name
        assert spec.result.score_min == 0
        assert spec.result.score_max == getattr(load(name), "SCORE_MAX", 1.0)

    def test_four_cvms_fit_the_default_limits_of_a_validator(self, name: str) -> None:
        cvm = parse_platform_toml((EXAMPLES / name / "platform.toml").read_bytes()).cvm
        assert cvm.cpu_cores is not None
        assert cvm.memory_mb is not None
        assert cvm.disk_mb is not None
        assert 4 * cvm.cpu_cores <= 4
        assert 4 * cvm.memory_mb <= 2048
        assert 4 * cvm.disk_mb <= 10240

    def test_the_time_limits_of_its_runs_fit_the_time_of_a_job(self, name: str, load: Load) -> None:
        spec = parse_platform_toml((EXAMPLES / name / "platform.toml").read_bytes())
        assert spec.execution.timeout_s is not None
        assert spec.execution.timeout_s > 2 * load(name).TIME_LIMIT

    def test_it_has_a_readme_and_the_licence_of_program_and_data(self, name: str) -> None:
        assert (EXAMPLES / name / "README.md").is_file()
        assert "MIT License" in (EXAMPLES / name / "LICENSE").read_text()
        licence = (EXAMPLES / name / "data" / "LICENSE").read_text()
        assert "CC BY 4.0" in licence or "public domain" in licence

    def test_importing_it_registers_the_default_job_handler(self, name: str, load: Load) -> None:
        load(name)
        assert challenge.handlers == ["default"]

    def test_the_data_is_the_file_that_its_licence_names(self, name: str) -> None:
        data = next(path for path in (EXAMPLES / name / "data").iterdir() if path.name != "LICENSE")
        digest = hashlib.sha256(data.read_bytes()).hexdigest()
        assert (
            digest
            == {
                "digits": "09f66e6debdee2cd2b5ae59e0d6abbb73fc2b0e0185d2e1957e9ebb51e23aa22",
                "compression": "acf831d84b01ddfb6098b38e76c4f99745575cb185adacb1cf7446687c4fd3bd",
            }[name]
        )
        assert digest in (EXAMPLES / name / "data" / "LICENSE").read_text()


class TestExpectations:
    def test_every_submission_has_one_and_every_one_a_submission(self) -> None:
        there = {path.parent for path in EXAMPLES.glob("*/submissions/*/*/main.py")}
        assert there == {folder_of(each) for each in EXPECTATIONS}
        assert len(EXPECTATIONS) == len(there)

    def test_three_miners_hand_in_two_to_each_challenge(self) -> None:
        counted = Counter((each["challenge"], each["miner"]) for each in EXPECTATIONS)
        assert len(counted) == 6
        assert set(counted.values()) == {2}

    def test_six_score_and_six_fail(self) -> None:
        assert (len(GOOD), len(BAD)) == (6, 6)
        assert all(low < high for low, high in (each["score"] for each in GOOD))
        assert all(each["error"] for each in BAD)


class TestDigits:
    def test_the_split_is_the_same_for_everyone(self, load: Load) -> None:
        digits = load("digits")
        train, test = digits.split(digits.load_digits())
        assert (len(train), len(test)) == (1297, 500)
        asked = hashlib.sha256(digits.questions(test).encode()).hexdigest()
        assert asked == "13fd6ea95867b0e26fc81dfec69bd5a300ef9cc76fe9fbf4d30bdb11038e1fc7"

    def test_questions_hold_pixels_and_no_labels(self, load: Load) -> None:
        digits = load("digits")
        _, test = digits.split(digits.load_digits())
        assert {line.count(",") + 1 for line in digits.questions(test).splitlines()} == {64}

    @pytest.mark.parametrize(
        ("answers", "fault"),
        [
            ("1\n2\n", "expected 3 lines"),
            ("1\n2\n3\n4\n", "expected 3 lines"),
            ("", "expected 3 lines"),
            ("1\nten\n3\n", "line 2"),
            ("1\n\n3\n", "line 2"),
            ("1\n2\n\u0663\n", "line 3"),
        ],
    )
    def test_anything_but_one_digit_a_line_is_the_submissions_failure(
        self, load: Load, answers: str, fault: str
    ) -> None:
        with pytest.raises(SubmissionFailed, match=fault):
            load("digits").parse_answers(answers, 3)

    def test_the_last_newline_may_be_missing(self, load: Load) -> None:
        assert load("digits").parse_answers("1\n2\n3", 3) == [1, 2, 3]

    def test_accuracy_counts_nine_tenths_and_speed_one(self, load: Load) -> None:
        score = load("digits").score
        assert score(1.0, 0.0) == pytest.approx(1.0)
        assert score(1.0, 5.0) == pytest.approx(0.9)
        assert score(1.0, 99.0) == pytest.approx(0.9)
        assert score(0.0, 0.0) == 0.0

    @pytest.mark.parametrize("case", cases([each for each in GOOD if each["challenge"] == "digits"]))
    def test_a_classifier_is_as_accurate_as_expected(
        self, load: Load, tmp_path: Path, case: dict[str, Any]
    ) -> None:
        digits = load("digits")
        train, test = digits.split(digits.load_digits())
        lesson = tmp_path / "train.csv"
        lesson.write_bytes(digits.lesson(train))
        printed = program(folder_of(case), [str(lesson)], digits.questions(test).encode())
        answers = digits.parse_answers(printed.decode(), len(test))
        accuracy = sum(answer == digit.label for answer, digit in zip(answers, test, strict=True)) / len(test)
        low, high = case["score"]
        assert low <= digits.score(accuracy, digits.TIME_LIMIT)
        assert digits.score(accuracy, 0.0) <= high


class TestCompression:
    @pytest.mark.parametrize("case", cases([each for each in GOOD if each["challenge"] == "compression"]))
    def test_a_compressor_restores_the_text_at_the_expected_ratio(
        self, load: Load, case: dict[str, Any]
    ) -> None:
        compression = load("compression")
        original = compression.CORPUS.read_bytes()
        compressed = program(folder_of(case), ["compress"], original)
        restored = program(folder_of(case), ["restore"], compressed)
        low, high = case["score"]
        assert low <= compression.score(original, compressed, restored) <= high

    @pytest.mark.parametrize(
        "text",
        [b"", b"\n\n", b"\0", b"Ge1:1 a\nGe1:2 b\nGe1:2 c\nGe1:4 \nGe1:5 \0x\n\n", bytes(range(256)) * 3],
        ids=["empty", "newlines", "null", "labels out of order", "every byte"],
    )
    def test_the_word_model_restores_any_bytes(self, text: bytes) -> None:
        folder = EXAMPLES / "compression" / "submissions" / "carol" / "words"
        assert program(folder, ["restore"], program(folder, ["compress"], text)) == text

    def test_a_text_that_came_back_changed_scores_0(self, load: Load) -> None:
        score = load("compression").score
        assert score(b"abcd", b"x", b"abcd") == 4
        assert score(b"abcd", b"x", b"abce") == 0
        assert score(b"abcd", b"x", b"abcd\n") == 0

    def test_the_score_stays_in_its_declared_range(self, load: Load) -> None:
        score = load("compression").score
        assert score(b"a" * 100, b"", b"a" * 100) == 8
        assert score(b"a", b"b" * 100, b"a") == pytest.approx(0.01)


def packed(folder: Path) -> bytes:
    """A submission as it is uploaded."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w:gz", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(folder.iterdir()):
            tar.add(path, arcname=path.name)
    return target.getvalue()


async def run_job(name: str, submission: bytes, scratch: Path) -> JobResult:
    """One job through the SDK: unpacked, run contained, judged by the challenge that is loaded."""
    sent: list[Any] = []
    job = JobId("7d1f5a52-6c1c-4d6e-9a57-0d9f3c1b2a44")
    order = JobExecute(
        job_id=job,
        attempt=1,
        challenge_id=ChallengeId(name),
        payload={},
        submission_sha256=hashlib.sha256(submission).hexdigest(),
    )
    job_run = JobRun(
        order,
        challenge=challenge,
        agent=Agent(()),
        validator=Hotkey("5C4hrfjw9DjXZTzV3MwzrrAr9P1MJhSrvWGWqi1eSuyUpnhM"),
        values=Values(sent.append),
        send=sent.append,
        max_result=16384,
        scratch=scratch,
    )
    job_run.chunk(SubmissionChunk(job_id=job, offset=0, last=True, data=submission))
    await job_run.run()
    assert isinstance(sent[-1], JobResult)
    return sent[-1]


class TestContained:
    """Each submission, but one, through the SDK's containment.

    `forks` is left to the demo: the limit on processes does not bind root, as whom tests may run.
    """

    @pytest.mark.parametrize("case", cases(GOOD))
    async def test_a_good_submission_gets_its_score(
        self, load: Load, tmp_path: Path, case: dict[str, Any]
    ) -> None:
        load(case["challenge"])
        ended = await run_job(case["challenge"], packed(folder_of(case)), tmp_path)
        assert ended.error is None
        assert ended.result is not None
        low, high = case["score"]
        assert low <= ended.result["score"] <= high

    @pytest.mark.parametrize("case", cases([each for each in BAD if each["name"] != "forks"]))
    async def test_a_bad_submission_is_its_own_failure(
        self, load: Load, tmp_path: Path, case: dict[str, Any], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        module = load(case["challenge"])
        if case["outcome"] == "timeout":
            monkeypatch.setattr(module, "TIME_LIMIT", 0.5)
        ended = await run_job(case["challenge"], packed(folder_of(case)), tmp_path)
        assert ended.result is None
        assert ended.error is not None
        assert ended.error.code == ("timeout" if case["outcome"] == "timeout" else "submission_failed")
        assert case["error"] in ended.error.message

    async def test_a_submission_that_could_carry_the_text_is_refused(
        self, load: Load, tmp_path: Path
    ) -> None:
        compression = load("compression")
        folder = tmp_path / "submission"
        folder.mkdir()
        (folder / "main.py").write_text("print()")
        (folder / "text").write_bytes(bytes(compression.PROGRAM_BYTES))
        ended = await run_job("compression", packed(folder), tmp_path)
        assert ended.error is not None
        assert "at most 16384 bytes" in ended.error.message
