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
from kvruntime.methods.kivi.pack_words import bias, load_direct, word_runs
from kvruntime.methods.kivi.quantize import (
    INTERPRETED,
    LIMIT,
    ROUND,
    finite,
    greater,
    greatest,
    inverse_of,
    least,
    lesser,
    load_tokens,
    store_codes,
    within,
)
from kvruntime.methods.kivi.words import (
    at_once,
    boosted_channels,
    chunks,
    next_power_of_2,
    planes,
    value_param_offset,
    word_offset,
    words_before,
)


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
def is_boosted(order_ptr, DIM: tl.constexpr, WIDTH: tl.constexpr):
    """Whether channel ``[WIDTH]`` of a head is boosted."""
    first = tl.load(order_ptr + tl.arange(0, boosted_channels(DIM))).to(tl.int32)[None, :]
    group = tl.arange(0, WIDTH // 16)[:, None]
    bits = tl.sum(tl.where(first // 16 == group, 1 << first % 16, 0), 1)
    return tl.reshape((bits[:, None] >> tl.arange(0, 16)[None, :]) & 1, (WIDTH,)) == 1


@triton.jit
def boosted_params(low, high, wide, NBITS: tl.constexpr, BOOST: tl.constexpr):
    """``(float16 scale, zero, inverse of a long code's step, the highest long code)`` of groups with the given range,
    NaN where one is among them; codes are long where channels are ``wide``."""
    low, has_nan = finite(low.to(tl.float32))
    high = finite(high.to(tl.float32))[0]
    factor = tl.where(wide, 1.0 * (1 << BOOST), 1.0)[None, :]
    top = factor * (1 << NBITS) - 1.0
    scale = tl.div_rn(high - low, top / factor).to(tl.float16)
    nan = tl.full(scale.shape, float("nan"), tl.float16)
    scale = tl.where(has_nan, nan, scale)
    return scale, tl.where(has_nan, nan, low.to(tl.float16)), inverse_of(scale) * factor, top


@triton.jit
def in_order(x, order_ptr, C0: tl.constexpr, W: tl.constexpr):
    """``x [N, channels]`` at ``W`` of the row's places, from place ``C0`` on."""
    channel = tl.load(order_ptr + C0 + tl.arange(0, W)).to(tl.int32)[None, :]
    return tl.gather(x, tl.broadcast_to(channel, (x.shape[0], W)), 1)


@triton.jit
def fours_of(x, inverse, zero, top, wide, TILE: tl.constexpr, BOOST: tl.constexpr):
    """Long codes of ``x [TILE, W]``, four to a word: int32 ``[TILE / 4, W]``, whose byte ``j`` is of token
    ``TILE / 4 * j`` + row.  Channels that are not boosted have ``BOOST`` lower bits of 0."""
    W: tl.constexpr = x.shape[1]
    level = tl.reshape(within(x).to(tl.float32), (zero.shape[0], TILE // zero.shape[0], W))
    level = (level - zero.to(tl.float32)[:, None, :]) * inverse[:, None, :]
    if INTERPRETED:
        level = tl.where(level == level, level, 0.0)
    level = tl.minimum(tl.maximum(level, 0.0), top[:, None, :])  # of 0 and NaN a device takes 0
    code = tl.reshape((level + ROUND).to(tl.int32, bitcast=True), (4, TILE // 4, W))
    fours = tl.sum(code << (8 * tl.arange(0, 4))[:, None, None], 0) - bias(8)
    return tl.where(wide[None, :], fours, fours << BOOST)


@triton.constexpr_function
def fields_of(width, bits):
    """Of a word of a plane of keys: its channel pairs in a byte, its channel pairs, its tokens."""
    pairs = min(16 // bits, width // 8)
    return min(8 // bits, pairs), pairs, 16 // bits // pairs


@triton.jit
def store_plane_of_fours(words_ptr, fours, TILE: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr):
    """One tile's words of a chunk of channels and a plane: ``BITS`` bits from bit ``LOW`` of codes (:func:`fours_of`).

    The channels that share a byte are put together in all four codes at once, before these part."""
    W: tl.constexpr = fours.shape[1]
    FIELDS: tl.constexpr = fields_of(W, BITS)
    IN_BYTE: tl.constexpr = FIELDS[0]
    PAIRS: tl.constexpr = FIELDS[1]
    TOKENS: tl.constexpr = FIELDS[2]
    MASK: tl.constexpr = 0x01010101 * ((1 << BITS) - 1)
    x = tl.reshape((fours >> LOW) & MASK, (TILE // 4, W // (2 * IN_BYTE), IN_BYTE, 2))
    x = tl.sum(x << (BITS * tl.arange(0, IN_BYTE))[None, None, :, None], 2)
    x = (x[None, :, :, :] >> (8 * tl.arange(0, 4))[:, None, None, None]) & 255
    x = tl.reshape(x, (TILE // 8 // TOKENS, TOKENS, 8, W // 2 // PAIRS, PAIRS // IN_BYTE, 2))
    byte = BITS * IN_BYTE * tl.arange(0, PAIRS // IN_BYTE)[:, None] + 16 * tl.arange(0, 2)[None, :]
    x = tl.sum(tl.sum(x << byte[None, None, None, None, :, :], 5), 4)
    x = tl.sum(x << (BITS * PAIRS * tl.arange(0, TOKENS))[None, :, None, None], 1)
    token = tl.arange(0, TILE // 8 // TOKENS)[:, None] * (8 * TOKENS) + tl.arange(0, 8)[None, :]
    at = word_offset(token, word_runs("key", TILE, W, BITS, False))
    by_channel = word_offset(tl.arange(0, W // 2 // PAIRS) * (2 * PAIRS), word_runs("key", TILE, W, BITS, True))
    tl.store(words_ptr + at[:, :, None] + by_channel[None, None, :], x)


@triton.jit
def store_fours(words_ptr, fours, TILE: tl.constexpr, CHANNEL: tl.constexpr, NBITS: tl.constexpr,
                LOWEST: tl.constexpr):  # fmt: skip
    """One tile's words of the chunk at ``CHANNEL``: ``NBITS`` bits from bit ``LOWEST`` of codes, plane after plane."""
    W: tl.constexpr = fours.shape[1]
    PLANE_LIST: tl.constexpr = planes(NBITS)
    for i in tl.static_range(len(PLANE_LIST)):
        plane_ptr = words_ptr + words_before(TILE, CHANNEL, NBITS, W, PLANE_LIST[i][1])
        store_plane_of_fours(plane_ptr, fours, TILE, PLANE_LIST[i][0], LOWEST + PLANE_LIST[i][1])


@triton.jit
def pack_boosted_keys(exact_ptr, new_ptr, record_ptr, order_ptr, first, length, stride_new_t, pages, NEW: tl.constexpr,
                      DIM: tl.constexpr, NBITS: tl.constexpr, BOOST: tl.constexpr, GROUP: tl.constexpr,
                      RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr,
                      PAGE: tl.constexpr, PARAMS: tl.constexpr, BOOST_CODES: tl.constexpr):  # fmt: skip
    """A record's keys, a tile at a time: loaded and coded in the channels' own order, and put in the row's four codes
    at once.  Groups of more than a tile are loaded twice, for their ranges and for their codes."""
    WIDTH: tl.constexpr = next_power_of_2(DIM)
    BOOSTED: tl.constexpr = boosted_channels(DIM)
    CHUNKS: tl.constexpr = chunks(DIM)
    SPAN: tl.constexpr = GROUP if GROUP > TILE else TILE
    GROUPS: tl.constexpr = SPAN // GROUP
    half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True) + 2 * PARAMS
    t = tl.arange(0, TILE)[:, None]
    d = tl.arange(0, WIDTH)
    if WIDTH > DIM:  # channels that there are not have no place: others are loaded for them
        d = tl.max_contiguous(tl.multiple_of(tl.where(d < DIM, d, d - DIM), 16), 16)
    d = d[None, :]
    wide = is_boosted(order_ptr, DIM, WIDTH)
    for span in range(RECORD // SPAN):
        x = load_direct(exact_ptr, new_ptr, first + span * SPAN, t, d, length, stride_new_t, pages, NEW, DIM, SINK,
                        RESIDUAL, PAGE)  # fmt: skip
        y = tl.reshape(x, (GROUPS, TILE // GROUPS, WIDTH))
        low = least(y, 1)
        high = greatest(y, 1)
        for turn in range(1, SPAN // TILE):
            x = load_direct(exact_ptr, new_ptr, first + span * SPAN + turn * TILE, t, d, length, stride_new_t, pages,
                            NEW, DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
            low = lesser(low, least(x, 0)[None, :])
            high = greater(high, greatest(x, 0)[None, :])
        scale, zero, inverse, top = boosted_params(low, high, wide, NBITS, BOOST)
        both = scale.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        both |= zero.to(tl.int16, bitcast=True).to(tl.int32) << 16
        for i in tl.static_range(len(CHUNKS)):
            params = in_order(both, order_ptr, CHUNKS[i][0], CHUNKS[i][1])
            at = (span * GROUPS + tl.arange(0, GROUPS))[:, None] * DIM + (CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1]))
            tl.store(half_ptr + at, params.to(tl.int16).to(tl.float16, bitcast=True))
            tl.store(half_ptr + at + RECORD // GROUP * DIM, (params >> 16).to(tl.int16).to(tl.float16, bitcast=True))
        for turn in range(SPAN // TILE):
            if SPAN > TILE:
                x = load_direct(exact_ptr, new_ptr, first + span * SPAN + turn * TILE, t, d, length, stride_new_t,
                                pages, NEW, DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
            fours = fours_of(x, inverse, zero, top, wide, TILE, BOOST)
            tile = span * (SPAN // TILE) + turn
            for i in tl.static_range(len(CHUNKS)):
                upper = in_order(fours, order_ptr, CHUNKS[i][0], CHUNKS[i][1])
                store_fours(record_ptr + tile * (TILE * DIM * NBITS // 32), upper, TILE, CHUNKS[i][0], NBITS, BOOST)
            lower = in_order(fours, order_ptr, 0, BOOSTED)
            store_fours(record_ptr + BOOST_CODES + tile * (TILE * BOOSTED * BOOST // 32), lower, TILE, 0, BOOST, 0)


@triton.jit
def load_rotated(exact_ptr, new_ptr, first, token, channel, length, stride_new_t, pages, NEW: tl.constexpr,
                 N: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, DIM: tl.constexpr, SINK: tl.constexpr,
                 RESIDUAL: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Tokens ``first + token`` at whole rotations of channels, float32 ``[N, WIDTH]`` as exact slots hold them:
    new ones are rotated here."""
    x = load_direct(exact_ptr, new_ptr, first, token[:, None], channel[None, :], length, stride_new_t, pages, NEW, DIM,
                    SINK, RESIDUAL, PAGE).to(tl.float32)  # fmt: skip
    if NEW:
        y = rotated_tokens(x, exact_ptr.dtype.element_ty, N, WIDTH, SIZE, LIMIT)
        x = tl.where((first + token < length)[:, None], x, y.to(tl.float32))
    return x


@triton.jit
def centred(x, inverse, NBITS: tl.constexpr):
    """Codes around zero of ``x`` (int32, in the lowest ``NBITS`` bits): adding 1.5 * 2**23 and rounding down leaves no
    fraction bits."""
    HALF: tl.constexpr = 1.0 * (1 << (NBITS - 1))
    level = x * inverse
    if INTERPRETED:
        level = tl.where(level == level, level, -HALF)
    level = tl.minimum(tl.maximum(level, -HALF), HALF - 1.0)  # of the least and NaN a device takes the least
    if INTERPRETED:
        return (tl.floor(level) + HALF).to(tl.int32)
    level = tl.inline_asm_elementwise("add.rm.f32 $0, $1, $2;", "=f,f,f", [level, tl.full(level.shape, ROUND + HALF,
                                      tl.float32)], dtype=tl.float32, is_pure=True, pack=1)  # fmt: skip
    return level.to(tl.int32, bitcast=True)


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
        tiles = ()
        squares = tl.zeros([TOKENS], tl.float32)
        for i in tl.static_range(len(CHUNKS)):
            d = CHUNKS[i][0] + tl.arange(0, CHUNKS[i][1])
            x = load_rotated(exact_ptr, new_ptr, first + turn * TOKENS, t, d, length, stride_new_t, pages, NEW, TOKENS,
                             CHUNKS[i][1], SIZE, DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
            squares += sum_of_squares(x, TOKENS, CHUNKS[i][1])
            tiles = tiles + (x,)  # type: ignore[assignment]
        scale = (tl.sqrt_rn(squares * (1 / DIM)) * step_of(NBITS)).to(tl.float16)
        scale = tl.where(squares == squares, scale, tl.full(scale.shape, float("nan"), tl.float16))
        tl.store(half_ptr + value_param_offset(0, turn * TOKENS + t, RECORD), scale)
        inverse = inverse_of(scale)[:, None]
        for i in tl.static_range(len(CHUNKS)):
            codes = centred(tiles[i], inverse, NBITS)
            tile_ptr = words_ptr + turn // TURNS * (TILE * DIM * NBITS // 32)
            store_codes(tile_ptr, codes, "value", TILE, CHUNKS[i][0], CHUNKS[i][1], NBITS, turn % TURNS)
