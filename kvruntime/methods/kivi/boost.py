"""Triton: packing of boosted key channels and of rotated values, and the choice of the channels that are boosted.

The arithmetic is ``pack_boosted``'s and ``pack_symmetric``'s of :mod:`kvruntime.methods.kivi.reference`.  A prompt's
records are packed by programs that share nothing, so ``first_record.order_kernel`` chooses before them.
A step packs one record, by the program that chooses first where it is the row's first.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kvruntime.kernels.hadamard import rotated_tokens, sum_of_squares
from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.quantize import (
    LIMIT,
    ROUND,
    ROUND_BITS,
    exact_at,
    finite,
    inverse_of,
    load_tokens,
    store_codes,
)
from kvruntime.methods.kivi.words import at_once, boosted_channels, chunks, value_param_offset


@triton.constexpr_function
def step_of(nbits):
    """The step of rotated values of ``nbits``, in deviations."""
    return reference.STEPS[nbits]


@triton.jit
def choose_order(exact_ptr, new_ptr, order_ptr, first, length, count, stride_new_t, pages, NEW: tl.constexpr,
                 DIM: tl.constexpr, WIDTH: tl.constexpr, RECORD: tl.constexpr, SINK: tl.constexpr,
                 RESIDUAL: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """``order_ptr [DIM]`` of a head from its record that begins with token ``first``;
    ``WIDTH`` is ``DIM`` to a power of two.  What lies there before are the weights of ranges (``channel_weights``).

    The range that as many channels reach as are boosted is found bit by bit: ranges are not negative, so that their
    bits are in their order."""
    BOOSTED: tl.constexpr = boosted_channels(DIM)
    d = tl.arange(0, WIDTH)
    real = d < DIM
    low = tl.full([WIDTH], LIMIT, tl.float32)
    high = tl.full([WIDTH], -LIMIT, tl.float32)
    for begin in range(0, RECORD, 16):
        token = first + begin + tl.arange(0, 16)
        x = load_tokens(exact_ptr, new_ptr, token, d, real[None, :], length, count, stride_new_t, pages, NEW, DIM, SINK,
                        RESIDUAL, PAGE)  # fmt: skip
        x = finite(x)[0]
        low = tl.minimum(low, tl.min(x, 0))
        high = tl.maximum(high, tl.max(x, 0))
    code = tl.load(order_ptr + d, mask=real, other=0).to(tl.int32)
    weight = (8 + (code & 7)).to(tl.float32) * ((127 + (code >> 3)) << 23).to(tl.float32, bitcast=True)
    span = tl.where(real, ((high - low) * weight).to(tl.int32, bitcast=True), -1)
    least = tl.zeros([], tl.int32)
    for bit in range(31):
        more = least | (1 << (30 - bit))
        least = tl.where(tl.sum((span >= more).to(tl.int32), 0) >= BOOSTED, more, least)
    above = (span > least).to(tl.int32)
    equal = (span == least).to(tl.int32)
    wide = (above == 1) | ((equal == 1) & (tl.cumsum(equal, 0) <= BOOSTED - tl.sum(above, 0)))
    number = wide.to(tl.int32)
    place = tl.where(wide, tl.cumsum(number, 0) - 1, BOOSTED + d - tl.cumsum(number, 0))
    tl.store(order_ptr + place, d.to(tl.uint8), mask=real)


@triton.jit
def boosted_params(low, high, has_nan, factor, NBITS: tl.constexpr):
    """``(float16 scale, zero, inverse of a long code's step, the highest long code)``."""
    top = factor * (1 << NBITS) - 1.0
    scale = tl.div_rn(high - low, top / factor).to(tl.float16)
    nan = tl.full(scale.shape, float("nan"), tl.float16)
    scale = tl.where(has_nan, nan, scale)
    return scale, tl.where(has_nan, nan, low.to(tl.float16)), inverse_of(scale) * factor, top


@triton.jit
def long_codes(x, is_nan, inverse, zero, top):
    """Long codes (int32), rounding half to even."""
    level = (x - zero.to(tl.float32)) * inverse
    level = tl.where(level == level, level, 0.0)
    level = tl.minimum(tl.maximum(level, 0.0), top)
    return tl.where(is_nan, 0, (level + ROUND).to(tl.int32, bitcast=True) - ROUND_BITS)


@triton.jit
def pack_boosted_keys(exact_ptr, new_ptr, record_ptr, order_ptr, first, length, count, stride_new_t, pages,
                      NEW: tl.constexpr, C0: tl.constexpr, W: tl.constexpr, DIM: tl.constexpr, NBITS: tl.constexpr,
                      BOOST: tl.constexpr, LOWER: tl.constexpr, GROUP: tl.constexpr, RECORD: tl.constexpr,
                      TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, PAGE: tl.constexpr,
                      PARAMS: tl.constexpr, BOOST_CODES: tl.constexpr, MOST: tl.constexpr):  # fmt: skip
    """One chunk of a record's key channels in the row's order: upper bits, scales and zeros, or with ``LOWER`` the
    lower bits of the boosted channels, which the chunk then is."""
    TILE_WORDS: tl.constexpr = TILE * W * BOOST // 32 if LOWER else TILE * DIM * NBITS // 32
    words_ptr = record_ptr + (BOOST_CODES if LOWER else 0)
    half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True) + 2 * PARAMS
    TOKENS: tl.constexpr = at_once("key", TILE, W, BOOST if LOWER else NBITS, MOST)
    t = tl.arange(0, TOKENS)
    d = C0 + tl.arange(0, W)
    channel = tl.load(order_ptr + d).to(tl.int32)
    factor = tl.where(d < boosted_channels(DIM), 1.0 * (1 << BOOST), 1.0)
    shift = tl.where(d < boosted_channels(DIM), BOOST, 0)
    everything = t[:, None] >= 0
    SPAN: tl.constexpr = GROUP if GROUP > TOKENS else TOKENS
    GROUPS: tl.constexpr = SPAN // GROUP  # of tokens at once
    TURNS: tl.constexpr = TILE // TOKENS
    for span in range(RECORD // SPAN):
        low = tl.full([GROUPS, W], LIMIT, tl.float32)
        high = tl.full([GROUPS, W], -LIMIT, tl.float32)
        nans = tl.zeros([GROUPS, W], tl.int32)
        for turn in range(SPAN // TOKENS):
            x = load_tokens(exact_ptr, new_ptr, first + span * SPAN + turn * TOKENS + t, channel, everything, length,
                            count, stride_new_t, pages, NEW, DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
            x, is_nan = finite(x)
            x = tl.reshape(x, (GROUPS, TOKENS // GROUPS, W))
            low = tl.minimum(low, tl.min(x, 1))
            high = tl.maximum(high, tl.max(x, 1))
            nans = tl.maximum(nans, tl.max(tl.reshape(is_nan.to(tl.int32), (GROUPS, TOKENS // GROUPS, W)), 1))
        scale, zero, inverse, top = boosted_params(low, high, nans > 0, factor[None, :], NBITS)
        if not LOWER:
            at = (span * GROUPS + tl.arange(0, GROUPS))[:, None] * DIM + d[None, :]
            tl.store(half_ptr + at, scale)
            tl.store(half_ptr + at + RECORD // GROUP * DIM, zero)
        for turn in range(SPAN // TOKENS):
            x = load_tokens(exact_ptr, new_ptr, first + span * SPAN + turn * TOKENS + t, channel, everything, length,
                            count, stride_new_t, pages, NEW, DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
            x, is_nan = finite(x)
            x = tl.reshape(x, (GROUPS, TOKENS // GROUPS, W))
            is_nan = tl.reshape(is_nan, (GROUPS, TOKENS // GROUPS, W))
            codes = tl.reshape(
                long_codes(x, is_nan, inverse[:, None, :], zero[:, None, :], top[:, None, :]), (TOKENS, W)
            )
            now = span * (SPAN // TOKENS) + turn
            tile_ptr = words_ptr + now // TURNS * TILE_WORDS
            if LOWER:
                store_codes(tile_ptr, codes & ((1 << BOOST) - 1), "key", TILE, 0, W, BOOST, now % TURNS)
            else:
                store_codes(tile_ptr, codes >> shift[None, :], "key", TILE, C0, W, NBITS, now % TURNS)


@triton.jit
def load_rotated(exact_ptr, new_ptr, token, channel, length, stride_new_t, pages, NEW: tl.constexpr, N: tl.constexpr,
                 WIDTH: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr,
                 PAGE: tl.constexpr):  # fmt: skip
    """Tokens at whole rotations of channels, float32 ``[N, WIDTH]`` as exact slots hold them:
    new ones are rotated here."""
    stored = token < length
    at = exact_at(token, stored, pages, DIM, SINK, RESIDUAL, PAGE)
    x = tl.load(exact_ptr + at[:, None] + channel[None, :], mask=stored[:, None], other=0.0).to(tl.float32)
    if NEW:
        new_at = (token - length)[:, None] * stride_new_t + channel[None, :]
        y = tl.load(new_ptr + new_at, mask=~stored[:, None], other=0.0).to(tl.float32)
        y = rotated_tokens(y, exact_ptr.dtype.element_ty, N, WIDTH, SIZE, LIMIT)
        x = tl.where(stored[:, None], x, y.to(tl.float32))
    return x


@triton.jit
def pack_rotated_values(exact_ptr, new_ptr, words_ptr, half_ptr, first, length, stride_new_t, pages, NEW: tl.constexpr,
                        DIM: tl.constexpr, NBITS: tl.constexpr, SIZE: tl.constexpr, RECORD: tl.constexpr,
                        TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, PAGE: tl.constexpr,
                        MOST: tl.constexpr):  # fmt: skip
    """A record's values, tile after tile: a scale a token, codes around zero."""
    CHUNKS: tl.constexpr = chunks(DIM)
    TOKENS: tl.constexpr = at_once("value", TILE, DIM, NBITS, MOST) if len(CHUNKS) == 1 else TILE
    TURNS: tl.constexpr = TILE // TOKENS
    t = tl.arange(0, TOKENS)
    for turn in range(RECORD // TOKENS):
        token = first + turn * TOKENS + t
        tiles = ()
        squares = tl.zeros([TOKENS], tl.float32)
        for i in tl.static_range(len(CHUNKS)):
            d = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
            x = load_rotated(exact_ptr, new_ptr, token, d, length, stride_new_t, pages, NEW, TOKENS, CHUNKS[i][1], SIZE,
                             DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
            squares += sum_of_squares(x, TOKENS, CHUNKS[i][1])
            tiles = tiles + (x,)  # type: ignore[assignment]
        scale = (tl.sqrt_rn(squares * (1 / DIM)) * step_of(NBITS)).to(tl.float16)
        scale = tl.where(squares == squares, scale, tl.full(scale.shape, float("nan"), tl.float16))
        tl.store(half_ptr + value_param_offset(0, turn * TOKENS + t, RECORD), scale)
        inverse = inverse_of(scale)[:, None]
        for i in tl.static_range(len(CHUNKS)):
            level = tl.floor(tiles[i] * inverse) + 1.0 * (1 << (NBITS - 1))
            level = tl.where(level == level, level, 0.0)
            codes = tl.minimum(tl.maximum(level, 0.0), 1.0 * ((1 << NBITS) - 1)).to(tl.int32)
            tile_ptr = words_ptr + turn // TURNS * (TILE * DIM * NBITS // 32)
            store_codes(tile_ptr, codes, "value", TILE, CHUNKS[i][0], CHUNKS[i][1], NBITS, turn % TURNS)
