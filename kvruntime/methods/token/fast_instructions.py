"""Gluon: instructions that the language does not have, a register a tensor, for :mod:`kvruntime.methods.token.fast`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvruntime.methods.token.fast_words import halves, num_tables, own_asm


@gluon.jit
def divided(x):
    """``x [..., N]`` as a tuple of ``N`` tensors."""
    N: gl.constexpr = x.shape[len(x.shape) - 1]
    HALVES: gl.constexpr = halves(x.shape)
    if N == 1:
        parts = (x.reshape(HALVES[0]),)
    elif N == 2:
        parts = gl.split(x)
    else:
        first, second = gl.split(x.reshape(HALVES[1]).permute(HALVES[2]))
        parts = divided(first) + divided(second)
    return parts


@gluon.jit
def mma(a, b, c, UNSIGNED: gl.constexpr):
    """``c + a b`` of ``mma.m16n8k32``, each register a tensor: ``a`` four, ``b`` two, ``c`` four."""
    TYPES: gl.constexpr = "s8.u8" if UNSIGNED else "s8.s8"
    b0 = gl.broadcast(b[0], a[0])[0]
    b1 = gl.broadcast(b[1], a[0])[0]
    return gl.inline_asm_elementwise(
        "mma.sync.aligned.m16n8k32.row.col.s32." + TYPES + ".s32 {$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, "
        "{$10, $11, $12, $13};",
        "=r,=r,=r,=r,r,r,r,r,r,r,r,r,r,r", [a[0], a[1], a[2], a[3], b0, b1, c[0], c[1], c[2], c[3]],
        dtype=(gl.int32, gl.int32, gl.int32, gl.int32), is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def fma(a, b, c):
    """``a * b + c``, rounded once."""
    a, b = gl.broadcast(a, b)
    a, c = gl.broadcast(a, c)
    a, b = gl.broadcast(a, b)
    return gl.fma(a, b, c)


@gluon.jit
def swapped(x):
    """float32 of the lane whose columns are four further on or back."""
    return gl.inline_asm_elementwise(
        "shfl.sync.bfly.b32 $0, $1, 2, 31, -1;", "=r,r", [x], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def transposed(even, odd):
    """Weights' lowest 16 bits of columns 2 c and 2 c + 1 of row r, as rows 2 c and 2 c + 1 of column r."""
    return gl.inline_asm_elementwise(
        "{ .reg .b32 x; prmt.b32 x, $1, $2, 0x5410; movmatrix.sync.aligned.m8n8.trans.b16 $0, x; }",
        "=r,r,r", [even, odd], dtype=gl.int32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def selected(x, order):
    """Bytes of ``x`` by ``order``, 4 being zero."""
    order = gl.broadcast(order, x)[0]
    return gl.inline_asm_elementwise(
        "prmt.b32 $0, $1, 0, $2;", "=r,r,r", [x, order], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.jit
def four_of(registers, AT: gl.constexpr):
    """Registers ``(rr, hi)`` in the order of a product's: rows first."""
    return registers[AT], registers[AT + 2], registers[AT + 1], registers[AT + 3]


@gluon.jit
def own_tables(positive, LEVELS: gl.constexpr, LAYOUT: gl.constexpr, RANK: gl.constexpr):
    """Words of the table of levels, each ``[1, ...]`` in a register of each thread."""
    tables = ()
    for number in gl.static_range(num_tables(LEVELS)):
        nothing = gl.full([1] * RANK, positive, gl.int32, LAYOUT)
        tables = tables + (gl.inline_asm_elementwise(
            own_asm(LEVELS, number), "=r,r", [nothing], dtype=gl.int32, is_pure=True, pack=1
        ),)  # fmt: skip
    return tables


@gluon.jit
def spread(tables, x):
    """Each table as wide as ``x``."""
    out = ()
    for i in gl.static_range(len(tables)):
        out = out + (gl.broadcast(tables[i], x)[0],)
    return out
