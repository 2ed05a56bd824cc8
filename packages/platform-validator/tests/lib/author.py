"""An author of a challenge with a git repository: also one that no git client would make."""

from __future__ import annotations

import hashlib
import os
import struct
import subprocess
import zlib
from pathlib import Path

PLATFORM_TOML = 'name = "digits"\nversion = "1"\n'


class Author:
    """A repository in `folder`, with a good challenge that is not committed yet."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.git("init", "-q", "-b", "main")
        self.write("platform.toml", PLATFORM_TOML)
        self.write("challenge.py", "x = 1\n")

    def __str__(self) -> str:
        return str(self.folder)

    def git(self, *arguments: str, given: bytes = b"") -> str:
        """Run git, without anybody's configuration."""
        env = {
            "PATH": os.environ["PATH"],
            "HOME": str(self.folder),
            "GIT_CONFIG_NOSYSTEM": "1",
            "GIT_AUTHOR_NAME": "a",
            "GIT_AUTHOR_EMAIL": "a@example.invalid",
            "GIT_COMMITTER_NAME": "a",
            "GIT_COMMITTER_EMAIL": "a@example.invalid",
        }
        done = subprocess.run(
            ["git", *arguments], cwd=self.folder, env=env, input=given, check=True, capture_output=True
        )
        return done.stdout.decode().strip()

    def write(self, path: str, text: str) -> None:
        """Write a file."""
        (self.folder / path).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / path).write_text(text)

    def commit(self, message: str = "a commit") -> str:
        """Commit everything."""
        self.git("add", "-A", "-f")
        self.git("commit", "-q", "--allow-empty", "-m", message)
        return self.git("rev-parse", "HEAD")

    def blob(self, data: bytes) -> str:
        """Write a blob."""
        return self.git("hash-object", "-w", "--stdin", given=data)

    def tree(self, *entries: tuple[str, bytes, str]) -> str:
        """Write a tree as it is given: mode, name and object of each entry."""
        data = tree_of(*entries)
        return self.git("hash-object", "-w", "-t", "tree", "--literally", "--stdin", given=data)

    def challenge_tree(self, *more: tuple[str, bytes, str]) -> str:
        """A tree with platform.toml and what comes before or after it."""
        toml = ("100644", b"platform.toml", self.blob(PLATFORM_TOML.encode()))
        return self.tree(*sorted((*more, toml), key=lambda entry: entry[1]))

    def commit_of(self, tree: str) -> str:
        """Put a commit of a tree on the branch."""
        at = self.git("commit-tree", "-m", "made by hand", tree)
        self.git("update-ref", "refs/heads/main", at)
        return at

    def pack_by_hand(self, objects: list[tuple[str, int, bytes]]) -> None:
        """Put a pack into the repository: of each object its id, type and packed form (after the header)."""
        body, offsets, checks = b"PACK" + struct.pack(">II", 2, len(objects)), {}, {}
        for object_id, _, packed in objects:
            offsets[object_id], checks[object_id] = len(body), zlib.crc32(packed)
            body += packed
        body += hashlib.sha1(body).digest()  # noqa: S324 - git's own format
        names = sorted(offsets)
        counts = [sum(int(name[:2], 16) <= first for name in names) for first in range(256)]
        index = b"\xfftOc" + struct.pack(">I256I", 2, *counts)
        index += b"".join(bytes.fromhex(name) for name in names)
        index += b"".join(struct.pack(">I", checks[name]) for name in names)
        index += b"".join(struct.pack(">I", offsets[name]) for name in names) + body[-20:]
        index += hashlib.sha1(index).digest()  # noqa: S324 - as above
        base = self.folder / f".git/objects/pack/pack-{body[-20:].hex()}"
        base.with_suffix(".pack").write_bytes(body)
        base.with_suffix(".idx").write_bytes(index)


def tree_of(*entries: tuple[str, bytes, str]) -> bytes:
    """A tree object."""
    return b"".join(mode.encode() + b" " + name + b"\0" + bytes.fromhex(at) for mode, name, at in entries)


def object_id(kind: bytes, size: int, parts: list[tuple[bytes, int]]) -> str:
    """The id of an object whose content is each part so many times."""
    digest = hashlib.sha1(kind + b" %d\0" % size)  # noqa: S324 - git's own
    for part, times in parts:
        for _ in range(times):
            digest.update(part)
    return digest.hexdigest()


def packed_header(kind: int, size: int) -> bytes:
    """Type and size, as a pack has them."""
    head, size = bytes([(kind << 4) | (size & 15)]), size >> 4
    while size:
        head, size = head[:-1] + bytes([head[-1] | 0x80, size & 0x7F]), size >> 7
    return head


def zeros_deflated(mebibytes: int) -> bytes:
    """That many MiB of zeros as a zlib stream, made of one piece repeated."""
    deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
    piece = deflate.compress(bytes(1024 * 1024)) + deflate.flush(zlib.Z_FULL_FLUSH)
    adler = ((mebibytes * 1024 * 1024) % 65521) << 16 | 1
    return b"\x78\x01" + piece * mebibytes + b"\x03\x00" + struct.pack(">I", adler)
