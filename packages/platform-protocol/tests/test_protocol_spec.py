"""platform.toml from anybody: a specification or its faults, always, and soon."""

from __future__ import annotations

import contextlib
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_protocol.spec import MAX_SPEC_BYTES, ChallengeSpec, SpecInvalid, parse_platform_toml

HEAD = 'name = "x"\nversion = "1"\n'
ROOM = MAX_SPEC_BYTES - 1000


def judged(text: str) -> ChallengeSpec | SpecInvalid:
    """What is made of a text."""
    try:
        return parse_platform_toml(text.encode(errors="surrogateescape"))
    except SpecInvalid as error:
        return error


@pytest.mark.parametrize(
    "text",
    [
        HEAD + "a" * ROOM,
        HEAD + "a " * (ROOM // 2),
        HEAD + ("a" * 100 + ".") * (ROOM // 101),
        HEAD + "a.b.c.d.e.f.g.h.i.j.k.l.m.n.o\n" * (ROOM // 31),
        HEAD + '"""' + '\n\\"""' * (ROOM // 5),
        HEAD + "'''" + "\n'" * (ROOM // 2),
        HEAD + '"' * ROOM,
        HEAD + "\\" * ROOM,
        HEAD + f'x = """\n[{" " * ROOM}\n"""\n',
        HEAD + f'x = """\n{"[ " * (ROOM // 2)}\n"""\n',
        HEAD + f"x = '{'a.' * (ROOM // 2)}'\n",
        HEAD + "x = 1\n" + "".join(f"k{number} = 1\n" for number in range(ROOM // 12)),
        HEAD + "[network]\nhosts = [" + "'-'," * (ROOM // 4) + "]\n",
        HEAD + "".join(f"[env.A{number}]\nx=1\n" for number in range(ROOM // 18)),
        HEAD + f"entry = {'1' * ROOM}\n",
        HEAD + f"[execution]\nconcurrency = 0x{'f' * ROOM}\n",
        HEAD + f"[scoring]\nmin = {'9' * 4000}\n",
        HEAD + "x = " + "[" * ROOM,
        HEAD + "x = " + "{a=" * (ROOM // 3),
    ],
    ids=range(19),
)
def test_no_text_of_256_kib_takes_long(text: str) -> None:
    """Made to be slow, each is refused within seconds on any machine, in a message that can be shown."""
    began = time.process_time()
    verdict = judged(text)
    assert time.process_time() - began < 5
    assert isinstance(verdict, SpecInvalid)
    assert len(str(verdict)) < 12_000


words = st.sampled_from(
    [
        *("name", "version", "cvm", "env", "scoring", "weights", "network", "hosts", "memory_mb", "result"),
        *("=", ".", "[", "]", "[[", "]]", "{", "}", ",", "\n", " ", '"', '"""', "'", "'''", "#", "\\"),
        *("1", "-1", "1e999", "nan", "inf", "0x1f", "1979-05-27", "07:32:00", "true", '"x"', "\x00", "é"),
    ]
)


@given(st.one_of(st.text(), st.lists(words, max_size=60).map("".join)), st.booleans())
def test_any_text_is_a_specification_or_has_faults(text: str, headed: bool) -> None:
    """Nothing else is ever raised; each fault is one printable line with a line of the file, if any."""
    whole = HEAD + text if headed else text
    verdict = judged(whole)
    if isinstance(verdict, SpecInvalid):
        assert verdict.faults
        for fault in verdict.details:
            assert fault.line is None or 1 <= fault.line <= whole.count("\n") + 2
    else:
        assert ChallengeSpec.model_validate_json(verdict.model_dump_json()) == verdict


@given(st.binary(max_size=300))
def test_any_bytes_are_a_specification_or_have_faults(data: bytes) -> None:
    """The same for what is no text."""
    verdict: object = None
    with contextlib.suppress(SpecInvalid):
        verdict = parse_platform_toml(data)
    assert verdict is None or isinstance(verdict, ChallengeSpec)


def test_lines_are_found_past_strings_that_look_like_keys() -> None:
    """A key inside a string of several lines is none."""
    text = HEAD + '[env.A]\ndescription = """\n[cvm]\nmemory = 1\n"""\n[cvm]\nmemory = 1\n'
    verdict = judged(text)
    assert isinstance(verdict, SpecInvalid)
    assert [fault.line for fault in verdict.details] == [9]
