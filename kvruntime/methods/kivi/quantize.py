"""Triton: a group's scale and zero, codes and their words, and the tokens that they are made of."""

from __future__ import annotations

import triton
import triton.language as tl

from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.words import field_bits, order_axes, planes, words_before

LIMIT = tl.constexpr(reference.LIMIT)
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23, whose float32 bits are
ROUND_BITS = tl.constexpr(0x4B400000)
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
"""The interpreter's tl.maximum keeps a NaN that a device's drops,
its reductions are quick for tl.min and tl.max alone."""


@triton.jit
def scale_zero(low, high, has_nan, LEVELS: tl.constexpr):
    """float16 scale and zero of groups with the given finite range."""
    span = high - low
    if INTERPRETED:  # its fma rounds twice
        scale = tl.div_rn(span, tl.full(low.shape, LEVELS, tl.float32))
    else:  # the same, correctly rounded, from the rounded reciprocal and what it leaves over
        near = span * (1 / LEVELS)
        scale = tl.fma(tl.fma(near, -LEVELS, span), 1 / LEVELS, near)
    scale = scale.to(tl.float16)
    nan = tl.full(low.shape, float("nan"), tl.float16)
    return tl.where(has_nan, nan, scale), tl.where(has_nan, nan, low.to(tl.float16))


@triton.jit
def inverse_of(scale):
    """``1 / scale`` in float32, correctly rounded; 0 where the scale is 0 or NaN."""
    scale = scale.to(tl.float32)
    usable = scale > 0
    scale = tl.where(usable, scale, 1.0)
    if INTERPRETED:
        inverse = tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), scale)
    else:  # the same: a reciprocal of 11 bits lies 2**-36 off any tie, and one step from 2 ulp leaves 2**-43
        near = 1.0 / scale
        inverse = tl.fma(near, tl.fma(-scale, near, 1.0), near)
    return tl.where(usable, inverse, 0.0)


@triton.jit
def rounded(x, inverse, zero, LEVELS: tl.constexpr):
    """``ROUND_BITS`` + the codes of ``x`` (int32), rounding half to even:
    adding 1.5 * 2**23 leaves no fraction bits."""
    level = (x.to(tl.float32) - zero.to(tl.float32)) * inverse
    if INTERPRETED:
        level = tl.where(level == level, level, 0.0)
    level = tl.minimum(tl.maximum(level, 0.0), LEVELS)  # of 0 and NaN a device takes 0
    return (level + ROUND).to(tl.int32, bitcast=True)


@triton.jit
def encode(x, inverse, zero, LEVELS: tl.constexpr):
    """Codes of ``x`` (int32)."""
    return rounded(x, inverse, zero, LEVELS) - ROUND_BITS


@triton.jit
def lesser(a, b):
    return tl.minimum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def greater(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def least(x, AXIS: tl.constexpr):
    """Minimum along an axis; a NaN wins."""
    if INTERPRETED:
        has_nan = tl.max((x != x).to(tl.int32), AXIS) > 0
        return tl.where(has_nan, float("nan"), tl.min(tl.where(x == x, x, 0.0).to(tl.float32), AXIS))
    if x.dtype == tl.bfloat16:  # tl.minimum gives float32 for it
        x = x.to(tl.float32)
    return tl.reduce(x, AXIS, lesser)


@triton.jit
def greatest(x, AXIS: tl.constexpr):
    """Maximum along an axis, of no meaning where there is a NaN."""
    if INTERPRETED:
        return tl.max(tl.where(x == x, x, 0.0).to(tl.float32), AXIS)
    if x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
    return tl.reduce(x, AXIS, greater)


@triton.jit
def range_params(low, high, LEVELS: tl.constexpr):
    """float16 scale and zero of groups with the given range, NaN where one is among them."""
    low, has_nan = finite(low.to(tl.float32))
    return scale_zero(low, finite(high.to(tl.float32))[0], has_nan, LEVELS)


@triton.jit
def within(x):
    """float32 values clamped as :func:`finite` does.  16-bit ones need not be: beyond LIMIT their code is 0 or the
    highest, because a group that reaches LIMIT spans 16 at least, and its scale is no coarser than its codes."""
    if x.dtype == tl.float32:
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -LIMIT), LIMIT), x)
    return x


@triton.jit
def finite(x):
    """``(x clamped to +-LIMIT, whether it is NaN)``."""
    is_nan = x != x
    return tl.minimum(tl.maximum(tl.where(is_nan, 0.0, x), -LIMIT), LIMIT), is_nan


@triton.jit
def exact_at(token, wanted, pages, DIM: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, PAGE: tl.constexpr):
    """Where a head's exact tokens lie, in elements: in a ring, or where there are ``pages`` (the row's table, strides
    from page to page and token to token) in a pool's, which are looked up where ``wanted``."""
    if PAGE == 0:
        at = (SINK + (token - SINK) % RESIDUAL) * DIM
    else:
        page = tl.load(pages[0] + token // PAGE, mask=wanted, other=0)
        at = page.to(tl.int64) * pages[1] + token % PAGE * pages[2]
    return at


@triton.jit
def new_tokens(row, counts_ptr, new_length):
    """How many tokens a row brings."""
    count = new_length
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    return count


@triton.jit
def load_tokens(exact_ptr, new_ptr, token, channel, mask, length, count, stride_new_t, pages, NEW: tl.constexpr,
                DIM: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Tokens ``token`` (of the row) at ``channel``, float32 ``[tokens, channels]``:
    stored ones from the ring or the pool."""
    stored = token < length
    at = exact_at(token, stored, pages, DIM, SINK, RESIDUAL, PAGE)
    x = tl.load(exact_ptr + at[:, None] + channel[None, :], mask=mask & stored[:, None], other=0.0).to(tl.float32)
    if NEW:
        y = tl.load(
            new_ptr + (token - length)[:, None] * stride_new_t + channel[None, :],
            mask=mask & ~stored[:, None],
            other=0.0,
        )
        x = tl.where(stored[:, None], x, y.to(tl.float32))
    return x


@triton.jit
def store_plane(words_ptr, codes, turn, STREAM: tl.constexpr, TILE: tl.constexpr, CHANNEL: tl.constexpr,
                WIDTH: tl.constexpr, NBITS: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr):  # fmt: skip
    TOKENS: tl.constexpr = codes.shape[0]
    AXES: tl.constexpr = order_axes(STREAM, TOKENS, WIDTH, BITS, 0)
    FIELD_BITS: tl.constexpr = field_bits(BITS)
    plane = tl.permute(tl.reshape((codes >> LOW) & ((1 << BITS) - 1), AXES[0]), AXES[1])
    # The two half words, then field by field.  Not tl.sum of shifted codes: over a permuted axis Triton 3.6 adds up the
    # wrong ones on a device (values at 4 and 8 bits, and at 2 bits with 128 channels), though not in the interpreter.
    even, odd = tl.split(tl.reshape(plane, (TOKENS * WIDTH // 2, 2)))
    word = even | (odd << 16)
    for i in tl.static_range(FIELD_BITS):
        even, odd = tl.split(tl.reshape(word, (TOKENS * WIDTH >> (i + 2), 2)))
        word = even | (odd << (BITS << i))
    WORDS: tl.constexpr = TOKENS * WIDTH * BITS // 32
    at = words_before(TILE, CHANNEL, NBITS, WIDTH, LOW) + turn * WORDS + tl.arange(0, WORDS)
    tl.store(words_ptr + at, word)


@triton.jit
def store_codes(words_ptr, codes, STREAM: tl.constexpr, TILE: tl.constexpr, CHANNEL: tl.constexpr, WIDTH: tl.constexpr,
                NBITS: tl.constexpr, turn=0):  # fmt: skip
    """One tile's codes ``[TILE, WIDTH]`` to their words, or those of the tokens whose ``turn`` it is
    (:func:`kvruntime.methods.kivi.words.at_once`)."""
    PLANE_LIST: tl.constexpr = planes(NBITS)
    for i in tl.static_range(len(PLANE_LIST)):
        store_plane(words_ptr, codes, turn, STREAM, TILE, CHANNEL, WIDTH, NBITS, PLANE_LIST[i][0], PLANE_LIST[i][1])
