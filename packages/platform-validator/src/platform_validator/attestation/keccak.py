"""Keccak-256 as dstack uses it (the padding of before FIPS 202), over public data: hashlib has only SHA-3."""

from __future__ import annotations

_RATE = 136
_ROUNDS = 24
_MASK = (1 << 64) - 1
KECCAK_PAD, SHA3_PAD = 0x01, 0x06


def keccak_256(data: bytes, *, pad: int = KECCAK_PAD) -> bytes:
    """The digest, 32 bytes. With `SHA3_PAD` it is SHA3-256, which a test compares with hashlib's."""
    padded = bytearray(data)
    padded += bytes(_RATE - len(data) % _RATE)
    padded[len(data)] ^= pad
    padded[-1] ^= 0x80
    lanes = [0] * 25
    for start in range(0, len(padded), _RATE):
        for lane in range(_RATE // 8):
            offset = start + 8 * lane
            lanes[lane] ^= int.from_bytes(padded[offset : offset + 8], "little")
        lanes = _permute(lanes)
    return b"".join(lane.to_bytes(8, "little") for lane in lanes[:4])


def _permute(lanes: list[int]) -> list[int]:
    """Keccak-f[1600]; lane x,y is at x + 5y (FIPS 202, 3.2)."""
    register = 1
    for _ in range(_ROUNDS):
        # Theta.
        columns = [lanes[x] ^ lanes[x + 5] ^ lanes[x + 10] ^ lanes[x + 15] ^ lanes[x + 20] for x in range(5)]
        lanes = [
            lane ^ columns[(at + 4) % 5] ^ _rotated(columns[(at + 1) % 5], 1) for at, lane in enumerate(lanes)
        ]
        # Rho and pi.
        x, y, moved = 1, 0, lanes[1]
        for step in range(24):
            x, y = y, (2 * x + 3 * y) % 5
            moved, lanes[x + 5 * y] = lanes[x + 5 * y], _rotated(moved, (step + 1) * (step + 2) // 2 % 64)
        # Chi.
        lanes = [
            lanes[at] ^ (~lanes[at - at % 5 + (at + 1) % 5] & lanes[at - at % 5 + (at + 2) % 5] & _MASK)
            for at in range(25)
        ]
        # Iota: the constants come out of an LFSR.
        for bit in range(7):
            if register & 1:
                lanes[0] ^= 1 << ((1 << bit) - 1)
            register = (register << 1) ^ (0x171 if register & 0x80 else 0)
    return lanes


def _rotated(lane: int, by: int) -> int:
    return ((lane << by) | (lane >> (64 - by))) & _MASK if by else lane
