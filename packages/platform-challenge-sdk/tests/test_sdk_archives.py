"""Submissions are unpacked safely, or refused by the name of what is wrong."""

from __future__ import annotations

import gzip
import io
import os
import tarfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from platform_challenge_sdk import archive
from platform_challenge_sdk.errors import SubmissionUnreadable

Unpack = Callable[[bytes], Path]


def member(name: str, data: bytes = b"", **fields: object) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def tar_of(*members: tuple[tarfile.TarInfo, bytes], form: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def extra(kind: bytes, data: bytes) -> bytes:
    """A header about the next member."""
    info = tarfile.TarInfo("extra")
    info.type, info.size = kind, len(data)
    return info.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512)


@pytest.fixture
def unpack(tmp_path: Path) -> Unpack:
    """Unpacks bytes into a folder."""

    def unpacked(data: bytes) -> Path:
        source, target = tmp_path / "archive", tmp_path / "tree"
        source.write_bytes(data)
        target.mkdir()
        archive.unpack(source, target)
        return target

    return unpacked


class TestGood:
    @pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    @pytest.mark.parametrize("packed", [True, False], ids=["tar.gz", "tar"])
    def test_a_tar_of_any_kind_becomes_a_read_only_tree(
        self, unpack: Unpack, form: int, packed: bool
    ) -> None:
        long = "d" * 90 + "/" + "f" * 90
        plain = tar_of(
            member("./", type=tarfile.DIRTYPE),
            member("./main.py", b"print()", mode=0o755),
            member("sub/data.bin", bytes(1000)),
            member(long, b"long"),
            form=form,
        )
        tree = unpack(gzip.compress(plain) if packed else plain)
        assert (tree / "main.py").read_bytes() == b"print()"
        assert (tree / long).read_bytes() == b"long"
        assert (tree / "sub" / "data.bin").stat().st_size == 1000
        modes = {oct(path.stat().st_mode & 0o7777) for path in (tree, tree / "sub", tree / "main.py")}
        assert modes == {"0o555"}
        assert (tree / "sub" / "data.bin").stat().st_mode & 0o7777 == 0o444

    def test_names_outside_ascii_and_fractional_times_are_read(self, unpack: Unpack) -> None:
        tree = unpack(tar_of(member("données/é.py", b"x", mtime=1.5)))
        assert (tree / "données" / "é.py").read_bytes() == b"x"

    @pytest.mark.parametrize("data", [b"print(1)", b"", b"x" * 100_000])
    def test_anything_else_is_a_single_file(self, unpack: Unpack, data: bytes) -> None:
        tree = unpack(data)
        assert [path.name for path in tree.iterdir()] == ["submission"]
        assert (tree / "submission").read_bytes() == data

    def test_a_read_only_tree_can_be_removed(self, unpack: Unpack) -> None:
        tree = unpack(tar_of(member("a/b/c.txt", b"x")))
        archive.remove(tree)
        assert not tree.exists()


class TestBad:
    @pytest.mark.parametrize(
        ("made", "reason"),
        [
            (member("a", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "links and devices"),
            (member("a", type=tarfile.LNKTYPE, linkname="../x"), "links and devices"),
            (member("a", type=tarfile.CHRTYPE), "links and devices"),
            (member("a", type=tarfile.BLKTYPE), "links and devices"),
            (member("a", type=tarfile.FIFOTYPE), "links and devices"),
            (member("a", type=tarfile.SYMTYPE, linkname="good.txt"), "links and devices"),
            (member("a", type=tarfile.LNKTYPE, linkname="/etc/shadow"), "links and devices"),
            (member("a", type=tarfile.CONTTYPE), "links and devices"),
            (member("a", type=b"Z"), "links and devices"),
            (member("a", type=tarfile.GNUTYPE_SPARSE), "(links and devices|contradicts|not a whole)"),
            (member("../a", b"x"), "no plain relative path"),
            (member("a/../../b", b"x"), "no plain relative path"),
            (member("/etc/a", b"x"), "no plain relative path"),
            (member("..", type=tarfile.DIRTYPE), "no plain relative path"),
            (member("a/..", type=tarfile.DIRTYPE), "no plain relative path"),
            (member("a/./b", b"x"), "no plain relative path"),
            (member("a//b", b"x"), "no plain relative path"),
            (member("//a", b"x"), "no plain relative path"),
            (member(".", b"x"), "no plain relative path"),
            (member("a", b"x", mode=0o4755), "setuid"),
            (member("a", type=tarfile.DIRTYPE, mode=0o2755), "setuid"),
            (member("a", b"x", mode=0o2755), "setuid"),
            (member("/".join("d" * 40), b"x"), "deeper"),
            (member("n" * 300, b"x"), "too long"),
        ],
    )
    @pytest.mark.robustness(25, "links", "dot-dot", "absolute", "device", "fifo", "setuid")
    def test_dangerous_members_are_refused(
        self, unpack: Unpack, made: tuple[tarfile.TarInfo, bytes], reason: str
    ) -> None:
        with pytest.raises(SubmissionUnreadable, match=reason):
            unpack(tar_of(member("good.txt", b"good"), made))

    @pytest.mark.parametrize(
        ("members", "reason"),
        [
            ([member("a", b"1"), member("a", b"2")], "twice"),
            ([member("a", b"1"), member("./a", b"2")], "twice"),
            ([member("a", b"1"), member("a/b", b"2")], "share a path"),
            ([member("a/b", b"1"), member("a", b"2")], "share a path"),
            ([member("a", type=tarfile.DIRTYPE), member("a", type=tarfile.DIRTYPE)], "twice"),
            ([member("main.py", b"1"), member("Main.PY", b"2")], "collide"),
            ([member("a/x", b"1"), member("A/y", b"2")], "collide"),
            ([member("caf\u00e9", b"1"), member("cafe\u0301", b"2")], "collide"),
            ([member("stra\u00dfe", b"1"), member("STRASSE", b"2")], "collide"),
            ([member("d/\u212b", b"1"), member("d/\u00e5", b"2")], "collide"),
        ],
    )
    @pytest.mark.robustness(25, "duplicate", "colliding")
    def test_names_that_collide_are_refused(
        self, unpack: Unpack, members: list[tuple[tarfile.TarInfo, bytes]], reason: str
    ) -> None:
        with pytest.raises(SubmissionUnreadable, match=reason):
            unpack(tar_of(*members))

    def test_names_that_only_look_alike_are_two(self, unpack: Unpack) -> None:
        tree = unpack(
            tar_of(member("a/x", b"1"), member("b/X", b"2"), member("l1", b"3"), member("ll", b"4"))
        )
        assert len(list(tree.rglob("*"))) == 6

    def test_nothing_is_written_outside_by_what_is_refused(self, unpack: Unpack, tmp_path: Path) -> None:
        wanted = tmp_path / "outside"
        link = member("a", type=tarfile.SYMTYPE, linkname="..")
        for name in ("../outside", str(wanted), "a/../../outside", "./../outside", "a/outside"):
            for packed in (tar_of(member(name, b"x"), link), tar_of(link, member(name, b"x"))):
                with pytest.raises(SubmissionUnreadable):
                    unpack(packed)
                archive.remove(tmp_path / "tree")
        assert not wanted.exists()

    def test_too_many_entries_are_refused(self, unpack: Unpack, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(archive, "MAX_ENTRIES", 20)
        with pytest.raises(SubmissionUnreadable, match="at most 20 entries"):
            unpack(tar_of(*(member(f"d{n}/f", b"") for n in range(15))))

    @pytest.mark.parametrize("single", [True, False], ids=["single file", "tar"])
    @pytest.mark.robustness(25, "bomb")
    def test_a_bomb_is_refused_before_it_is_written_out(
        self, unpack: Unpack, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, single: bool
    ) -> None:
        monkeypatch.setattr(archive, "MAX_BYTES", 1 << 20)
        data = bytes(8 << 20)
        with pytest.raises(SubmissionUnreadable, match="at most 1048576 bytes"):
            unpack(gzip.compress(data if single else tar_of(member("zeros", data))))
        assert sum(path.stat().st_size for path in (tmp_path / "tree").rglob("*")) <= 1 << 20

    def test_a_header_as_large_as_a_bomb_is_refused(self, unpack: Unpack) -> None:
        info = tarfile.TarInfo("a")
        info.pax_headers = {"comment": "x" * (1 << 20)}
        with pytest.raises(SubmissionUnreadable, match="a header of over"):
            unpack(gzip.compress(tar_of((info, b""))))

    @pytest.mark.robustness(25, "bomb")
    def test_a_header_takes_no_time_that_grows_with_its_square(self, unpack: Unpack) -> None:
        """Python's tarfile looks through digits again from each of them: eight of these took it a minute."""
        size = 64_000
        digits = b"%d comment=" % size
        data = extra(b"x", digits + b"1" * (size - len(digits) - 1) + b"\n")
        whole = b"".join(data + member(f"m{number}")[0].tobuf(tarfile.USTAR_FORMAT) for number in range(8))
        began = time.thread_time()
        assert len(list(unpack(whole).iterdir())) == 8
        assert time.thread_time() - began < 10

    @pytest.mark.parametrize(
        "data",
        [
            b"x path=a\n",
            b" path=a\n",
            b"-9 path=a\n",
            b"0 path=a\n",
            b"1 path=a\n",
            b"8 path=a\n",
            b"11 path=a\n",
            b"9 path a\n",
            b"99 path=a\n",
            b"1000000000000 path=a\n",
            b"9 path=aa",
            b"10 size=77\n",
            b"22 GNU.sparse.major=1\n",
        ],
    )
    def test_an_extra_header_that_is_none_is_refused(self, unpack: Unpack, data: bytes) -> None:
        """Also one by which a member would have another size than its own header says."""
        whole = extra(b"x", data) + member("a")[0].tobuf(tarfile.USTAR_FORMAT)
        with pytest.raises(SubmissionUnreadable, match="a header that"):
            unpack(whole)

    def test_a_header_for_all_members_names_none(self, unpack: Unpack) -> None:
        """Archives of git have one, with a comment; with a path each member would have the same."""
        plain = member("a")[0].tobuf(tarfile.USTAR_FORMAT)
        with pytest.raises(SubmissionUnreadable, match="contradicts"):
            unpack(extra(b"g", b"9 path=b\n") + plain)

    @given(st.binary(max_size=200), st.sampled_from([b"x", b"X", b"g", b"L", b"K"]))
    def test_whatever_an_extra_header_holds_it_is_a_name_or_refused(self, data: bytes, kind: bytes) -> None:
        with suppress(SubmissionUnreadable):
            assert archive._named(kind, data) is None or kind in b"xXL"

    @pytest.mark.parametrize("cut", [3, 600, 1030])
    def test_a_broken_archive_is_refused(self, unpack: Unpack, cut: int) -> None:
        whole = tar_of(member("a", os.urandom(2000)))
        with pytest.raises(SubmissionUnreadable, match="not a whole archive"):
            unpack(gzip.compress(whole)[:cut] if cut == 3 else whole[:cut])

    def test_a_wrong_checksum_is_refused(self, unpack: Unpack) -> None:
        data = bytearray(tar_of(member("a", b"x")))
        data[0] ^= 1
        with pytest.raises(SubmissionUnreadable, match="not a whole archive"):
            unpack(bytes(data))
