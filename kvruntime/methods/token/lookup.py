"""Triton: words of codes to levels, two fields at a time.

Portable: shifts, masks and comparisons, a number at a time.  Else by instructions of NVIDIA's that take two words in
one register: of Lloyd-Max codes the magnitudes are selectors of ``prmt``, which looks up four bytes at once in a table
of eight that lies in two registers, the levels' low bytes and then their high bytes; the signs are put on at the end.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvruntime.methods.token import coding
from kvruntime.methods.token.words import is_lloyd, piece_section, piece_words, word_sizes
from kvsim.methods import token as layout

second_place = triton.constexpr_function(coding.second_place)
INTERPRETED = triton.knobs.runtime.interpret
LOOKUP = tl.constexpr(layout.LOOKUP)
OWN = tl.constexpr("{ .reg .b32 x; mov.u32 x, %laneid; shr.u32 x, x, $2; or.b32 $0, $1, x; }")
"""A number as it is, given 8: in a register of each thread, for ``prmt`` takes none that a warp shares, where it would
lie else."""


@triton.constexpr_function
def unit_of(name):
    """What a coding's levels are multiples of as they come out of words."""
    return 256.0 if name == "e4m3" else 1.0


@triton.constexpr_function
def field_at(place, fields):
    """Which field comes ``place``th: those half a word apart come together."""
    return place if fields == 1 else place % 2 * (fields // 2) + place // 2


@triton.constexpr_function
def lloyd_asm(nbits, fields, sizes, j):
    """PTX: fields ``j`` and ``j + fields / 2`` of two words, tokens' or channels', as pairs of float16.

    Operands: the words of each plane, of those whose words have less than 16 bits (``sizes``) by how many to shift, and
    the four tables; what is 32 bits wide comes twice.  None for words that it does not take.
    """
    apart = fields // 2 * (4 if nbits == 4 else 2)  # bits between the two fields
    if apart not in (4, 8):
        return None
    at = 2 + len(sizes)
    body = "{ .reg .b32 x, y, l, h, w, s; "
    for place, size in enumerate(sizes):
        name = "ws"[place]
        if size < 16:
            body += f"shr.b32 {name}, ${2 + place}, ${at}; "
            at += 2
        else:
            body += f"mov.b32 {name}, ${2 + place}; "
    width = 4 if nbits == 4 else 2
    mask = {2: 1, 3: 3, 4: 7}[nbits] * (0x01010101 if apart == 8 else 0x00110011)
    down, near, far = (12, 0x5140, 0x7362) if apart == 8 else (8, 0x6240, 0x7351)
    first = second_place(j) if nbits == 3 else width * j + width - 1  # the bit that is the sign
    second = second_place(j + fields // 2) if nbits == 3 else first + apart
    body += f"shr.b32 x, w, {width * j}; and.b32 x, x, {mask}; shr.b32 y, x, {down}; or.b32 x, x, y; "
    body += f"prmt.b32 l, ${at}, ${at + 2}, x; prmt.b32 h, ${at + 4}, ${at + 6}, x; "
    for out, order, bit in ((0, near, first), (1, far, second)):
        body += f"prmt.b32 x, l, h, {order}; shl.b32 y, {'s' if nbits == 3 else 'w'}, {15 - bit}; "
        body += f"and.b32 y, y, 0x80008000; xor.b32 ${out}, x, y; "
    return body + "}"


@triton.jit
def load_tables(lookup_ptr, CODING: tl.constexpr, DIM: tl.constexpr, NUMBER: tl.constexpr):
    """What a piece's levels are looked up in: four int32 ``[1, 1]``, loaded as tensors, which the compiler lets have
    the layout of the codes; of codings without levels none."""
    tables = ()
    if is_lloyd(CODING):
        at = lookup_ptr + LOOKUP * piece_section(CODING, DIM, NUMBER) + tl.arange(0, 1)[:, None]
        for i in tl.static_range(4):
            pair = [tl.load(at + i), tl.load(at + 19)]
            tables = tables + (tl.inline_asm_elementwise(OWN, "=r,r,r", pair, tl.int32, True, 1),)
    return tables


@triton.jit
def load_shifts(lookup_ptr, CODING: tl.constexpr, DIM: tl.constexpr, NUMBER: tl.constexpr, ACROSS: tl.constexpr,
                FAST: tl.constexpr):  # fmt: skip
    """By how many bits the words of each plane of less than 16 are to be shifted: int32, broadcast against them."""
    SIZES: tl.constexpr = word_sizes(CODING, DIM, NUMBER)
    k = tl.arange(0, piece_words(CODING, DIM, NUMBER))
    if ACROSS:
        k = k[:, None]
    else:
        k = k[None, :]
    shifts = ()
    for p in tl.static_range(len(SIZES)):
        if SIZES[p] < 16:
            if FAST and (is_lloyd(CODING) and (SIZES[p] == 8 or (SIZES[p] == 4 and p == 1))):
                shift = tl.load(lookup_ptr + (4 if SIZES[p] == 8 else 20) + k)
                if SIZES[p] == 8 and p == 1:
                    shift = shift // 4
            elif p == 0:
                shift = k // SIZES[p] * SIZES[p]
            else:
                shift = k // (2 * SIZES[p]) * (2 * SIZES[p]) + k // SIZES[p] % 2 * 2
            shifts = shifts + (shift,)
    return shifts


@triton.constexpr_function
def number_asm(name, fields, j, fp8):
    """:func:`lloyd_asm` of the other codings; ``fp8``: by the instruction that reads e4m3."""
    body = ""
    if name == "int4" and fields == 4:
        for out in (0, 1):
            body += f"shr.b32 x, $2, {4 * j + 8 * out}; and.b32 x, x, 0x000f000f; or.b32 x, x, 0x64006400; "
            body += f"sub.rn.f16x2 ${out}, x, y; "
        return "{ .reg .b32 x, y; mov.b32 y, 0x64086408; " + body + "}"
    if name == "int4" or fields != 2:
        return None
    if name == "int8":
        for out in (0, 1):
            body += f"shr.b32 x, $2, {8 * out}; and.b32 x, x, 0x00ff00ff; xor.b32 x, x, 0x64806480; "
            body += f"sub.rn.f16x2 ${out}, x, y; "
        return "{ .reg .b32 x, y; mov.b32 y, 0x64806480; " + body + "}"
    if name == "e4m3" and fp8:
        body = "prmt.b32 x, $2, 0, 0x3120; mov.b32 {l, h}, x; "
        for out, half in ((0, "l"), (1, "h")):
            body += f"cvt.rn.f16x2.e4m3x2 x, {half}; mul.rn.f16x2 ${out}, x, y; "
        return "{ .reg .b32 x, y; .reg .b16 l, h; mov.b32 y, 0x1c001c00; " + body + "}"  # 2**-8, as unit_of says
    if name == "e4m3":
        for out, shift in ((0, "shl.b32 x, $2, 7; shl.b32 y, $2, 8; "), (1, "shr.b32 x, $2, 1; mov.b32 y, $2; ")):
            body += shift + f"and.b32 x, x, 0x3f803f80; and.b32 y, y, 0x80008000; or.b32 ${out}, x, y; "
        return "{ .reg .b32 x, y; " + body + "}"
    return "{ .reg .b32 x; shl.b32 x, $2, 8; and.b32 $0, x, 0xff00ff00; and.b32 $1, $2, 0xff00ff00; }"


@triton.constexpr_function
def pair_asm(name, nbits, fields, sizes, j, fp8):
    return lloyd_asm(nbits, fields, sizes, j) if name.startswith("lloyd") else number_asm(name, fields, j, fp8)


@triton.constexpr_function
def operands(name, sizes):
    """What the PTX of a pair is given, as constraints."""
    wide = sum(size < 16 for size in sizes) + 4 if name.startswith("lloyd") else 0
    return "=r,=r" + ",r" * (len(sizes) + 2 * wide)


@triton.jit
def field_of(word, j: tl.constexpr, BITS: tl.constexpr):
    return (word >> (BITS * j)) & ((1 << BITS) - 1)


@triton.jit
def level_of(words, j: tl.constexpr, CODING: tl.constexpr, LEVELS: tl.constexpr, NBITS: tl.constexpr,
             DOT: tl.constexpr):  # fmt: skip
    """Field ``j`` of words ``[tokens, words]`` as levels of type ``DOT``."""
    if is_lloyd(CODING):
        if NBITS == 3:
            size = field_of(words[0], j, 2)
            minus = (words[1] >> second_place(j)) & 1
        else:
            code = field_of(words[0], j, NBITS)
            size = code & ((1 << (NBITS - 1)) - 1)
            minus = code >> (NBITS - 1)
        level = tl.full(size.shape, LEVELS[0], DOT)
        for i in tl.static_range(1, len(LEVELS)):
            level = tl.where(size == i, tl.full(size.shape, LEVELS[i], DOT), level)
        level = tl.where(minus != 0, -level, level)
    elif CODING == "int4":
        level = (field_of(words[0], j, 4) - 8).to(DOT)
    elif CODING == "int8":
        level = ((field_of(words[0], j, 8) ^ 128) - 128).to(DOT)
    else:
        bits = field_of(words[0], j, 8) << 8
        if CODING == "e4m3":
            bits = (bits & -0x8000) | ((bits & 0x7F00) >> 1)
        level = bits.to(tl.int16).to(tl.float16, bitcast=True).to(DOT)
    return level


@triton.jit
def field_levels(words, shifts, tables, j: tl.constexpr, CODING: tl.constexpr, LEVELS: tl.constexpr,
                 NBITS: tl.constexpr, FIELDS: tl.constexpr, SIZES: tl.constexpr, DOT: tl.constexpr,
                 FAST: tl.constexpr):  # fmt: skip
    """Field ``j`` of words and, of several, the one half of them further on: a tuple of levels of type ``DOT``.

    ``shifts``: by how many bits the words of each plane of less than 16 are to be shifted first; ``tables``: of the
    section.  ``FAST``: 1 by instructions of every NVIDIA device's, 2 by those that read fp8 too."""
    ASM: tl.constexpr = pair_asm(CODING, NBITS, FIELDS, SIZES, j, FAST == 2)
    if FAST and ASM is not None:
        found = tl.inline_asm_elementwise(ASM, operands(CODING, SIZES), words + shifts + tables,
                                          dtype=(tl.float16, tl.float16), is_pure=True, pack=2)  # fmt: skip
    elif FIELDS == 1:
        found = (level_of(shifted(words, shifts, SIZES), j, CODING, LEVELS, NBITS, DOT),)
    else:
        moved = shifted(words, shifts, SIZES)
        found = (level_of(moved, j, CODING, LEVELS, NBITS, DOT),
                 level_of(moved, j + FIELDS // 2, CODING, LEVELS, NBITS, DOT))  # fmt: skip
    return found


@triton.constexpr_function
def shifts_before(sizes, number):
    return sum(size < 16 for size in sizes[:number])


@triton.jit
def shifted(words, shifts, SIZES: tl.constexpr):
    moved = ()
    for p in tl.static_range(len(SIZES)):
        if SIZES[p] < 16:
            moved = moved + (words[p] >> shifts[shifts_before(SIZES, p)].to(tl.int16),)
        else:
            moved = moved + (words[p],)
    return moved
