"""Triton: parts of a record whose codes are made in the order of their words, so that nothing is permuted."""

from __future__ import annotations

import triton
import triton.language as tl

from kvruntime.methods.kivi.quantize import (
    ROUND_BITS,
    exact_at,
    greatest,
    inverse_of,
    least,
    range_params,
    rounded,
    within,
)
from kvruntime.methods.kivi.words import tile_order, value_param_offset, word_offset
from kvsim.methods.packing import PLANES


@triton.constexpr_function
def direct(dim, nbits, group, other=0):
    """Whether codes are made in the order of their words, as :func:`pack_key_part` and :func:`pack_value_part` do: of
    no ``other`` keys or values, boosted or rotated, are they."""
    if other:
        return False
    powers = dim & (dim - 1) == 0 and group & (group - 1) == 0
    return powers and len(PLANES[nbits]) == 1 and dim * nbits >= 128 and group <= 64 * nbits


@triton.constexpr_function
def key_part(record_length, dim, group, size):
    """``(tokens, channels)`` of a part of ``size`` keys: whole groups of ``group`` tokens,
    whole rows where they fit."""
    tokens = max(group, value_part(record_length, dim, size))
    return tokens, min(dim, size // tokens)


@triton.constexpr_function
def value_part(record_length, dim, size):
    """Tokens of a part of ``size`` values, 16 or more: whole rows."""
    return min(record_length & -record_length, max(16, size // dim))


@triton.constexpr_function
def num_key_parts(record_length, dim, nbits, group, size, other=0):
    tokens, channels = key_part(record_length, dim, group, size)
    return record_length // tokens * (dim // channels) if direct(dim, nbits, group, other) else 1


@triton.constexpr_function
def num_value_parts(record_length, dim, nbits, group, size, other=0):
    return record_length // value_part(record_length, dim, size) if direct(dim, nbits, group, other) else 1


@triton.constexpr_function
def word_runs(stream, tile, width, bits, channels):
    """How a channel's index (``channels``) or a token's moves its code's word:
    ``((lowest index bit, mask, words a step), ...)``.

    Index bits that choose the code inside the word are left out.
    """
    order = tile_order(stream, tile, width, bits)
    low, high = (1, width) if channels else (width, tile * width)
    runs, place = [], 1  # of token * width + channel
    for i in reversed(order.to_logical):
        size, words = order.memory_shape[i], 1
        for inner in order.memory_shape[i + 1 :]:
            words *= inner
        words //= order.codes_per_word
        if low <= place < high and words:
            bit = (place // low).bit_length() - 1
            if runs and runs[-1][0] + runs[-1][1].bit_length() == bit and (runs[-1][1] + 1) * runs[-1][2] == words:
                runs[-1] = (runs[-1][0], (runs[-1][1] + 1) * size - 1, runs[-1][2])
            else:
                runs.append((bit, size - 1, words))
        place *= size
    return tuple(runs)


@triton.constexpr_function
def bias(nbits):
    """What a word of :func:`kvruntime.methods.kivi.quantize.rounded` codes holds too much, as int32."""
    word = sum(ROUND_BITS.value << shift for shift in range(0, 32, nbits)) % 2**32
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def load_direct(exact_ptr, new_ptr, first, token, channel, length, stride_new_t, pages, NEW: tl.constexpr,
                DIM: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Tokens ``first + token`` of the row at ``channel``, ``[N, 1]`` and ``[N or 1, C]``, as they are held (float32,
    where the ring and the new tokens are not alike)."""
    position = first + token
    ring_ptr = exact_ptr + exact_at(position, position < length, pages, DIM, SINK, RESIDUAL, PAGE)
    if not NEW:
        x = tl.load(ring_ptr + channel)
    else:
        token_ptr = new_ptr + (first - length).to(tl.int64) * stride_new_t + token * stride_new_t
        if exact_ptr.dtype == new_ptr.dtype:
            x = tl.load(tl.where(position < length, ring_ptr + channel, token_ptr + channel))
        else:
            x = tl.load(ring_ptr + channel, mask=position < length, other=0.0).to(tl.float32)
            y = tl.load(token_ptr + channel, mask=position >= length, other=0.0).to(tl.float32)
            x = tl.where(position < length, x, y)
    return x


@triton.jit
def pack_key_part(exact_ptr, new_ptr, record_ptr, params_ptr, part, first, length, stride_new_t, zero_offset, pages,
                  NEW: tl.constexpr, DIM: tl.constexpr, NBITS: tl.constexpr, GROUP: tl.constexpr, RECORD: tl.constexpr,
                  TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, PAGE: tl.constexpr,
                  PARAMS: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Some of a record's tokens, some of their channels: a word holds consecutive channels of one token."""
    LEVELS: tl.constexpr = 2.0**NBITS - 1
    SHAPE: tl.constexpr = key_part(RECORD, DIM, GROUP, SIZE)
    TOKENS: tl.constexpr = SHAPE[0]
    WIDTH: tl.constexpr = SHAPE[1]
    FIELDS: tl.constexpr = 32 // NBITS
    half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True) + 2 * PARAMS
    t = part // (DIM // WIDTH) * TOKENS
    c = part % (DIM // WIDTH) * WIDTH
    d = c + tl.arange(0, WIDTH)
    x = load_direct(exact_ptr, new_ptr, first + t, tl.arange(0, TOKENS)[:, None], d[None, :], length, stride_new_t,
                    pages, NEW, DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
    if GROUP == 0:
        scale = tl.load(params_ptr + d)[None, :]
        zero = tl.load(params_ptr + zero_offset + d)[None, :]
    else:
        x = tl.reshape(x, (TOKENS // GROUP, GROUP, WIDTH))
        scale, zero = range_params(least(x, 1), greatest(x, 1), LEVELS)
        at = (t // GROUP + tl.arange(0, TOKENS // GROUP))[:, None] * DIM + d[None, :]
        tl.store(half_ptr + at, scale)
        tl.store(half_ptr + at + RECORD // GROUP * DIM, zero)
        scale = scale[:, None, :]
        zero = zero[:, None, :]
    IN_LANE: tl.constexpr = min(FIELDS, 8)  # a 16-byte load: their shifts are constants
    LANES: tl.constexpr = FIELDS // IN_LANE
    code = tl.reshape(rounded(within(x), inverse_of(scale), zero, LEVELS), (TOKENS, WIDTH // IN_LANE, IN_LANE))
    field = tl.arange(0, IN_LANE)
    word = tl.sum(code << (field // 2 * NBITS + field % 2 * 16)[None, None, :], 2)
    word = word << (tl.arange(0, WIDTH // IN_LANE) % LANES * (IN_LANE // 2 * NBITS))[None, :]
    word = tl.sum(tl.reshape(word, (TOKENS, WIDTH // FIELDS, LANES)), 2) - bias(NBITS)
    t += tl.arange(0, TOKENS)
    at = t // TILE * (TILE * DIM * NBITS // 32) + word_offset(t % TILE, word_runs("key", TILE, DIM, NBITS, False))
    by_channel = word_offset(c + tl.arange(0, WIDTH // FIELDS) * FIELDS, word_runs("key", TILE, DIM, NBITS, True))
    tl.store(record_ptr + at[:, None] + by_channel[None, :], word)


@triton.jit
def pack_value_part(exact_ptr, new_ptr, words_ptr, half_ptr, part, first, length, stride_new_t, pages,
                    NEW: tl.constexpr, DIM: tl.constexpr, NBITS: tl.constexpr, GROUP: tl.constexpr,
                    RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr,
                    PAGE: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    """Some of a record's tokens: a word holds channels 8 apart of two tokens.

    Channels are ``[block][high field][low field, one of 8]``; low fields lie in neighbouring lanes,
    which read them in one piece.
    """
    LEVELS: tl.constexpr = 2.0**NBITS - 1
    PAIRS: tl.constexpr = value_part(RECORD, DIM, SIZE) // 2
    BLOCK: tl.constexpr = 8 * 16 // NBITS  # channels that 8 words hold
    BLOCKS: tl.constexpr = DIM // BLOCK
    RUN: tl.constexpr = min(BLOCK, GROUP, 32)
    HIGH: tl.constexpr = BLOCK // RUN
    IN_RUNS: tl.constexpr = min(GROUP, BLOCK) // RUN  # high fields, and below blocks, that one group takes
    IN_BLOCKS: tl.constexpr = max(GROUP // BLOCK, 1)
    FIELDS: tl.constexpr = 2 * HIGH
    GROUPS: tl.constexpr = HIGH // IN_RUNS
    t = part * (2 * PAIRS)
    row = tl.arange(
        0, FIELDS * BLOCKS * PAIRS
    )  # [token of a pair, high field][block][pair]: pairs in lanes, the rest in registers
    token = row % PAIRS * 2 + row // (PAIRS * BLOCKS * HIGH)
    channel = row // PAIRS % BLOCKS * BLOCK + row // (PAIRS * BLOCKS) % HIGH * RUN
    channel = channel[:, None] + tl.arange(0, RUN)[None, :]
    x = load_direct(
        exact_ptr,
        new_ptr,
        first + t,
        token[:, None],
        channel,
        length,
        stride_new_t,
        pages,
        NEW,
        DIM,
        SINK,
        RESIDUAL,
        PAGE,
    )
    x = tl.reshape(x, (2 * GROUPS, IN_RUNS, BLOCKS // IN_BLOCKS, IN_BLOCKS, PAIRS, RUN))
    low = least(least(least(x, 1), 2), 3)  # [token of a pair, group of high fields][group of blocks][pair]
    high = greatest(greatest(greatest(x, 1), 2), 3)
    scale, zero = range_params(low, high, LEVELS)
    which = tl.arange(0, 2 * GROUPS)
    p = tl.arange(0, PAIRS)
    group = (which % GROUPS)[:, None] + (tl.arange(0, BLOCKS // IN_BLOCKS) * GROUPS)[None, :]
    token = t + (which // GROUPS)[:, None, None] + 2 * p[None, None, :]
    at = value_param_offset(group[:, :, None], token, RECORD)
    tl.store(half_ptr + at, scale)
    tl.store(half_ptr + at + RECORD * (DIM // GROUP), zero)
    inverse = inverse_of(scale)[:, None, :, None, :, None]
    code = tl.reshape(
        rounded(within(x), inverse, zero[:, None, :, None, :, None], LEVELS), (FIELDS, BLOCKS, PAIRS, RUN)
    )
    which = tl.arange(0, FIELDS)
    code <<= (which // HIGH * 16 + which % HIGH * (RUN // 8 * NBITS))[:, None, None, None]
    word = tl.sum(code, 0) << (tl.arange(0, RUN) // 8 * NBITS)[None, None, :]
    word = tl.sum(tl.reshape(word, (BLOCKS, PAIRS, RUN // 8, 8)), 2) - bias(NBITS)
    token = t + 2 * p
    at = token // TILE * (TILE * DIM * NBITS // 32) + word_offset(
        token % TILE, word_runs("value", TILE, DIM, NBITS, False)
    )
    RUNS: tl.constexpr = word_runs("value", TILE, DIM, NBITS, True)
    by_block = word_offset(tl.arange(0, BLOCKS) * BLOCK, RUNS)
    at = at[None, :, None] + by_block[:, None, None] + word_offset(tl.arange(0, 8), RUNS)[None, None, :]
    tl.store(words_ptr + at, word)
