"""Static programs of x86-64 without any libc, made byte by byte, so that their tests need no compiler."""

from __future__ import annotations

import struct

_BASE = 0x400000
_HEADERS = 64 + 56
_TWO_THREADS = """
    b8 38 00 00 00           mov eax, 56 (clone)
    bf 00 0f 05 00           mov edi, VM | FS | FILES | SIGHAND | THREAD | SYSVSEM
    48 8d b4 24 00 f0 ff ff  lea rsi, [rsp - 4096]
    0f 05                    syscall
    85 c0                    test eax, eax
    74 @thread               jz thread
    78 @end                  js end
wait:
    b8 18 00 00 00           mov eax, 24 (sched_yield)
    0f 05                    syscall
    80 3c 25 $done 00        cmp byte [done], 0
    74 @wait                 je wait
    b8 01 00 00 00           mov eax, 1 (write)
    89 c7                    mov edi, eax
    be $main                 mov esi, main
    ba 05 00 00 00           mov edx, 5
    0f 05                    syscall
end:
    b8 e7 00 00 00           mov eax, 231 (exit_group)
    31 ff                    xor edi, edi
    0f 05                    syscall
thread:
    b8 01 00 00 00           mov eax, 1 (write)
    89 c7                    mov edi, eax
    be $text                 mov esi, text
    ba 07 00 00 00           mov edx, 7
    0f 05                    syscall
    c6 04 25 $done 01        mov byte [done], 1
    b8 3c 00 00 00           mov eax, 60 (exit)
    31 ff                    xor edi, edi
    0f 05                    syscall
"""
_SOCKETS = """
    48 83 ec 08              sub rsp, 8
pairs:
    b8 35 00 00 00           mov eax, 53 (socketpair)
    bf 01 00 00 00           mov edi, AF_UNIX
    be 01 08 00 00           mov esi, SOCK_STREAM | SOCK_NONBLOCK
    31 d2                    xor edx, edx
    49 89 e2                 mov r10, rsp
    0f 05                    syscall
    85 c0                    test eax, eax
    75 @no-more              jnz no-more
    8b 3c 24                 mov edi, [rsp]
one:
    b8 01 00 00 00           mov eax, 1 (write)
    be 00 00 40 00           mov esi, 0x400000 (its own page)
    ba 00 10 00 00           mov edx, 4096
    0f 05                    syscall
    85 c0                    test eax, eax
    7f @one                  jg one
    8b 7c 24 04              mov edi, [rsp + 4]
other:
    b8 01 00 00 00           mov eax, 1 (write)
    be 00 00 40 00           mov esi, 0x400000
    ba 00 10 00 00           mov edx, 4096
    0f 05                    syscall
    85 c0                    test eax, eax
    7f @other                jg other
    eb @pairs                jmp pairs
no-more:
    b8 39 00 00 00           mov eax, 57 (fork)
    0f 05                    syscall
    85 c0                    test eax, eax
    bf 03 00 00 00           mov edi, 3
    74 @close                jz close
    b8 22 00 00 00           mov eax, 34 (pause)
    0f 05                    syscall
close:
    b8 03 00 00 00           mov eax, 3 (close)
    0f 05                    syscall
    ff c7                    inc edi
    81 ff 00 04 00 00        cmp edi, 1024
    7c @close                jl close
    eb @pairs                jmp pairs
"""


def two_threads() -> bytes:
    """A thread, made by clone as in Go's runtime, says `thread`, and then the first one says `main`."""
    return _elf(_TWO_THREADS, {"text": b"thread\n", "main": b"main\n", "done": b"\0"})


def sockets_without_end() -> bytes:
    """Fills pairs of sockets with bytes that are the kernel's memory, in one process after the other."""
    return _elf(_SOCKETS, {})


def _elf(listing: str, data: dict[str, bytes]) -> bytes:
    """A program of one segment: the headers, the code, and the data behind it."""
    labels, size = _labels(listing)
    at = _BASE + _HEADERS + size
    addresses = {}
    for name, held in data.items():
        addresses[name], at = at, at + len(held)
    body = _code(listing, labels, addresses) + b"".join(data.values())
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    executable, x86_64, entry = 2, 62, _BASE + _HEADERS
    header = ident + struct.pack("<HHIQQQIHHHHHH", executable, x86_64, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load, all_rights, total = 1, 7, _HEADERS + len(body)
    return header + struct.pack("<IIQQQQQQ", load, all_rights, 0, _BASE, _BASE, total, total, 4096) + body


def _words(line: str) -> list[str]:
    """Of one line the bytes in hex, `@label` (how far to jump, one byte) and `$name` (an address, four)."""
    return line.strip().partition("  ")[0].split()


def _labels(listing: str) -> tuple[dict[str, int], int]:
    """Where each label is, and how long the code is."""
    labels, at = dict[str, int](), 0
    for line in listing.strip("\n").splitlines():
        if line.endswith(":"):
            labels[line[:-1]] = at
        else:
            at += sum(4 if word.startswith("$") else 1 for word in _words(line))
    return labels, at


def _code(listing: str, labels: dict[str, int], addresses: dict[str, int]) -> bytes:
    made = b""
    for line in listing.strip("\n").splitlines():
        for word in [] if line.endswith(":") else _words(line):
            if word.startswith("@"):
                made += struct.pack("b", labels[word[1:]] - len(made) - 1)  # always a line's last byte
            elif word.startswith("$"):
                made += struct.pack("<I", addresses[word[1:]])
            else:
                made += bytes.fromhex(word)
    return made
