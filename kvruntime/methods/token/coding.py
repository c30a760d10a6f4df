"""How one head of one token lies in bytes: what the reference and the kernels both read.

A *coding* is a name: ``int8``, ``int4``, ``e4m3``, ``e5m2``, or ``lloyd2`` to ``lloyd4`` with ``lloyd2.5`` and
``lloyd3.5``, the widths of Lloyd-Max levels.  A head's codes are its *sections* one behind the other: channels of equal
width, two of them where a width is half a bit more than a whole one.  A section's codes lie in *planes*, a power of two
of bits each (three bits are two and one), in the order of the channels from the lowest bit of the first byte.  Only a
second plane has another order (:func:`second_order`).

A kernel reads *pieces* of a power of two of channels.  It takes sixteen words of a piece or more, for that is the least
depth of a matrix product.  Where a piece has fewer 16-bit words than that, each is read several times, and each time
other bits of it are looked at.

A Lloyd-Max code is the number of the level's magnitude, and above it the sign.
"""

from __future__ import annotations

LIMIT = 65504.0
"""What infinities and larger numbers are clamped to before they are coded: float16's largest."""
LARGEST = {"int8": 127.0, "e4m3": 448.0, "e5m2": 57344.0}
"""The level of a token's largest magnitude."""
PLANES = {2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}


def sections(coding: str, dim: int) -> tuple[tuple[int, int, int, int], ...]:
    """The sections of a head of ``dim`` channels: first channel, channels, bits of their codes, and the byte of the
    head's at which these begin.

    >>> sections("lloyd2.5", 128)
    ((0, 64, 3, 0), (64, 64, 2, 24))
    """
    if not coding.startswith("lloyd"):
        return ((0, dim, 4 if coding == "int4" else 8, 0),)
    bits = float(coding.removeprefix("lloyd"))
    if bits % 1 == 0:
        return ((0, dim, int(bits), 0),)
    half = dim // 2
    return (0, half, int(bits) + 1, 0), (half, half, int(bits), half * (int(bits) + 1) // 8)


def num_bytes(coding: str, dim: int) -> int:
    """Bytes of a head's codes."""
    return sum(count * nbits // 8 for _, count, nbits, _ in sections(coding, dim))


def planes(section: tuple[int, int, int, int]) -> tuple[tuple[int, int, int], ...]:
    """``(bits, lowest bit of the code, byte at which it begins)`` of each plane.

    >>> planes((0, 64, 3, 0))
    ((2, 0, 0), (1, 2, 16))
    """
    _, count, nbits, at = section
    out, low = [], 0
    for bits in PLANES[nbits]:
        out.append((bits, low, at))
        low, at = low + bits, at + count * bits // 8
    return tuple(out)


def chunks(dim: int) -> tuple[tuple[int, int], ...]:
    """``(first channel, width)``: ``dim`` as powers of two, largest first.

    >>> chunks(80)
    ((0, 64), (64, 16))
    """
    widths = [1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1]
    return tuple((sum(widths[:i]), width) for i, width in enumerate(widths))


PIECE = 128
"""Channels of a piece, at most."""


def piece_widths(count: int) -> tuple[int, ...]:
    """The pieces of ``count`` channels.

    >>> piece_widths(320)
    (128, 128, 64)
    """
    return tuple(min(width, PIECE) for _, width in chunks(count) for _ in range(-(-width // PIECE)))


def second_order(width: int) -> tuple[int, int, int, int]:
    """A shape of a piece's ``width`` channels; with its axes in the order 1, 2, 0, 3 they are as the bits of a second
    plane lie.

    Eight codes share a 16-bit word of the first plane.  The bits of words ``n`` and ``n + width / 16`` are word ``n``
    of the second: four times two bits of the one and two of the other.  Shifted by two bits and by one, it has one bit
    in four of every second code of a word, where selectors of four bits have place for it.

    >>> second_order(128), second_order(64)
    ((2, 8, 4, 2), (2, 4, 4, 2))
    """
    return 2, width // 16, 4, 2


def second_place(field: int) -> int:
    """Where the bit of a word's ``field``-th code lies in the second plane's word, but for its half.

    >>> [second_place(field) for field in range(8)]
    [0, 1, 4, 5, 8, 9, 12, 13]
    """
    return field // 2 * 4 + field % 2


def rotation(coding: str, dim: int) -> int:
    """Channels that a Hadamard matrix mixes, the largest power of two that divides ``dim``; 0 without rotation."""
    return dim & -dim if coding.startswith("lloyd") else 0
