"""The packed record: the one description that kvsim's buffers, the packers and the kernels read.

A record holds ``num_tokens`` consecutive tokens of one key/value head as one run of 32-bit words::

    [ key codes | value codes | key scale | key zero | value scale | value zero | key boost codes ]

**Tiles.**  The tokens are cut into tiles of at most 64 (the largest power of two that divides the
record), the channels into power-of-two chunks (80 = 64 + 16), the bits of a code into planes
(3 = 2 + 1).  Codes lie as ``[tile][chunk][plane][word]``.

**Words.**  Inside a tile the codes lie in the operand order of the tensor-core instruction
``mma.m16n8k16`` (PTX ISA, "Matrix fragments for mma.m16n8k16"), so that a warp's 16-byte loads are its
matrix operand and nothing is shuffled.  Names: a lane is ``r * 4 + c`` (r < 8, c < 4), ``e`` is the
half of a 32-bit register, ``hi``/``kk`` the row and column halves of a fragment.

    keys    (tokens are the matrix rows)     token = 16 mt + 8 hi + r        channel = c (W/4) + 4 ks + 2 kk + e
    values  (channels are the matrix rows)   token = 16 ts + 8 kk + 2 c + e  channel = 16 mi + 8 mh + r

For a chunk of ``W`` channels at ``bits`` a code, list the remaining index bits, lowest first:

    keys  kk, ks0, ks1, ..., hi, mt0, mt1        values  mh, mi0, mi1, ..., kk, ts0, ts1

The first ``log2(16 / bits)`` of them choose the field inside a half word (code at bit
``bits * field + 16 * e``), the next (up to) two the word inside a lane's 16-byte vector, then comes
the lane, then whatever is left.  So ``code = (word >> (bits * field + 16 * e)) & (2**bits - 1)``.

**Scales and zeros** are float16.  Keys: ``[token group][channel]``, natural order.  Values:
``[channel group][c][ts][kk][e]`` over the record's tokens, so that a lane's share is contiguous.

**Boosted key channels.**  Where there are some, the record's key channels are those of the row in the order of its
``key_order``, the boosted ones first.  All have codes of the key's bits; the first ``boosted_channels`` have the lower
bits of longer codes besides, laid out as the codes of a head of so many channels.  With ``S`` the stored scale, their
key is ``code * S + zero + lower * S / 2**boost_nbits``.

**Rotated values** have a scale a token and no zero: ``(code - (2**nbits - 1) / 2) * scale``, one group of all channels.
"""

from __future__ import annotations

from dataclasses import dataclass

PLANES: dict[int, tuple[int, ...]] = {1: (1,), 2: (2,), 3: (2, 1), 4: (4,), 8: (8,)}
"""Bits of a code -> the power-of-two planes it is stored in, lowest bits first."""

MAX_TILE = 64
MIN_TOKENS = 16
HEAD_MULTIPLE = 16


def channel_chunks(dim: int) -> tuple[int, ...]:
    """The power-of-two chunks of a head dimension, largest first: 80 -> (64, 16), 128 -> (128,)."""
    if dim < HEAD_MULTIPLE or dim % HEAD_MULTIPLE:
        raise ValueError(f"head dimension {dim} cannot be packed: allowed are multiples of {HEAD_MULTIPLE}")
    return tuple(1 << bit for bit in reversed(range(dim.bit_length())) if dim >> bit & 1)


def boosted_channels(dim: int) -> int:
    """The key channels of a head that may have more bits: a quarter, to a power of two, 16 at least."""
    return max(16, 1 << (dim // 4).bit_length() - 1)


@dataclass(frozen=True)
class TileOrder:
    """How the codes of one tile (tokens x one chunk of channels, one plane) lie in memory.

    ``memory_shape`` are the index bits as array axes in memory order, words first and the code's place
    inside its word last; ``to_logical`` permutes them to ``token axes + channel axes``, after which a
    reshape gives ``[tile, width]``.  ``from_logical`` and ``logical_shape`` are the way back.
    """

    memory_shape: tuple[int, ...]
    to_logical: tuple[int, ...]
    logical_shape: tuple[int, ...]
    from_logical: tuple[int, ...]
    num_words: int
    codes_per_word: int


def tile_order(stream: str, tile: int, width: int, bits: int) -> TileOrder:
    """The order of one tile's codes (see the module text).

    Raises ``ValueError`` when the tile has fewer codes than 32 lanes' words can hold.
    """

    def names(prefix: str, size: int) -> list[str]:  # highest bit first
        return [f"{prefix}{bit}" for bit in reversed(range(size.bit_length() - 1))]

    if stream == "key":
        token_axes = [*names("mt", tile // 16), "hi", "r"]
        channel_axes = ["c", *names("ks", width // 16), "kk", "e"]
        ladder = ["kk", *reversed(names("ks", width // 16)), "hi", *reversed(names("mt", tile // 16))]
    elif stream == "value":
        token_axes = [*names("ts", tile // 16), "kk", "c", "e"]
        channel_axes = [*names("mi", width // 16), "mh", "r"]
        ladder = ["mh", *reversed(names("mi", width // 16)), "kk", *reversed(names("ts", tile // 16))]
    else:
        raise ValueError(f"stream {stream!r}: allowed are 'key' and 'value'")
    num_fields = (16 // bits).bit_length() - 1
    if len(ladder) < num_fields:
        raise ValueError(
            f"{bits}-bit codes of {width} channels need at least {tile << (num_fields - len(ladder))} tokens a "
            f"record, not {tile}: raise the residual length or the key group size"
        )
    field, vector, rest = ladder[:num_fields], ladder[num_fields : num_fields + 2], ladder[num_fields + 2 :]
    memory = [*reversed(rest), "r", "c", *reversed(vector), *reversed(field), "e"]
    logical = token_axes + channel_axes
    size = {"r": 8, "c": 4}
    to_logical = tuple(memory.index(axis) for axis in logical)
    return TileOrder(
        memory_shape=tuple(size.get(axis, 2) for axis in memory),
        to_logical=to_logical,
        logical_shape=tuple(size.get(axis, 2) for axis in logical),
        from_logical=tuple(logical.index(axis) for axis in memory),
        num_words=tile * width * bits // 32,
        codes_per_word=32 // bits,
    )
