"""A static program without any libc, made byte by byte, so that its test needs no compiler."""

from __future__ import annotations

import struct

_BASE = 0x400000
_HEADERS = 64 + 56
_TEXT = b"thread\nmain\n"
_CODE = """
    b8 38 00 00 00           mov eax, 56 (clone)
    bf 00 0f 05 00           mov edi, VM | FS | FILES | SIGHAND | THREAD | SYSVSEM
    48 8d b4 24 00 f0 ff ff  lea rsi, [rsp - 4096]
    0f 05                    syscall
    85 c0                    test eax, eax
    74 2f                    jz thread
    78 24                    js end
wait:
    b8 18 00 00 00           mov eax, 24 (sched_yield)
    0f 05                    syscall
    80 3c 25 {done} 00       cmp byte [done], 0
    74 ef                    je wait
    b8 01 00 00 00           mov eax, 1 (write)
    89 c7                    mov edi, eax
    be {main}                mov esi, main
    ba 05 00 00 00           mov edx, 5
    0f 05                    syscall
end:
    b8 e7 00 00 00           mov eax, 231 (exit_group)
    31 ff                    xor edi, edi
    0f 05                    syscall
thread:
    b8 01 00 00 00           mov eax, 1 (write)
    89 c7                    mov edi, eax
    be {text}                mov esi, text
    ba 07 00 00 00           mov edx, 7
    0f 05                    syscall
    c6 04 25 {done} 01       mov byte [done], 1
    b8 3c 00 00 00           mov eax, 60 (exit)
    31 ff                    xor edi, edi
    0f 05                    syscall
"""


def two_threads() -> bytes:
    """An x86-64 ELF: its thread, made by clone as in Go's runtime, says `thread`, and then it says `main`."""
    size = len(_assembled(0))
    code = _assembled(_BASE + _HEADERS + size)
    body = code + _TEXT + b"\0"
    ident = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    executable, x86_64, entry = 2, 62, _BASE + _HEADERS
    header = ident + struct.pack("<HHIQQQIHHHHHH", executable, x86_64, 1, entry, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    load, all_rights, total = 1, 7, _HEADERS + len(body)
    return header + struct.pack("<IIQQQQQQ", load, all_rights, 0, _BASE, _BASE, total, total, 4096) + body


def _assembled(data: int) -> bytes:
    """The code, with its text at this address."""
    addresses = {"text": data, "main": data + len(b"thread\n"), "done": data + len(_TEXT)}
    hexes = {name: struct.pack("<I", address).hex() for name, address in addresses.items()}
    lines = (line.strip() for line in _CODE.splitlines() if line.startswith(" "))
    return b"".join(bytes.fromhex(line.partition("  ")[0].format(**hexes)) for line in lines)
