"""What the whole-number attention kernel is made of at compile time: layouts of lanes, and the PTX that turns words of
codes into bytes.

An operand of ``mma.m16n8k32`` is four bytes a register.  *Lane form*: a tensor with an axis of 8 (``r``) and one of 4
(``c``) that are the lanes ``4 r + c`` of the warp; all other axes are registers.

A *step* of keys is two registers a row.  Values come transposed, a 16-bit word of two tokens in a register; what is
made of it is one register or several, whose bytes are two channels of two tokens.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

CENTER = {2: -0.5, 3: -0.5, 4: 63.5}
"""The byte between the two smallest levels of Lloyd-Max codes."""


@gluon.constexpr_function
def bases(size, axis, rank):
    return [[bit if i == axis else 0 for i in range(rank)] for bit in (1 << n for n in range(size.bit_length() - 1))]


@gluon.constexpr_function
def lanes(shape, r, c):
    """Lane form of ``shape``: axis ``r`` has 8 places, axis ``c`` 4; the last axis lies closest in registers."""
    rank = len(shape)
    registers = []
    for axis in range(rank - 1, -1, -1):
        if axis not in (r, c):
            registers = registers + bases(shape[axis], axis, rank)
    return gl.DistributedLinearLayout(registers, bases(4, c, rank) + bases(8, r, rank), [], [], list(shape))


@gluon.constexpr_function
def halves(shape):
    """``(all but the last axis, shape with the last axis as two halves, order with the halves last)``."""
    front = [int(size) for size in shape[:-1]]
    rank = len(front)
    return front, [*front, 2, int(shape[-1]) // 2], [*range(rank), rank + 1, rank]


@gluon.constexpr_function
def nbits_of(name):
    return {"int4": 4, "int8": 8}[name] if name in ("int4", "int8") else int(name.removeprefix("lloyd"))


@gluon.constexpr_function
def token_bytes(name, dim):
    return dim * nbits_of(name) // 8


@gluon.constexpr_function
def center_of(name):
    return CENTER[nbits_of(name)] if name.startswith("lloyd") else 0.0


@gluon.constexpr_function
def held_bytes(name, dim):
    """Bytes of a token in shared memory: those that it has, to a power of two."""
    return 1 << (token_bytes(name, dim) - 1).bit_length()


@gluon.constexpr_function
def word_axes(name, dim):
    """``(I, V)``: lane c of a row has words ``(i * 4 + c) * V + v`` of what is held; of three bits i 0 and 1 are of the
    first plane, 2 of the second."""
    words = held_bytes(name, dim) // 16  # of a lane
    if nbits_of(name) == 3:
        return words, 1
    return max(1, words // 4), min(4, words)


@gluon.constexpr_function
def table_words(levels):
    """The bytes of codes' levels, four in a word: two words, of sixteen levels four."""
    raw = [int(byte) for byte in levels]
    raw = raw + raw if len(raw) < 8 else raw
    return tuple(sum((byte & 255) << 8 * i for i, byte in enumerate(raw[at : at + 4])) for at in range(0, len(raw), 4))


@gluon.constexpr_function
def num_tables(levels):
    """Words of the table that each thread holds: ``prmt`` takes one more as a constant."""
    return len(levels) // 8 if len(levels) > 8 else min(1, len(levels))


@gluon.constexpr_function
def own_asm(levels, number):
    """PTX: such a word, in a register of each thread: where a warp shares it, ``prmt`` would have it copied first.  The
    operand is a number of each thread's that is not negative, which the assembler does not know."""
    return f"{{ .reg .b32 x; shr.s32 x, $1, 31; or.b32 $0, x, {table_words(levels)[2 * number]:#x}; }}"


@gluon.constexpr_function
def lookup(levels, nbits, word, low, high, tables):
    """PTX: four levels for the lower half's selectors of register ``word``, four for the upper half's."""
    words = [f"{each:#x}" for each in table_words(levels)]
    if nbits == 4:
        return (
            f"xor.b32 n, {word}, 0x88888888; prmt.b32 p, {tables[0]}, {words[1]}, {word}; "
            f"prmt.b32 q, {tables[1]}, {words[3]}, n; or.b32 {low}, p, q; shr.u32 p, {word}, 16; shr.u32 q, n, 16; "
            f"prmt.b32 p, {tables[0]}, {words[1]}, p; prmt.b32 q, {tables[1]}, {words[3]}, q; or.b32 {high}, p, q; "
        )
    return (
        f"prmt.b32 {low}, {tables[0]}, {words[1]}, {word}; shr.u32 p, {word}, 16; "
        f"prmt.b32 {high}, {tables[0]}, {words[1]}, p; "
    )


@gluon.constexpr_function
def third_bits(word, second, target, shift):
    """PTX: selectors ``target`` of two bits of ``word`` each, and of ``second`` shifted left by ``shift``."""
    moved = f"shl.b32 n, {second}, {shift}; " if shift > 0 else f"shr.u32 n, {second}, {-shift}; "
    moved = moved if shift else f"mov.b32 n, {second}; "
    return f"and.b32 {target}, {word}, 0x33333333; {moved}and.b32 n, n, 0x44444444; or.b32 {target}, {target}, n; "


@gluon.constexpr_function
def fields(name, levels, outs, place, tables):
    """PTX from registers ``w`` (and ``s`` of a second plane) to those of ``outs``, pairs of (lower, upper) half."""
    nbits = {"int4": 4}.get(name) or int(name.removeprefix("lloyd"))
    if name == "int4":
        return f"and.b32 {outs[0][0]}, w, 0x0f0f0f0f; shr.u32 p, w, 4; and.b32 {outs[0][1]}, p, 0x0f0f0f0f; "
    if nbits == 4:
        return lookup(levels, 4, "w", *outs[0], tables)
    body = ""
    for parity in (0, 1):
        source = "w"
        if parity:
            body += "shr.u32 w, w, 2; "
        if nbits == 3:
            body += third_bits(source, "s", "x", 2 - 2 * place - parity)
        else:
            body += f"and.b32 x, {source}, 0x33333333; "
        body += lookup(levels, nbits, "x", *outs[parity], tables)
    return body


REGISTERS = "{ .reg .b32 w, s, x, n, p, q; "


@gluon.constexpr_function
def num_outputs(name):
    """Pairs of registers that a word becomes."""
    return 2 if name in ("lloyd2", "lloyd3") else 1


@gluon.constexpr_function
def key_asm(name, levels, place):
    """PTX: a word (and one of the second plane), and the tables, to the registers of its steps."""
    number = num_outputs(name)
    outs = [(f"${2 * i}", f"${2 * i + 1}") for i in range(number)]
    body, at = f"mov.b32 w, ${2 * number}; ", 2 * number + 1
    if name == "lloyd3":
        body, at = body + f"mov.b32 s, ${at}; ", at + 1
    tables = [f"${at + i}" for i in range(num_tables(levels))]
    return REGISTERS + body + fields(name, levels, outs, place, tables) + "}"


@gluon.constexpr_function
def key_constraints(name, levels):
    return ",".join(["=&r"] * (2 * num_outputs(name)) + ["r"] * ((2 if name == "lloyd3" else 1) + num_tables(levels)))


@gluon.constexpr_function
def key_types(name):
    return (gl.int32,) * (4 if name in ("lloyd2", "lloyd3") else 2)


@gluon.constexpr_function
def value_asm(name, levels, place):
    """PTX: two tokens' 16-bit words to registers of two tokens by two channels: an output for each parity of fields,
    its first element of the lower half of what is looked up, its second of the upper.  Tables come twice each."""
    if name == "int8":
        return "mov.b32 $0, $2; mov.b32 $1, 0;"
    number = num_outputs(name)
    outs = [(f"${2 * i}", f"${2 * i + 1}") for i in range(number)]
    at = 2 * number + 1
    if name == "int4":
        body = f"mov.b32 w, ${2 * number}; "
    else:
        body = f"prmt.b32 w, ${2 * number}, 0, 0x3120; "
    if name == "lloyd3":
        body, at = body + f"prmt.b32 s, ${at}, 0, 0x3120; ", at + 1
    tables = [f"${at + 2 * i}" for i in range(num_tables(levels))]
    return REGISTERS + body + fields(name, levels, outs, place, tables) + "}"


@gluon.constexpr_function
def value_constraints(name, levels):
    inputs = (2 if name == "lloyd3" else 1) + 2 * num_tables(levels)
    return ",".join(["=&r"] * (2 * num_outputs(name)) + ["r"] * inputs)


@gluon.constexpr_function
def value_types(name):
    return (gl.int32,) * (2 if name in ("lloyd2", "lloyd3") else 1)


@gluon.constexpr_function
def value_layout(words, tile):
    """``[words, tile]`` as ``ldmatrix.trans`` leaves 16-bit words: token pairs in a register."""
    registers = [[0, 1], [0, 8]]
    if words > 8:
        registers.append([8, 0])
    registers += [[0, bit] for bit in (16, 32, 64, 128) if bit < tile]
    registers += [[bit, 0] for bit in (16, 32, 64, 128) if bit < words]
    return gl.DistributedLinearLayout(registers, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [], [], [words, tile])


@gluon.constexpr_function
def value_swizzle(words):
    """Shared memory of ``[tokens, words]`` 16-bit words, swizzled for ldmatrix: the banks are 64 of them wide."""
    return gl.SwizzledSharedLayout(8, max(1, 64 // words), max(1, min(8, words // 8)), [1, 0])


@gluon.constexpr_function
def key_swizzle(name, dim):
    """Shared memory of ``[tokens, words]`` 32-bit words: of three bits a lane reads single words, so rows are moved."""
    if nbits_of(name) == 3:
        return gl.SwizzledSharedLayout(4, 2, 4, [1, 0])
    return gl.SwizzledSharedLayout(1, 1, 1, [1, 0])


@gluon.constexpr_function
def tile_copy(words, vector):
    """Copies of 16 bytes a lane of ``[tokens, words]``."""
    across = min(32, words // vector)
    return gl.BlockedLayout([1, vector], [32 // across, across], [1, 1], [1, 0])
