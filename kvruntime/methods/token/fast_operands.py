"""Gluon: codes and scales in shared memory as operands of the products of :mod:`kvruntime.methods.token.fast`, and
channels in the order of those."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from kvruntime.methods.token.fast_instructions import divided, spread
from kvruntime.methods.token.fast_words import (
    held_bytes,
    key_asm,
    key_constraints,
    key_swizzle,
    key_types,
    lanes,
    value_asm,
    value_constraints,
    value_layout,
    value_types,
    word_axes,
)

NEW_API = gl.constexpr(hasattr(gl.shared_memory_descriptor, "reinterpret"))  # Triton 3.9
LINE = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))


@gluon.jit
def reinterpreted(memory, TYPE: gl.constexpr, SHAPE: gl.constexpr, LAYOUT: gl.constexpr):
    """Shared memory as another."""
    if NEW_API:
        seen = memory.reinterpret(TYPE, SHAPE, LAYOUT)
    else:
        seen = memory._reinterpret(TYPE, SHAPE, LAYOUT)
    return seen


@gluon.jit
def key_operands(codes, stage, m, tables, CODING: gl.constexpr, DIM: gl.constexpr, LEVELS: gl.constexpr):
    """Registers of the ``m``th 16 keys: a tuple, for each row (hi) and step, of (lower, upper)."""
    WARP: gl.constexpr = lanes([8, 4], 0, 1)
    AXES: gl.constexpr = word_axes(CODING, DIM)
    SHAPE: gl.constexpr = [2, 8, AXES[0], 4, AXES[1]]
    N: gl.constexpr = AXES[0] * AXES[1]
    ALL: gl.constexpr = [codes.shape[0] * codes.shape[1] // 16, 16, codes.shape[2]]
    held = reinterpreted(codes, gl.int32, ALL, key_swizzle(CODING, DIM))
    words = held.index(stage * (codes.shape[1] // 16) + m).reshape(SHAPE).load(lanes(SHAPE, 1, 3))
    words = divided(words.permute([1, 3, 0, 2, 4]).reshape([8, 4, 2 * N]))
    out = ()
    if CODING == "int8":
        for i in gl.static_range(2 * N):
            out = out + (gl.convert_layout(words[i], WARP, assert_trivial=True),)
    elif CODING == "lloyd3":
        for hi in gl.static_range(2):
            for i in gl.static_range(2):
                word = gl.convert_layout(words[hi * N + i], WARP, assert_trivial=True)
                second = gl.convert_layout(words[hi * N + 2], WARP, assert_trivial=True)
                out = out + gl.inline_asm_elementwise(
                    key_asm(CODING, LEVELS, i), key_constraints(CODING, LEVELS), (word, second) + spread(tables, word),
                    dtype=key_types(CODING), is_pure=True, pack=1,
                )  # fmt: skip
    else:
        for i in gl.static_range(2 * N):
            word = gl.convert_layout(words[i], WARP, assert_trivial=True)
            out = out + gl.inline_asm_elementwise(
                key_asm(CODING, LEVELS, 0), key_constraints(CODING, LEVELS), (word,) + spread(tables, word),
                dtype=key_types(CODING), is_pure=True, pack=1,
            )  # fmt: skip
    return out


@gluon.jit
def third_planes(words, second, tables, CODING: gl.constexpr, LEVELS: gl.constexpr, PLACE: gl.constexpr):
    """Of eight words of two bits a code and the words of third bits: registers for each parity of the codes."""
    return gl.inline_asm_elementwise(
        value_asm(CODING, LEVELS, PLACE), value_constraints(CODING, LEVELS), (words, second) + spread(tables, second),
        dtype=value_types(CODING), is_pure=True, pack=2,
    )  # fmt: skip


@gluon.jit
def value_operands(codes, stage, m, tables, CODING: gl.constexpr, DIM: gl.constexpr, LEVELS: gl.constexpr):
    """Registers of 16 values: a tuple, for each output of the PTX, its element and ``(rr, hi)``, of
    ``[words / 16, 8, 4]``."""
    HELD: gl.constexpr = held_bytes(CODING, DIM) // 2
    WORDS: gl.constexpr = HELD // 2 if CODING == "lloyd3" else HELD
    OT: gl.constexpr = WORDS // 16
    LO: gl.constexpr = lanes([OT, 8, 4], 1, 2)
    words = codes.index(stage).slice(16 * m, 16).permute([1, 0]).load(value_layout(HELD, 16))
    out = ()
    if CODING == "lloyd3":
        EIGHT: gl.constexpr = value_layout(8, 16)
        first, others = gl.split(words.reshape([2, 16, 16]).permute([1, 2, 0]))
        low, high = gl.split(first.reshape([2, 8, 16]).permute([1, 2, 0]))
        second, _unused = gl.split(others.reshape([2, 8, 16]).permute([1, 2, 0]))
        second = gl.convert_layout(second, EIGHT, assert_trivial=True)
        lower = third_planes(gl.convert_layout(low, EIGHT, assert_trivial=True), second, tables, CODING, LEVELS, 0)
        upper = third_planes(gl.convert_layout(high, EIGHT, assert_trivial=True), second, tables, CODING, LEVELS, 1)
        found = ()
        for number in gl.static_range(2):
            found = found + (gl.join(lower[number], upper[number]).permute([2, 0, 1]).reshape([WORDS, 16]),)
    elif len(value_types(CODING)) == 1:
        found = (gl.inline_asm_elementwise(
            value_asm(CODING, LEVELS, 0), value_constraints(CODING, LEVELS), (words,) + spread(tables, words),
            dtype=value_types(CODING)[0], is_pure=True, pack=2,
        ),)  # fmt: skip
    else:
        found = gl.inline_asm_elementwise(
            value_asm(CODING, LEVELS, 0), value_constraints(CODING, LEVELS), (words,) + spread(tables, words),
            dtype=value_types(CODING), is_pure=True, pack=2,
        )  # fmt: skip
    for number in gl.static_range(len(found)):
        pieces = divided(found[number].reshape([OT, 2, 8, 2, 4, 2]).permute([0, 2, 4, 5, 1, 3]).reshape([OT, 8, 4, 8]))
        for i in gl.static_range(8):
            out = out + (gl.convert_layout(pieces[i], LO, assert_trivial=True),)
    return out


@gluon.jit
def whole_scores(parts, LAYOUT: gl.constexpr):
    """Accumulators ``[8, 4, 2 (hi), 2 (column)]`` of each 16 tokens as the float32 that they are ``MAGIC`` more of."""
    N: gl.constexpr = len(parts)
    if N == 2:
        x = gl.join(parts[0], parts[1])
    elif N == 4:
        x = gl.join(gl.join(parts[0], parts[2]), gl.join(parts[1], parts[3]))
    else:
        x = gl.join(gl.join(gl.join(parts[0], parts[4]), gl.join(parts[2], parts[6])),
                    gl.join(gl.join(parts[1], parts[5]), gl.join(parts[3], parts[7])))  # fmt: skip
    x = x.reshape([8, 4, 2, 2, N]).permute([4, 0, 1, 2, 3])
    return gl.convert_layout(x, LAYOUT, assert_trivial=True).to(gl.float32, bitcast=True)


@gluon.jit
def load_scales(scales, stage, TYPE: gl.constexpr, TILE: gl.constexpr, LAYOUT: gl.constexpr):
    """``[M, 8 (r), 2 (hi)]`` of a stage."""
    ALL: gl.constexpr = [TILE]
    return (
        reinterpreted(scales.index(stage), TYPE, ALL, LINE).reshape([TILE // 16, 2, 8]).permute([0, 2, 1]).load(LAYOUT)
    )


@gluon.jit
def scale_and_zero(stored, CODING: gl.constexpr):
    """``(scale, zero point)`` in float32."""
    zero = stored
    if CODING == "int4":
        TYPE: gl.constexpr = stored.dtype
        SAME: gl.constexpr = gl.int32 if TYPE == gl.float32 else gl.int16
        bits = stored.to(SAME, bitcast=True)
        zero = (bits & 15).to(gl.float32)
        stored = gl.where(stored == stored, bits & ~15, bits).to(SAME).to(TYPE, bitcast=True)
    return stored.to(gl.float32), zero


@gluon.jit
def query_channel(s, half, e, c, CODING: gl.constexpr, DIM: gl.constexpr):
    if CODING == "int8":
        VECTORS: gl.constexpr = min(4, DIM // 16)
        k = s * 2 + half
        channel = ((k // VECTORS * 4 + c) * VECTORS + k % VECTORS) * 4 + e
    elif CODING == "int4":
        channel = ((s // min(4, DIM // 32) * 4 + c) * min(4, DIM // 32) + s % min(4, DIM // 32)) * 8 + 2 * e + half
    elif CODING == "lloyd4":
        channel = ((s // min(4, DIM // 32) * 4 + c) * min(4, DIM // 32) + s % min(4, DIM // 32)) * 8 + 4 * half + e
    elif CODING == "lloyd3":
        channel = (s // 2 * 4 + c) * 16 + 8 * half + 2 * e + s % 2
    else:
        channel = (c * (DIM // 64) + s // 2) * 16 + 8 * half + 2 * e + s % 2
    return channel


@gluon.jit
def output_channel(word, number, element, parity, CODING: gl.constexpr):
    if CODING == "int8":
        channel = 2 * word + parity
    elif CODING == "int4":
        channel = 4 * word + 2 * parity + element
    elif CODING == "lloyd4":
        channel = 4 * word + 2 * element + parity
    else:
        channel = 8 * word + 4 * element + 2 * parity + number
    return channel
