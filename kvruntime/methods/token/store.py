"""Triton: tokens to codes, many at once or one a row (the arithmetic is ``encode``'s of
:mod:`kvruntime.methods.token.reference`).

``append_kernel``: ``BLOCK_T`` tokens of one row and head, keys or values.  ``step_kernel``: the new token of one row
and head, rotary embedding on the way.  A vector is chunks of a power of two of channels, each rotated in registers; its
codes leave as 32-bit words.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels import lines
from kvruntime.kernels.hadamard import rotate_rows, sum_of_squares
from kvruntime.kernels.launch import overlaps
from kvruntime.kernels.lines import rows_of
from kvruntime.kernels.rotary import embedded_token
from kvruntime.kernels.rotary import rotated as embedded_at
from kvruntime.methods.token import coding, fast_store
from kvruntime.methods.token.reference import Layout, Stored, check
from kvruntime.methods.token.words import (
    chunk_first,
    chunk_planes,
    chunk_width,
    is_lloyd,
    layout_constants,
    num_chunks,
    num_sections,
    piece_fields_of,
    rotation,
    section_levels,
)

LIMIT = tl.constexpr(coding.LIMIT)
LARGEST = coding.LARGEST
TINY = tl.constexpr(2.0**-100)
ROUND = tl.constexpr(12582912.0)
"""Added to a number below 2**22, it leaves the nearest whole number in the last bits."""
ROUND_BITS = tl.constexpr(0x4B400000)
TILE_ELEMENTS = 2048
"""Elements that a program of :func:`append` codes at once."""
NUM_WARPS = 4


@triton.constexpr_function
def largest(name):
    return LARGEST[name]


@triton.jit
def whole(x):
    """The nearest whole number, ties to even, of numbers below 2**22."""
    return (x + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS


@triton.jit
def inverse_of(scale):
    usable = scale > TINY
    return tl.where(usable, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(usable, scale, 1.0)), 0.0)


@triton.jit
def canonical(scale, has_nan, TYPE: tl.constexpr):
    """``scale`` as it is stored; every NaN is one bit pattern."""
    return tl.where(has_nan, tl.full(scale.shape, float("nan"), TYPE), scale.to(TYPE))


@triton.jit
def store_planes(ptr, code, kept, CODING: tl.constexpr, DIM: tl.constexpr, SECTION: tl.constexpr, FIRST: tl.constexpr,
                 N: tl.constexpr, W: tl.constexpr):  # fmt: skip
    """Codes ``[N, W]`` of a chunk to the bytes at ``ptr [N]``, as 32-bit words."""
    PLANES: tl.constexpr = chunk_planes(CODING, DIM, SECTION, FIRST)
    store_plane(ptr + PLANES[0][2], code, kept, PLANES[0][0], N, W)
    if len(PLANES) > 1:
        store_second(ptr + PLANES[1][2], (code >> PLANES[1][1]) & 1, kept, piece_fields_of(W), N, W)


@triton.jit
def store_second(ptr, bit, kept, F: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """A second plane, of one bit (:func:`kvruntime.methods.token.coding.second_order`): a channel's place in its word
    depends on the channel alone, so that nothing is permuted."""
    PIECE: tl.constexpr = 16 * F
    bit = tl.reshape(bit, (N * (W // PIECE), 2, F // 2, 2, 8))
    low = tl.arange(0, 8)
    place = low // 2 * 4 + low % 2
    word = tl.sum(bit << place[None, None, None, None, :], 4)
    word = tl.sum(word << (16 * tl.arange(0, 2))[None, None, None, :], 3)
    word = tl.sum(word << (2 * tl.arange(0, 2))[None, :, None], 1)
    ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(ptr[:, None] + tl.arange(0, W // 32)[None, :], tl.reshape(word, (N, W // 32)), mask=kept[:, None])


@triton.jit
def store_plane(ptr, code, kept, BITS: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """The lowest ``BITS`` bits of codes ``[N, W]``."""
    WORDS: tl.constexpr = W * BITS // 32
    field = tl.reshape(code & ((1 << BITS) - 1), (N, WORDS, 32 // BITS))
    word = tl.sum(field << (BITS * tl.arange(0, 32 // BITS))[None, None, :], 2)
    ptr = ptr.to(tl.pointer_type(tl.int32), bitcast=True)
    tl.store(ptr[:, None] + tl.arange(0, WORDS)[None, :], word, mask=kept[:, None])


@triton.jit
def half_of(x, NUMBER: tl.constexpr, N: tl.constexpr, W: tl.constexpr):
    """The first or second half of the channels of ``x [N, W]``."""
    second = tl.arange(0, 2)[None, :, None]
    return tl.sum(tl.where(second == NUMBER, tl.reshape(x, (N, 2, W // 2)), 0), 1)


@triton.jit
def nearest(unit, LEVELS: tl.constexpr):
    """``(code, square)`` of coordinates in units of the root mean square, squares of levels in quarters of a unit's."""
    size = tl.abs(unit)
    code = tl.where(unit < 0, len(LEVELS), 0)
    square = tl.full(unit.shape, square_of(LEVELS, 0), tl.int32)
    for i in tl.static_range(len(LEVELS) - 1):
        above = size > (LEVELS[i] + LEVELS[i + 1]) / 2
        code += above.to(tl.int32)
        square = tl.where(above, square_of(LEVELS, i + 1), square)
    return code, square


@triton.constexpr_function
def quarter_of(levels, number):
    """A quarter of the square of the unit of the ``number``th section."""
    return unit_of(levels[number]) ** 2 / 4


@triton.constexpr_function
def square_of(levels, number):
    """``(2 n + 1)**2`` of level ``(n + 1/2) unit``."""
    return round(2 * levels[number] / unit_of(levels)) ** 2


@triton.constexpr_function
def unit_of(levels):
    """The unit of levels, a multiple of 2**-20: they are odd multiples of half of it."""
    halves = [round(level * 2.0**21) for level in levels]
    return 2.0 * math.gcd(*halves) / 2.0**21


@triton.jit
def store_lloyd(x, signs_ptr, codes_ptr, scale_ptr, kept, CODING: tl.constexpr, DIM: tl.constexpr,
                LEVELS: tl.constexpr, N: tl.constexpr, CORRECTED: tl.constexpr):  # fmt: skip
    SIZE: tl.constexpr = rotation(CODING, DIM)
    turned = ()
    squares = tl.zeros([N], tl.float32)
    for i in tl.static_range(num_chunks(DIM)):
        sign = tl.load(signs_ptr + chunk_first(DIM, i) + tl.arange(0, chunk_width(DIM, i))).to(tl.float32)
        y = rotate_rows(x[i] * sign[None, :], N, chunk_width(DIM, i), SIZE)
        squares += sum_of_squares(y, N, chunk_width(DIM, i), True)
        turned = turned + (y,)
    rms = tl.sqrt_rn(squares * (1 / DIM))
    inverse = inverse_of(rms)[:, None]
    found = tl.zeros([N], tl.int32)  # in quarters of a unit's square, of the first section and the second
    others = tl.zeros([N], tl.int32)
    for i in tl.static_range(num_chunks(DIM)):
        unit = turned[i] * inverse
        code, square = nearest(unit, section_levels(LEVELS, 0))
        if num_sections(CODING, DIM) == 1:
            store_planes(codes_ptr, code, kept, CODING, DIM, 0, chunk_first(DIM, i), N, chunk_width(DIM, i))
        else:
            second, near = nearest(unit, section_levels(LEVELS, 1))
            in_first = (tl.arange(0, DIM) < DIM // 2)[None, :]
            others += tl.sum(tl.where(in_first, 0, near), 1)
            square = tl.where(in_first, square, 0)
            store_planes(codes_ptr, half_of(code, 0, N, DIM), kept, CODING, DIM, 0, 0, N, DIM // 2)
            store_planes(codes_ptr, half_of(second, 1, N, DIM), kept, CODING, DIM, 1, 0, N, DIM // 2)
        found += tl.sum(square, 1)
    total = found.to(tl.float32) * quarter_of(LEVELS, 0)
    if num_sections(CODING, DIM) > 1:
        total += others.to(tl.float32) * quarter_of(LEVELS, 1)
    scale = rms
    if CORRECTED:
        scale = tl.minimum(tl.sqrt_rn(tl.div_rn(squares, total)), LIMIT)
    tl.store(scale_ptr, canonical(scale, squares != squares, scale_ptr.dtype.element_ty), mask=kept)


@triton.jit
def store_int4(x, codes_ptr, scale_ptr, kept, DIM: tl.constexpr, N: tl.constexpr):
    TYPE: tl.constexpr = scale_ptr.dtype.element_ty
    low = tl.zeros([N], tl.float32)
    high = tl.zeros([N], tl.float32)
    nans = tl.zeros([N], tl.int32)
    for i in tl.static_range(num_chunks(DIM)):
        low = tl.minimum(low, tl.min(x[i], 1))
        high = tl.maximum(high, tl.max(x[i], 1))
        nans = tl.maximum(nans, tl.max((x[i] != x[i]).to(tl.int32), 1))
    scale = canonical(tl.div_rn(high - low, 15.0), nans > 0, TYPE)
    SAME: tl.constexpr = tl.int32 if TYPE == tl.float32 else tl.int16
    bits = scale.to(SAME, bitcast=True)
    bits = tl.where(nans > 0, bits, (bits + 15) & ~15).to(SAME)
    inverse = inverse_of(bits.to(TYPE, bitcast=True).to(tl.float32))
    inverse = tl.where(nans > 0, 0.0, inverse)
    zero = tl.minimum(tl.maximum(whole(-low * inverse), 0), 15)
    for i in tl.static_range(num_chunks(DIM)):
        level = x[i] * inverse[:, None]
        level = tl.where(level == level, level, 0.0)
        code = tl.minimum(tl.maximum(whole(level) + zero[:, None], 0), 15)
        store_planes(codes_ptr, code, kept, "int4", DIM, 0, chunk_first(DIM, i), N, chunk_width(DIM, i))
    tl.store(scale_ptr, (bits | zero.to(SAME)).to(SAME).to(TYPE, bitcast=True), mask=kept)


@triton.jit
def float8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """The nearest eight-bit float's bits (int32) of numbers within its range, ties to even, on any device."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.abs(x)
    DROPPED: tl.constexpr = 23 - MANTISSA
    magnitude = bits & 0x7FFFFFFF
    normal = (magnitude + ((1 << (DROPPED - 1)) - 1) + ((magnitude >> DROPPED) & 1)) >> DROPPED
    normal -= (127 - BIAS) << MANTISSA
    small = whole(size * (2.0 ** (BIAS - 1 + MANTISSA)))
    code = tl.where(size < 2.0 ** (1 - BIAS), small, normal)
    return code | ((bits >> 24) & 0x80)


@triton.jit
def store_scaled(x, codes_ptr, scale_ptr, kept, CODING: tl.constexpr, DIM: tl.constexpr, N: tl.constexpr):
    LARGEST: tl.constexpr = largest(CODING)
    most = tl.zeros([N], tl.float32)
    nans = tl.zeros([N], tl.int32)
    for i in tl.static_range(num_chunks(DIM)):
        real = x[i] == x[i]
        most = tl.maximum(most, tl.max(tl.where(real, tl.abs(x[i]), 0.0), 1))
        nans = tl.maximum(nans, tl.max((~real).to(tl.int32), 1))
    scale = canonical(tl.div_rn(most, LARGEST), nans > 0, scale_ptr.dtype.element_ty)
    tl.store(scale_ptr, scale, mask=kept)
    inverse = tl.where(nans > 0, 0.0, inverse_of(scale.to(tl.float32)))[:, None]
    for i in tl.static_range(num_chunks(DIM)):
        level = x[i] * inverse
        level = tl.minimum(tl.maximum(tl.where(level == level, level, 0.0), -LARGEST), LARGEST)
        if CODING == "int8":
            code = whole(level)
        elif CODING == "e4m3":
            code = float8(level, 3, 7)
        else:
            code = float8(level, 2, 15)
        store_planes(codes_ptr, code, kept, CODING, DIM, 0, chunk_first(DIM, i), N, chunk_width(DIM, i))


@triton.jit
def clamped(x):
    """float32 within +-``LIMIT``, a NaN as it is."""
    x = x.to(tl.float32)
    return tl.where(x == x, tl.minimum(tl.maximum(x, -LIMIT), LIMIT), x)


@triton.jit
def store_tokens(x, signs_ptr, codes_ptr, scale_ptr, kept, CODING: tl.constexpr, DIM: tl.constexpr,
                 LEVELS: tl.constexpr, N: tl.constexpr, CORRECTED: tl.constexpr):  # fmt: skip
    """Chunks ``[N, W]`` of a vector each to codes at ``codes_ptr [N]`` and a scale at ``scale_ptr [N]``."""
    if is_lloyd(CODING):
        store_lloyd(x, signs_ptr, codes_ptr, scale_ptr, kept, CODING, DIM, LEVELS, N, CORRECTED)
    elif CODING == "int4":
        store_int4(x, codes_ptr, scale_ptr, kept, DIM, N)
    else:
        store_scaled(x, codes_ptr, scale_ptr, kept, CODING, DIM, N)


@triton.jit
def append_stream(x_ptr, codes_ptr, scale_ptr, signs_ptr, t, kept, place, slot, head, stride_t, stride_cb, stride_ch,
                  stride_ct, stride_sb, stride_sh, stride_st, CODING: tl.constexpr, DIM: tl.constexpr,
                  LEVELS: tl.constexpr, N: tl.constexpr, CORRECTED: tl.constexpr):  # fmt: skip
    at = t.to(tl.int64)[:, None] * stride_t
    x = ()
    for i in tl.static_range(num_chunks(DIM)):
        d = chunk_first(DIM, i) + tl.arange(0, chunk_width(DIM, i))
        x = x + (clamped(tl.load(x_ptr + at + d[None, :], mask=kept[:, None], other=0.0)),)
    codes_at = place * stride_cb + head * stride_ch + slot * stride_ct
    scale_at = place * stride_sb + head * stride_sh + slot * stride_st
    store_tokens(x, signs_ptr, codes_ptr + codes_at, scale_ptr + scale_at, kept, CODING, DIM, LEVELS, N,
                 CORRECTED)  # fmt: skip


@triton.jit
def append_kernel(
    key_ptr, value_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr, key_signs_ptr, value_signs_ptr,
    lengths_ptr, counts_ptr, starts_ptr, table_ptr, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_xb, stride_xh, stride_xt, stride_sb, stride_sh, stride_st, stride_yb, stride_yh, stride_yt, stride_zb,
    stride_zh, stride_zt, new_length, num_blocks, batch_size, NUM_HEADS: tl.constexpr, KEY_CODING: tl.constexpr,
    VALUE_CODING: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_LEVELS: tl.constexpr,
    VALUE_LEVELS: tl.constexpr, CORRECTED: tl.constexpr, BLOCK_T: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr,
):  # fmt: skip
    """New tokens of one row and head, or of a line with ``starts_ptr`` of one head, tokens of any rows; keys in the
    first plane of the grid, values in the second.  Strides: of keys and values as they come, then of codes and scales
    of keys (x, s) and of values (y, z)."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if BLOCK_B == 0:
        row = tl.program_id(1) // NUM_HEADS
        head = (tl.program_id(1) % NUM_HEADS).to(tl.int64)
        count = new_length
        if counts_ptr is not None:
            count = tl.load(counts_ptr + row)
        start = new_length - count
        key_ptr += row.to(tl.int64) * stride_kb
        value_ptr += row.to(tl.int64) * stride_vb
    else:
        head = tl.program_id(1).to(tl.int64)
        row = rows_of(t, starts_ptr, batch_size, BLOCK_B)
        start = tl.load(starts_ptr + row)
    kept = (t >= start) & (t < new_length)
    token = tl.load(lengths_ptr + row) + t - start
    if PAGE == 0:
        place = row.to(tl.int64) + token.to(tl.int64) * 0
        slot = token.to(tl.int64)
    else:
        place = tl.load(table_ptr + row.to(tl.int64) * num_blocks + token // PAGE, mask=kept, other=0).to(tl.int64)
        slot = (token % PAGE).to(tl.int64)
    if tl.program_id(2) == 0:
        append_stream(key_ptr + head * stride_kh, key_codes_ptr, key_scale_ptr, key_signs_ptr, t, kept, place, slot,
                      head, stride_kt, stride_xb, stride_xh, stride_xt, stride_sb, stride_sh, stride_st, KEY_CODING,
                      KEY_DIM, KEY_LEVELS, BLOCK_T, CORRECTED)  # fmt: skip
    else:
        append_stream(value_ptr + head * stride_vh, value_codes_ptr, value_scale_ptr, value_signs_ptr, t, kept, place,
                      slot, head, stride_vt, stride_yb, stride_yh, stride_yt, stride_zb, stride_zh, stride_zt,
                      VALUE_CODING, VALUE_DIM, VALUE_LEVELS, BLOCK_T, CORRECTED)  # fmt: skip


@triton.jit
def step_value(value_ptr, codes_ptr, scale_ptr, signs_ptr, codes_at, scale_at, CODING: tl.constexpr, DIM: tl.constexpr,
               LEVELS: tl.constexpr, CORRECTED: tl.constexpr):  # fmt: skip
    one = tl.zeros([1], tl.int64)
    x = ()
    for i in tl.static_range(num_chunks(DIM)):
        d = chunk_first(DIM, i) + tl.arange(0, chunk_width(DIM, i))
        x = x + (clamped(tl.load(value_ptr + d))[None, :],)
    store_tokens(x, signs_ptr, codes_ptr + (one + codes_at), scale_ptr + (one + scale_at), one == 0, CODING, DIM,
                 LEVELS, 1, CORRECTED)  # fmt: skip


@triton.jit
def step_key(query_ptr, key_ptr, cos_ptr, sin_ptr, codes_ptr, scale_ptr, signs_ptr, codes_at, scale_at, position, head,
             stride_qh, Q_PER_KV: tl.constexpr, CODING: tl.constexpr, DIM: tl.constexpr, LEVELS: tl.constexpr,
             CORRECTED: tl.constexpr, BLOCK_Q: tl.constexpr, ROTARY: tl.constexpr, OWN: tl.constexpr):  # fmt: skip
    """The key, and with ``ROTARY`` and ``OWN`` the query heads that share it, embedded in place."""
    one = tl.zeros([1], tl.int64)
    x = ()
    queries = ()
    for i in tl.static_range(num_chunks(DIM)):
        d = chunk_first(DIM, i) + tl.arange(0, chunk_width(DIM, i))
        inside = d < DIM
        key, query, _, _ = embedded_token(query_ptr, key_ptr, cos_ptr, sin_ptr, position, head, stride_qh, inside,
                                          inside, d, ROTARY, DIM, Q_PER_KV, BLOCK_Q)  # fmt: skip
        x = x + (clamped(key)[None, :],)
        queries = queries + (query,)
    tl.debug_barrier()  # all halves are read before one is written
    if ROTARY and OWN:
        m = tl.arange(0, BLOCK_Q)
        query_at = query_ptr + (head * Q_PER_KV + m)[:, None].to(tl.int64) * stride_qh
        for i in tl.static_range(num_chunks(DIM)):
            d = chunk_first(DIM, i) + tl.arange(0, chunk_width(DIM, i))
            tl.store(query_at + d[None, :], queries[i], mask=(m < Q_PER_KV)[:, None])
    store_tokens(x, signs_ptr, codes_ptr + (one + codes_at), scale_ptr + (one + scale_at), one == 0, CODING, DIM,
                 LEVELS, 1, CORRECTED)  # fmt: skip


@triton.jit
def step_query(query_ptr, turned_ptr, cos_ptr, sin_ptr, signs_ptr, position, stride_qh, DIM: tl.constexpr,
               SIZE: tl.constexpr, Q_PER_KV: tl.constexpr, BLOCK_Q: tl.constexpr, ROTARY: tl.constexpr):  # fmt: skip
    """Query heads that share a key, embedded with ``ROTARY`` and rotated as keys are, to ``turned_ptr``."""
    m = tl.arange(0, BLOCK_Q)
    real = (m < Q_PER_KV)[:, None]
    for i in tl.static_range(num_chunks(DIM)):
        d = chunk_first(DIM, i) + tl.arange(0, chunk_width(DIM, i))
        heads_ptr = query_ptr + m[:, None].to(tl.int64) * stride_qh
        if ROTARY:
            cos = tl.load(cos_ptr + position * DIM + d).to(tl.float32)
            sin = tl.load(sin_ptr + position * DIM + d).to(tl.float32)
            query = embedded_at(heads_ptr, d[None, :], real, cos[None, :], sin[None, :], DIM)
        else:
            query = tl.load(heads_ptr + d[None, :], mask=real, other=0.0)
        sign = tl.load(signs_ptr + d).to(tl.float32)
        turned = clamped(rotate_rows(query.to(tl.float32) * sign[None, :], BLOCK_Q, chunk_width(DIM, i), SIZE))
        tl.store(turned_ptr + m[:, None] * DIM + d[None, :], turned.to(turned_ptr.dtype.element_ty), mask=real)


@triton.jit
def step_kernel(
    query_ptr, key_ptr, value_ptr, turned_ptr, cos_ptr, sin_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr,
    value_scale_ptr, key_signs_ptr, value_signs_ptr, lengths_ptr, positions_ptr, table_ptr, stride_qb, stride_qh,
    stride_kb, stride_kh, stride_vb, stride_vh, stride_xb, stride_xh, stride_xt, stride_sb, stride_sh, stride_st,
    stride_yb, stride_yh, stride_yt, stride_zb, stride_zh, stride_zt, num_blocks,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_CODING: tl.constexpr, VALUE_CODING: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr,
    CORRECTED: tl.constexpr, BLOCK_Q: tl.constexpr, ROTARY: tl.constexpr, EARLY: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The new token of a row and head; the second plane of the grid stores values, the third, where there is one,
    rotates queries to ``turned_ptr [rows, heads, DIM]``.  Strides as ``append_kernel``'s."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    length = tl.load(lengths_ptr + row)
    if PAGE == 0:
        place = row.to(tl.int64)
        slot = length.to(tl.int64)
    else:
        place = tl.load(table_ptr + row.to(tl.int64) * num_blocks + length // PAGE).to(tl.int64)
        slot = (length % PAGE).to(tl.int64)
    if tl.program_id(1) == 1:
        step_value(value_ptr + row.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh, value_codes_ptr,
                   value_scale_ptr, value_signs_ptr,
                   place * stride_yb + head.to(tl.int64) * stride_yh + slot * stride_yt,
                   place * stride_zb + head.to(tl.int64) * stride_zh + slot * stride_zt, VALUE_CODING, VALUE_DIM,
                   VALUE_LEVELS, CORRECTED)  # fmt: skip
    else:
        position = length
        if ROTARY:
            position = tl.load(positions_ptr + row)
        query_ptr += row.to(tl.int64) * stride_qb
        if tl.program_id(1) == 0:
            step_key(query_ptr, key_ptr + row.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh, cos_ptr,
                     sin_ptr, key_codes_ptr, key_scale_ptr, key_signs_ptr,
                     place * stride_xb + head.to(tl.int64) * stride_xh + slot * stride_xt,
                     place * stride_sb + head.to(tl.int64) * stride_sh + slot * stride_st, position, head, stride_qh,
                     Q_PER_KV, KEY_CODING, KEY_DIM, KEY_LEVELS, CORRECTED, BLOCK_Q, ROTARY,
                     turned_ptr is None)  # fmt: skip
        elif turned_ptr is not None:
            first = (head * Q_PER_KV).to(tl.int64)
            step_query(query_ptr + first * stride_qh,
                       turned_ptr + (row.to(tl.int64) * (NUM_HEADS * Q_PER_KV) + first) * KEY_DIM, cos_ptr, sin_ptr,
                       key_signs_ptr, position, stride_qh, KEY_DIM, rotation(KEY_CODING, KEY_DIM), Q_PER_KV, BLOCK_Q,
                       ROTARY)  # fmt: skip


def constants(stored: Stored, layout: Layout) -> dict[str, object]:
    """What kernels are told of a layer at compile time.  Raises ``ValueError`` for a bad block table."""
    check(stored)
    page = 0 if stored.block_table is None else stored.key_codes.shape[2]
    return layout_constants(layout) | {"NUM_HEADS": stored.key_codes.shape[1], "PAGE": page}


def product_dtype(query: Tensor) -> torch.dtype:
    """The type in which rotated queries are multiplied."""
    return torch.float32 if query.dtype == torch.float32 else torch.float16


def strides_of(stored: Stored) -> tuple[int, ...]:
    """From row to row or block to block, head to head, token to token: of key codes, key scales, value codes, value
    scales."""
    held = (stored.key_codes, stored.key_scale, stored.value_codes, stored.value_scale)
    return tuple(stride for x in held for stride in x.stride()[:3])


def table_of(stored: Stored) -> tuple[Tensor | None, int | None]:
    """The block table and how many blocks it has a row."""
    table = stored.block_table
    return (None, None) if table is None else (table.contiguous(), table.shape[1])


def line_strides(x: Tensor, starts: Tensor | None) -> tuple[int, ...]:
    """From row to row, head to head, token to token of what comes row by row, or in one line."""
    return tuple(x.stride()[:3]) if starts is None else (0, x.stride(1), x.stride(0))


def append(
    key: Tensor,
    value: Tensor,
    counts: Sequence[int] | Tensor | None,
    stored: Stored,
    layout: Layout,
    starts: Tensor | None = None,
) -> None:
    """Store new tokens behind what each row holds: the tensors are
    :func:`kvruntime.methods.token.reference.append`'s."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    batch_size, heads, length = len(stored.lengths), key.shape[1], key.shape[2 if starts is None else 0]
    if counts is not None and not isinstance(counts, Tensor):
        alike = min(counts, default=0) == length
        counts = None if alike else torch.tensor(counts, dtype=torch.int32).to(key.device, non_blocking=True)
    if not length:
        return
    if fast_store.supports(key, value, stored, layout, starts):
        fast_store.append(key, value, counts, stored, layout)
        return
    table, num_blocks = table_of(stored)
    block = max(1, TILE_ELEMENTS // triton.next_power_of_2(max(layout.key_dim, layout.value_dim)))
    append_kernel[(triton.cdiv(length, block), heads * (batch_size if starts is None else 1), 2)](
        key, value, stored.key_codes, stored.key_scale, stored.value_codes, stored.value_scale, stored.key_signs,
        stored.value_signs, stored.lengths, None if starts is not None else counts, starts, table,
        *line_strides(key, starts), *line_strides(value, starts), *strides_of(stored), length, num_blocks, batch_size,
        **constants(stored, layout), CORRECTED=layout.corrected, BLOCK_T=block,
        BLOCK_B=0 if starts is None else lines.block_b(batch_size), enable_fp_fusion=False, num_warps=NUM_WARPS,
    )  # fmt: skip


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stored: Stored,
    layout: Layout,
    positions: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor | None:
    """The new token of every row to its place: :func:`kvruntime.methods.token.reference.step`, whose tensors these are.

    Channels lie contiguous.  Of codings that rotate, the queries as attention takes them: embedded and rotated,
    contiguous, in the type of the products, and those given are left as they are; else None.
    """
    batch_size, heads = key.shape[:2]
    turned = None
    if rotation(layout.key, layout.key_dim):
        turned = torch.empty(query.shape, dtype=product_dtype(query), device=query.device)
    cos, sin = rotary if rotary is not None else (None, None)
    table, num_blocks = table_of(stored)
    q_per_kv = query.shape[1] // heads
    step_kernel[(batch_size * heads, 2 if turned is None else 3)](
        query, key, value, turned, cos, sin, stored.key_codes, stored.key_scale, stored.value_codes, stored.value_scale,
        stored.key_signs, stored.value_signs, stored.lengths, positions, table, *query.stride()[:2], *key.stride()[:2],
        *value.stride()[:2], *strides_of(stored), num_blocks, **constants(stored, layout), Q_PER_KV=q_per_kv,
        CORRECTED=layout.corrected, BLOCK_Q=triton.next_power_of_2(q_per_kv), ROTARY=rotary is not None,
        EARLY=(early := overlaps(key)), enable_fp_fusion=False, num_warps=1,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return turned
