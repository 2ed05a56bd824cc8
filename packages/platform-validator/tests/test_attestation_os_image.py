"""Known images: what was pinned, by hand or on first use, and what was published."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from images_vector import BODY, PINNED, identity

from platform_validator.attestation.os_image import (
    ImagesFile,
    ImagesInvalid,
    ImageTrust,
    KnownImages,
    Pinned,
    Shape,
    Trust,
    check_os_image,
    read_images,
)
from platform_validator.attestation.quote import QuoteBody


def body(**fields: Any) -> QuoteBody:
    registers = bytes(48), b"\x11" * 48, b"\x22" * 48, b"\x33" * 48
    return replace(BODY, mrtd=b"\xaa" * 48, rtmrs=registers, **fields)


def trusted(
    known: KnownImages, found: QuoteBody, image: str = "dstack-0.5.5", shape: Shape = PINNED.shape
) -> ImageTrust | str:
    return check_os_image(known, found, identity(), image=image, shape=shape, vm_config="{}")


def judged(
    known: KnownImages, found: QuoteBody, image: str = "dstack-0.5.5", shape: Shape = PINNED.shape
) -> str:
    """What is wrong with it, if anything is."""
    trust = trusted(known, found, image, shape)
    return trust if isinstance(trust, str) else "trusted"


def test_what_was_pinned_is_known_and_nothing_else() -> None:
    """Another shape or image names the command; another register is named with both values."""
    known = KnownImages((PINNED,))
    assert judged(known, body()) == "trusted"
    assert "--image dstack-0.5.5 --cpu 8 --memory 8192" in judged(known, body(), shape=Shape(8, 8192))
    assert "--gpus 1" in judged(known, body(), shape=Shape(4, 8192, 1))
    assert "--image other" in judged(known, body(), image="other")
    wrong = judged(known, replace(body(), mrtd=b"\xbb" * 48))
    assert wrong.startswith(
        "image dstack-0.5.5 at 4 vCPUs, 8192 MB booted to something else: MRTD: pinned aaaa"
    )
    assert "RTMR" not in wrong


def test_entries_of_one_shape_are_alternatives() -> None:
    """Another QEMU adds pages in another order."""
    other = replace(PINNED, mrtd="bb" * 48)
    known = KnownImages((other, PINNED))
    assert judged(known, body()) == "trusted"
    assert "something else" in judged(KnownImages((other,)), body())


FIRST_USE = replace(PINNED, origin="first use (measured)", first_use="2026-11-25T12:00:00Z")


@pytest.mark.parametrize(
    ("entries", "trust"),
    [
        ((PINNED,), ImageTrust(Trust.PINNED, "dstack-0.5.5", Shape(4, 8192), "by hand")),
        (
            (FIRST_USE,),
            ImageTrust(
                Trust.FIRST_USE,
                "dstack-0.5.5",
                Shape(4, 8192),
                "first use (measured)",
                "2026-11-25T12:00:00Z",
            ),
        ),
        ((FIRST_USE, PINNED), ImageTrust(Trust.PINNED, "dstack-0.5.5", Shape(4, 8192), "by hand")),
    ],
    ids=["by hand", "first use", "first use, then vouched for"],
)
def test_how_an_image_came_to_be_trusted_is_told(entries: tuple[Pinned, ...], trust: ImageTrust) -> None:
    """First use is called that, until somebody vouches for the same values."""
    assert trusted(KnownImages(entries), body()) == trust


def test_what_an_earlier_pin_wrote_is_first_use_too(tmp_path: Path) -> None:
    """Its origin begins so; entries of today say so in a line of its own, what is no time is refused."""
    file = ImagesFile(tmp_path / "images.toml")
    file.add(FIRST_USE)
    assert file.known().pinned == (FIRST_USE,)
    assert 'first_use = "2026-11-25T12:00:00Z"' in file.path.read_text()
    for word in ("", "simulated, "):
        old = f"first use ({word}measured 2026-06-01T12:00:00Z on unix:/vmm.sock, platform 00)"
        file = ImagesFile(tmp_path / f"{len(word)}.toml")
        file.add(replace(PINNED, origin=old))
        [read] = file.known().pinned
        assert read.first_use == "2026-06-01T12:00:00Z"
    with pytest.raises(ImagesInvalid, match="first_use"):
        ImagesFile(tmp_path / "wrong.toml").add(replace(PINNED, first_use="yesterday"))


def test_registers_are_not_mixed_from_two_entries() -> None:
    known = KnownImages((replace(PINNED, mrtd="bb" * 48), replace(PINNED, rtmr1="bb" * 48)))
    assert "something else" in judged(known, body())


def test_a_file_of_images_is_written_and_read_again(tmp_path: Path) -> None:
    """What an operator wrote stays, comments too; an origin cannot break out of its line."""
    file = ImagesFile(tmp_path / "folder" / "images.toml")
    assert file.known() == KnownImages()
    file.add(PINNED)
    assert file.known().pinned == (PINNED,)
    file.path.write_text(file.path.read_text() + "\n# a note\n")
    file.add(replace(PINNED, origin='x"\n[[pinned]]\n'))
    known = file.known()
    assert [one.origin for one in known.pinned] == ["by hand", "x??[[pinned]]?"]
    assert "# a note" in file.path.read_text()
    assert oct(file.path.stat().st_mode & 0o777) == "0o600"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[[pinned]\n", "not TOML"),
        ("images = 1\n", "expected [[pinned]] and [[published]]"),
        ("pinned = 1\n", "expected [[pinned]] tables"),
        ('[[pinned]]\nimage = "i"\n', "[[pinned]] 1: expected cpu"),
        ('[[published]]\nimage = "i"\nos_image_hash = "xyz"\norigin = ""\n', "os_image_hash: expected"),
        (
            '[[published]]\nimage = "../i"\nos_image_hash = "' + "0" * 64 + '"\norigin = ""\n',
            "image: expected",
        ),
    ],
)
def test_a_file_that_cannot_be_used_knows_nothing_and_is_left_alone(
    tmp_path: Path, text: str, says: str
) -> None:
    """The check fails with the fault; an entry is not added to what cannot be read."""
    with pytest.raises(ImagesInvalid) as caught:
        read_images(text)
    assert says in str(caught.value)
    file = ImagesFile(tmp_path / "images.toml")
    file.path.write_text(text)
    assert says in str(file.known().fault)
    assert judged(file.known(), body()) == file.known().fault
    with pytest.raises(ImagesInvalid):
        file.add(PINNED)
    assert file.path.read_text() == text


def test_a_changed_file_is_read_again_and_a_removed_one_knows_nothing(tmp_path: Path) -> None:
    file = ImagesFile(tmp_path / "images.toml")
    file.add(PINNED)
    first = file.known()
    assert file.known() is first
    file.add(replace(PINNED, shape=Shape(8, 8192)))
    assert len(file.known().pinned) == 2
    file.path.unlink()
    assert file.known() == KnownImages()
