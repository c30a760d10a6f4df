"""Triton: quantize whole records and store new tokens (the kernels of :func:`kvruntime.methods.kivi.reference.append`).

``pack_kernel``: one warp a part of a record of one head, keys or values; of layouts that are not :func:`direct`, one
program a record.  It takes the record's tokens from the ring of exact slots (those stored before) and from the new
tokens (the rest), and quantizes and writes them in one pass.  Elements are loaded in the order of their words:
nothing is permuted.
``store_kernel``: new tokens that stay exact, to their slots.  Most appended tokens need only the second launch.
``freeze_kernel``: where a whole sequence shares its key scales, those of rows that pack for the first time,
before packing.
Each may run for many layers at once, axis 2 of its grid: a launch costs the host more than a short
prompt's packing the GPU.

Parallel over parts, records, heads, rows and layers; a part's groups lie inside it, so programs share nothing.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvruntime.kernels.lines import row_of
from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.boost import choose_order, pack_boosted_keys, pack_rotated_values
from kvruntime.methods.kivi.quantize import (
    LIMIT,
    ROUND_BITS,
    encode,
    exact_at,
    finite,
    greatest,
    inverse_of,
    least,
    load_tokens,
    new_tokens,
    range_params,
    rounded,
    scale_zero,
    store_codes,
    within,
)
from kvruntime.methods.kivi.words import (
    at_once,
    boosted_channels,
    chunks,
    groups_in,
    tile_order,
    value_param_offset,
    whole_groups,
    word_offset,
)
from kvsim.methods.kivi import Record
from kvsim.methods.packing import PLANES

PART = 2048
"""Elements a warp packs at once, 64 a thread: twice as many take 200 registers,
and two warps a scheduler hide nothing."""
COLUMNS = tl.constexpr(6)
"""Addresses a layer: keys, values, their exact slots, records, key scales."""
ALIGNMENT = tl.constexpr(16)
"""Bytes that a thread loads at once: the tensors of :func:`kvruntime.methods.kivi.append.addresses`
begin at a multiple."""


@triton.constexpr_function
def next_power_of_2(n):
    return triton.next_power_of_2(n)


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
    """What a word of :func:`rounded` codes holds too much, as int32."""
    word = sum(ROUND_BITS.value << shift for shift in range(0, 32, nbits)) % 2**32
    return word - 2**32 if word >= 2**31 else word


@triton.jit
def record_at(
    records_ptr, table_ptr, row, number, num_records, head, NUM_HEADS: tl.constexpr, RECORD_WORDS: tl.constexpr
):
    """Record ``number`` of a row: ``num_records`` lie row after row, or as many places in a block table say where."""
    place = row.to(tl.int64) * num_records + number
    if table_ptr is not None:
        place = tl.load(table_ptr + place).to(tl.int64)
    return records_ptr + (place * NUM_HEADS + head) * RECORD_WORDS


@triton.jit
def pack_keys(exact_ptr, new_ptr, record_ptr, params_ptr, first, length, count, stride_new_t, zero_offset, pages,
              NEW: tl.constexpr, C0: tl.constexpr, W: tl.constexpr, DIM: tl.constexpr, NBITS: tl.constexpr,
              GROUP: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr,
              PAGE: tl.constexpr, PARAMS: tl.constexpr):  # fmt: skip
    """One chunk of a record's key channels."""
    LEVELS: tl.constexpr = 2.0**NBITS - 1
    TILE_WORDS: tl.constexpr = TILE * DIM * NBITS // 32
    half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True) + 2 * PARAMS
    TOKENS: tl.constexpr = at_once("key", TILE, W, NBITS)
    TURNS: tl.constexpr = TILE // TOKENS
    t = tl.arange(0, TOKENS)
    d = C0 + tl.arange(0, W)
    everything = t[:, None] >= 0
    if GROUP == 0 or GROUP >= TOKENS:  # one scale for all at once: look at the whole group, then pack it
        SPAN: tl.constexpr = RECORD if GROUP == 0 else GROUP
        for group in range(RECORD // SPAN):
            if GROUP == 0:
                scale = tl.load(params_ptr + d)
                zero = tl.load(params_ptr + zero_offset + d)
            else:
                low = tl.full([W], LIMIT, tl.float32)
                high = tl.full([W], -LIMIT, tl.float32)
                nans = tl.zeros([W], tl.int32)
                for turn in range(SPAN // TOKENS):
                    token = first + group * SPAN + turn * TOKENS + t
                    x = load_tokens(
                        exact_ptr,
                        new_ptr,
                        token,
                        d,
                        everything,
                        length,
                        count,
                        stride_new_t,
                        pages,
                        NEW,
                        DIM,
                        SINK,
                        RESIDUAL,
                        PAGE,
                    )
                    x, is_nan = finite(x)
                    low = tl.minimum(low, tl.min(x, 0))
                    high = tl.maximum(high, tl.max(x, 0))
                    nans = tl.maximum(nans, tl.max(is_nan.to(tl.int32), 0))
                scale, zero = scale_zero(low, high, nans > 0, LEVELS)
                tl.store(half_ptr + group * DIM + d, scale)
                tl.store(half_ptr + (RECORD // SPAN + group) * DIM + d, zero)
            inverse = inverse_of(scale)
            for turn in range(SPAN // TOKENS):
                token = first + group * SPAN + turn * TOKENS + t
                x = load_tokens(
                    exact_ptr,
                    new_ptr,
                    token,
                    d,
                    everything,
                    length,
                    count,
                    stride_new_t,
                    pages,
                    NEW,
                    DIM,
                    SINK,
                    RESIDUAL,
                    PAGE,
                )
                x, is_nan = finite(x)
                codes = tl.where(is_nan, 0, encode(x, inverse[None, :], zero[None, :], LEVELS))
                now = group * (SPAN // TOKENS) + turn
                tile_ptr = record_ptr + now // TURNS * TILE_WORDS
                store_codes(tile_ptr, codes, "key", TILE, C0, W, NBITS, now % TURNS)
    else:
        GROUPS: tl.constexpr = TOKENS // GROUP
        for turn in range(RECORD // TOKENS):
            token = first + turn * TOKENS + t
            x = load_tokens(
                exact_ptr,
                new_ptr,
                token,
                d,
                everything,
                length,
                count,
                stride_new_t,
                pages,
                NEW,
                DIM,
                SINK,
                RESIDUAL,
                PAGE,
            )
            x, is_nan = finite(x)
            x = tl.reshape(x, (GROUPS, GROUP, W))
            nans = tl.max(tl.reshape(is_nan.to(tl.int32), (GROUPS, GROUP, W)), 1)
            scale, zero = scale_zero(tl.min(x, 1), tl.max(x, 1), nans > 0, LEVELS)
            at = (turn * GROUPS + tl.arange(0, GROUPS))[:, None] * DIM + d[None, :]
            tl.store(half_ptr + at, scale)
            tl.store(half_ptr + at + RECORD // GROUP * DIM, zero)
            codes = encode(x, inverse_of(scale)[:, None, :], zero[:, None, :], LEVELS)
            codes = tl.reshape(codes, (TOKENS, W))
            store_codes(record_ptr + turn // TURNS * TILE_WORDS, codes, "key", TILE, C0, W, NBITS, turn % TURNS)


@triton.jit
def pack_values(exact_ptr, new_ptr, words_ptr, half_ptr, tile, first, length, count, stride_new_t, pages,
                NEW: tl.constexpr, C0: tl.constexpr, W: tl.constexpr, DIM: tl.constexpr, NBITS: tl.constexpr,
                GROUP: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr,
                RESIDUAL: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """One chunk of one tile's value channels."""
    LEVELS: tl.constexpr = 2.0**NBITS - 1
    ZEROS: tl.constexpr = RECORD * (DIM // GROUP)
    GROUPS: tl.constexpr = groups_in(C0, W, GROUP)
    TOKENS: tl.constexpr = at_once("value", TILE, W, NBITS)
    d = C0 + tl.arange(0, W)
    for turn in range(TILE // TOKENS):
        t = tile * TILE + turn * TOKENS + tl.arange(0, TOKENS)
        x = load_tokens(
            exact_ptr,
            new_ptr,
            first + t,
            d,
            t[:, None] >= 0,
            length,
            count,
            stride_new_t,
            pages,
            NEW,
            DIM,
            SINK,
            RESIDUAL,
            PAGE,
        )
        x, is_nan = finite(x)
        if whole_groups(C0, W, GROUP):
            x = tl.reshape(x, (TOKENS, W // GROUP, GROUP))
            nans = tl.max(tl.reshape(is_nan.to(tl.int32), (TOKENS, W // GROUP, GROUP)), 2)
            scale, zero = scale_zero(tl.min(x, 2), tl.max(x, 2), nans > 0, LEVELS)
            group = GROUPS[0] + tl.arange(0, W // GROUP)
            at = value_param_offset(group[None, :], t[:, None], RECORD)
            tl.store(half_ptr + at, scale)
            tl.store(half_ptr + at + ZEROS, zero)
            codes = tl.reshape(encode(x, inverse_of(scale)[:, :, None], zero[:, :, None], LEVELS), (TOKENS, W))
        else:  # groups that cross chunks or are no power of two: one at a time
            codes = tl.zeros([TOKENS, W], tl.int32)
            member = tl.arange(0, next_power_of_2(GROUP))
            inside = (member < GROUP)[None, :]
            FIRST: tl.constexpr = GROUPS[0]
            LAST: tl.constexpr = GROUPS[1]
            for g in tl.static_range(FIRST, LAST):
                y = load_tokens(exact_ptr, new_ptr, first + t, g * GROUP + member, inside, length, count, stride_new_t,
                                pages, NEW, DIM, SINK, RESIDUAL, PAGE)  # fmt: skip
                y, y_nan = finite(y)
                low = tl.min(tl.where(inside, y, LIMIT), 1)
                high = tl.max(tl.where(inside, y, -LIMIT), 1)
                nans = tl.max((y_nan & inside).to(tl.int32), 1)
                scale, zero = scale_zero(low, high, nans > 0, LEVELS)
                at = value_param_offset(g, t, RECORD)
                tl.store(half_ptr + at, scale)
                tl.store(half_ptr + at + ZEROS, zero)
                mine = encode(x, inverse_of(scale)[:, None], zero[:, None], LEVELS)
                codes = tl.where((d // GROUP == g)[None, :], mine, codes)
        store_codes(words_ptr, codes, "value", TILE, C0, W, NBITS, turn)


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


@triton.jit
def pack_part(part, key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, record_ptr, params_ptr, order_ptr, first,
              length, count, stride_kt, stride_vt, zero_offset, key_pages, value_pages, KEY_DIM: tl.constexpr,
              VALUE_DIM: tl.constexpr, KEY_NBITS: tl.constexpr, VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr,
              VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr,
              RESIDUAL: tl.constexpr, PAGE: tl.constexpr, NEW: tl.constexpr, KEY_PARAMS: tl.constexpr,
              VALUE_PARAMS: tl.constexpr, SIZE: tl.constexpr, BOOST: tl.constexpr, BOOST_CODES: tl.constexpr,
              ROTATION: tl.constexpr):  # fmt: skip
    """A part of the record of one head that begins with token ``first``, keys' parts first: pointers are the head's
    own, but ``zero_offset`` from scale to zero."""
    KEY_PARTS: tl.constexpr = num_key_parts(RECORD, KEY_DIM, KEY_NBITS, KEY_GROUP, SIZE, BOOST)
    if part < KEY_PARTS:
        if BOOST > 0:
            CHANNELS: tl.constexpr = chunks(KEY_DIM)
            for i in tl.static_range(len(CHANNELS)):
                pack_boosted_keys(exact_key_ptr, key_ptr, record_ptr, order_ptr, first, length, count, stride_kt,
                                  key_pages, NEW, CHANNELS[i][0], CHANNELS[i][1], KEY_DIM, KEY_NBITS, BOOST, False,
                                  KEY_GROUP, RECORD, TILE, SINK, RESIDUAL, PAGE, KEY_PARAMS, BOOST_CODES)  # fmt: skip
            pack_boosted_keys(exact_key_ptr, key_ptr, record_ptr, order_ptr, first, length, count, stride_kt, key_pages,
                              NEW, 0, boosted_channels(KEY_DIM), KEY_DIM, KEY_NBITS, BOOST, True, KEY_GROUP, RECORD,
                              TILE, SINK, RESIDUAL, PAGE, KEY_PARAMS, BOOST_CODES)  # fmt: skip
        elif direct(KEY_DIM, KEY_NBITS, KEY_GROUP):
            pack_key_part(exact_key_ptr, key_ptr, record_ptr, params_ptr, part, first, length, stride_kt, zero_offset,
                          key_pages, NEW, KEY_DIM, KEY_NBITS, KEY_GROUP, RECORD, TILE, SINK, RESIDUAL, PAGE,
                          KEY_PARAMS, SIZE)  # fmt: skip
        else:
            KEY_CHUNKS: tl.constexpr = chunks(KEY_DIM)
            for i in tl.static_range(len(KEY_CHUNKS)):
                pack_keys(exact_key_ptr, key_ptr, record_ptr, params_ptr, first, length, count, stride_kt, zero_offset,
                          key_pages, NEW, KEY_CHUNKS[i][0], KEY_CHUNKS[i][1], KEY_DIM, KEY_NBITS, KEY_GROUP, RECORD,
                          TILE, SINK, RESIDUAL, PAGE, KEY_PARAMS)  # fmt: skip
    else:
        words_ptr = record_ptr + RECORD * KEY_DIM * KEY_NBITS // 32
        half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True) + 2 * VALUE_PARAMS
        if ROTATION > 0:
            pack_rotated_values(exact_value_ptr, value_ptr, words_ptr, half_ptr, first, length, stride_vt, value_pages,
                                NEW, VALUE_DIM, VALUE_NBITS, ROTATION, RECORD, TILE, SINK, RESIDUAL, PAGE)  # fmt: skip
        elif direct(VALUE_DIM, VALUE_NBITS, VALUE_GROUP):
            pack_value_part(exact_value_ptr, value_ptr, words_ptr, half_ptr, part - KEY_PARTS, first, length, stride_vt,
                            value_pages, NEW, VALUE_DIM, VALUE_NBITS, VALUE_GROUP, RECORD, TILE, SINK, RESIDUAL,
                            PAGE, SIZE)  # fmt: skip
        else:
            VALUE_CHUNKS: tl.constexpr = chunks(VALUE_DIM)
            for tile in range(RECORD // TILE):
                for i in tl.static_range(len(VALUE_CHUNKS)):
                    pack_values(exact_value_ptr, value_ptr, words_ptr + tile * (TILE * VALUE_DIM * VALUE_NBITS // 32),
                                half_ptr, tile, first, length, count, stride_vt, value_pages, NEW, VALUE_CHUNKS[i][0],
                                VALUE_CHUNKS[i][1], VALUE_DIM, VALUE_NBITS, VALUE_GROUP, RECORD, TILE, SINK,
                                RESIDUAL, PAGE)  # fmt: skip


@triton.jit
def of_layer(x_ptr, layers_ptr, COLUMN: tl.constexpr):
    """This program's layer of what ``x_ptr`` is in the first.

    It is from the table of :func:`kvruntime.methods.kivi.append.addresses`, where there is one.
    """
    if layers_ptr is not None:
        x_ptr = tl.multiple_of(tl.load(layers_ptr + tl.program_id(2) * COLUMNS + COLUMN).to(x_ptr.dtype), ALIGNMENT)
    return x_ptr


@triton.jit
def pack_kernel(
    key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, records_ptr, params_ptr, order_ptr, lengths_ptr, packed_ptr,
    counts_ptr, starts_ptr, layers_ptr, block_table_ptr, exact_table_ptr, stride_kb, stride_kh, stride_kt, stride_vb,
    stride_vh, stride_vt, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, new_length, num_slots,
    num_records, num_pages, batch_size,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_NBITS: tl.constexpr,
    VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr,
    TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, NEW: tl.constexpr, KEY_PARAMS: tl.constexpr,
    VALUE_PARAMS: tl.constexpr, RECORD_WORDS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, BOOST: tl.constexpr, BOOST_CODES: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """Optional: ``order_ptr``, of boosted channels; ``counts_ptr``, tokens that each row brings; ``starts_ptr``, where
    in the line of new tokens each row's begin; ``layers_ptr`` (:func:`kvruntime.methods.kivi.append.addresses`);
    ``block_table_ptr``, for each row ``num_records`` places of records; ``exact_table_ptr``, for each row ``num_pages``
    pages of ``PAGE`` exact tokens, keys and values by strides of their own."""
    ahead = tl.program_id(0) // PARTS
    if BLOCK_B == 0:
        row = tl.program_id(1) // NUM_HEADS
        head = tl.program_id(1) % NUM_HEADS
        count = new_tokens(row, counts_ptr, new_length)
        start = tl.cast(new_length - count, tl.int64)
    else:
        head = tl.program_id(1)
        row, ahead, start, count = row_of(ahead, starts_ptr, batch_size, RECORD, 1, BLOCK_B)
        start = start.to(tl.int64)
    length = tl.load(lengths_ptr + row)
    packed = tl.load(packed_ptr + row)
    number = packed // RECORD + ahead
    over = length + count - SINK - packed - RESIDUAL
    if over <= ahead * RECORD:  # this row packs fewer records than the grid provides for
        return
    first = SINK + number * RECORD
    key_ptr = of_layer(key_ptr, layers_ptr, 0)
    value_ptr = of_layer(value_ptr, layers_ptr, 1)
    exact_key_ptr = of_layer(exact_key_ptr, layers_ptr, 2)
    exact_value_ptr = of_layer(exact_value_ptr, layers_ptr, 3)
    records_ptr = of_layer(records_ptr, layers_ptr, 4)
    record_ptr = record_at(records_ptr, block_table_ptr, row, number, num_records, head, NUM_HEADS, RECORD_WORDS)
    rows = row.to(tl.int64) * NUM_HEADS + head
    key_pages = None
    value_pages = None
    if PAGE == 0:
        exact_key_ptr += rows * num_slots * KEY_DIM
        exact_value_ptr += rows * num_slots * VALUE_DIM
    else:
        table_ptr = exact_table_ptr + row.to(tl.int64) * num_pages
        key_pages = (table_ptr, stride_xb, stride_xt)
        value_pages = (table_ptr, stride_yb, stride_yt)
        exact_key_ptr += head.to(tl.int64) * stride_xh
        exact_value_ptr += head.to(tl.int64) * stride_yh
    if BLOCK_B == 0:
        key_ptr += row.to(tl.int64) * stride_kb
        value_ptr += row.to(tl.int64) * stride_vb
    key_ptr += head.to(tl.int64) * stride_kh + start * stride_kt
    value_ptr += head.to(tl.int64) * stride_vh + start * stride_vt
    row_params_ptr = params_ptr
    if KEY_GROUP == 0:
        row_params_ptr = of_layer(params_ptr, layers_ptr, 5) + rows * KEY_DIM
    if BOOST > 0:
        order_ptr += rows * KEY_DIM
    pack_part(tl.program_id(0) % PARTS, key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, record_ptr, row_params_ptr,
              order_ptr, first, length, count, stride_kt, stride_vt, batch_size * NUM_HEADS * KEY_DIM, key_pages,
              value_pages, KEY_DIM, VALUE_DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUP, VALUE_GROUP, RECORD, TILE, SINK,
              RESIDUAL, PAGE, NEW, KEY_PARAMS, VALUE_PARAMS, SIZE, BOOST, BOOST_CODES, ROTATION)  # fmt: skip


@triton.jit
def order_kernel(
    key_ptr, exact_key_ptr, order_ptr, lengths_ptr, packed_ptr, counts_ptr, starts_ptr, stride_kb, stride_kh, stride_kt,
    new_length, num_slots,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, RECORD: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr,
    NEW: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The channel order of rows that pack for the first time, one row and head a program."""
    row = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    length = tl.load(lengths_ptr + row)
    packed = tl.load(packed_ptr + row)
    if starts_ptr is None:
        count = new_tokens(row, counts_ptr, new_length)
        start = new_length - count
    else:
        start = tl.load(starts_ptr + row)
        count = tl.load(starts_ptr + row + 1) - start
    if packed > 0 or length + count - SINK - RESIDUAL <= 0:
        return
    rows = row.to(tl.int64) * NUM_HEADS + head
    exact_key_ptr += rows * num_slots * KEY_DIM
    if starts_ptr is None:
        key_ptr += row.to(tl.int64) * stride_kb
    key_ptr += head.to(tl.int64) * stride_kh + tl.cast(start, tl.int64) * stride_kt
    choose_order(exact_key_ptr, key_ptr, order_ptr + rows * KEY_DIM, SINK, length, count, stride_kt, None, NEW, KEY_DIM,
                 BLOCK_D, RECORD, SINK, RESIDUAL, 0)  # fmt: skip


@triton.jit
def freeze_kernel(
    key_ptr, exact_key_ptr, params_ptr, lengths_ptr, packed_ptr, counts_ptr, starts_ptr, layers_ptr,
    stride_kb, stride_kh, stride_kt, new_length, num_slots, batch_size,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, KEY_NBITS: tl.constexpr, RECORD: tl.constexpr, SINK: tl.constexpr,
    RESIDUAL: tl.constexpr, NEW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Scales of rows that pack for the first time, over all that they pack then:
    ``BLOCK_D`` channels of one head a program."""
    row = tl.program_id(1) // NUM_HEADS
    head = tl.program_id(1) % NUM_HEADS
    length = tl.load(lengths_ptr + row)
    packed = tl.load(packed_ptr + row)
    if starts_ptr is None:
        count = new_tokens(row, counts_ptr, new_length)
        start = new_length - count
    else:
        start = tl.load(starts_ptr + row)
        count = tl.load(starts_ptr + row + 1) - start
    over = length + count - SINK - RESIDUAL
    if packed > 0 or over <= 0:
        return
    size = (over + RECORD - 1) // RECORD * RECORD
    key_ptr = of_layer(key_ptr, layers_ptr, 0)
    exact_key_ptr = of_layer(exact_key_ptr, layers_ptr, 2)
    params_ptr = of_layer(params_ptr, layers_ptr, 5)
    rows = row.to(tl.int64) * NUM_HEADS + head
    exact_key_ptr += rows * num_slots * KEY_DIM
    if starts_ptr is None:
        key_ptr += row.to(tl.int64) * stride_kb
    key_ptr += head.to(tl.int64) * stride_kh + tl.cast(start, tl.int64) * stride_kt
    d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    low = tl.full([BLOCK_D], LIMIT, tl.float32)
    high = tl.full([BLOCK_D], -LIMIT, tl.float32)
    nans = tl.zeros([BLOCK_D], tl.int32)
    for begin in range(0, size, BLOCK_T):
        t = begin + tl.arange(0, BLOCK_T)
        wanted = (t < size)[:, None] & (d < KEY_DIM)[None, :]
        x = load_tokens(
            exact_key_ptr, key_ptr, SINK + t, d, wanted, length, count, stride_kt, None, NEW, KEY_DIM, SINK, RESIDUAL, 0
        )
        x, is_nan = finite(x)
        low = tl.minimum(low, tl.min(tl.where(wanted, x, LIMIT), 0))
        high = tl.maximum(high, tl.max(tl.where(wanted, x, -LIMIT), 0))
        nans = tl.maximum(nans, tl.max((is_nan & wanted).to(tl.int32), 0))
    scale, zero = scale_zero(low, high, nans > 0, 2.0**KEY_NBITS - 1)
    at = rows * KEY_DIM + d
    tl.store(params_ptr + at, scale, mask=d < KEY_DIM)
    tl.store(params_ptr + tl.cast(batch_size, tl.int64) * (NUM_HEADS * KEY_DIM) + at, zero, mask=d < KEY_DIM)


class New(NamedTuple):
    """New tokens as the kernels take them."""

    key: Tensor
    value: Tensor
    num_heads: int
    length: int
    """Tokens a row at most."""
    counts: Tensor | None
    starts: Tensor | None

    def strides(self) -> tuple[int, ...]:
        """From row to row, head to head, token to token, of keys and then of values."""
        if self.starts is None:
            return (*self.key.stride()[:3], *self.value.stride()[:3])
        return tuple(stride for x in (self.key, self.value) for stride in (0, x.stride(1), x.stride(0)))


def freeze(new: New, stored: reference.Stored, layout: reference.Layout, layers: Tensor | None = None) -> None:
    """Write ``key_params`` of every row that is about to pack for the first time; other rows are left alone.

    ``layers``: as :func:`kvruntime.methods.kivi.append.append`.
    """
    record, sink, residual = layout
    batch_size, dim = len(stored.lengths), record.key_dim
    block = min(64, triton.next_power_of_2(dim))
    freeze_kernel[(triton.cdiv(dim, block), batch_size * new.num_heads, 1 if layers is None else len(layers))](
        new.key, stored.exact_key, stored.key_params, stored.lengths, stored.packed, new.counts, new.starts, layers,
        *new.strides()[:3], new.length, stored.exact_key.shape[2], batch_size,
        NUM_HEADS=new.num_heads, KEY_DIM=dim, KEY_NBITS=record.key_nbits, RECORD=record.num_tokens, SINK=sink,
        RESIDUAL=residual, NEW=new.length > 1 or record.num_tokens > residual, BLOCK_T=64, BLOCK_D=block,
        enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip


def order(new: New, stored: reference.Stored, layout: reference.Layout) -> None:
    """Write ``key_order`` of every row that is about to pack for the first time; other rows are left alone."""
    record, sink, residual = layout
    order_kernel[(len(stored.lengths) * new.num_heads,)](
        new.key, stored.exact_key, stored.key_order, stored.lengths, stored.packed, new.counts, new.starts,
        *new.strides()[:3], new.length, stored.exact_key.shape[2],
        NUM_HEADS=new.num_heads, KEY_DIM=record.key_dim, RECORD=record.num_tokens, SINK=sink, RESIDUAL=residual,
        NEW=new.length > 1 or record.num_tokens > residual, BLOCK_D=triton.next_power_of_2(record.key_dim),
        enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip


class Places(NamedTuple):
    """Where records and exact tokens lie, as the kernels take it: tables and strides,
    None where rows have their own."""

    block_table: Tensor | None
    exact_table: Tensor | None
    strides: tuple[int | None, ...]
    """Of a pool of exact tokens, from page to page, head to head, token to token: keys', then values'."""
    num_slots: int
    num_records: int
    num_pages: int | None
    page: int
    """Tokens a page; 0: there are none."""


def places(stored: reference.Stored, layout: reference.Layout) -> Places:
    """Raises ``ValueError`` where :func:`kvruntime.methods.kivi.reference.check` does."""
    reference.check(stored, layout, len(stored.lengths))
    table, pages = (x if x is None else x.contiguous() for x in (stored.block_table, stored.exact_table))
    num_records, size = reference.records_a_row(stored), stored.exact_key.shape[2]
    if pages is None:
        return Places(table, None, (None,) * 6, size, num_records, None, 0)
    strides = (*stored.exact_key.stride()[:3], *stored.exact_value.stride()[:3])
    return Places(table, pages, strides, layout.residual, num_records, pages.shape[1], size)


def pack_warps(record: Record) -> int:
    """Warps a record: a tile of a wide head does not fit the registers of four."""
    return 4 if max(record.key_dim, record.value_dim) <= 64 else 8


def num_parts(record: Record, size: int) -> int:
    """Parts of ``size`` elements that a record has, keys' and values'."""
    length, boost, rotation = record.num_tokens, record.boost_nbits, record.rotation
    keys = num_key_parts(length, record.key_dim, record.key_nbits, record.key_group, size, boost)
    return int(keys + num_value_parts(length, record.value_dim, record.value_nbits, record.value_group, size, rotation))


def in_word_order(record: Record) -> bool:
    """:func:`direct` of its keys and its values."""
    keys = direct(record.key_dim, record.key_nbits, record.key_group, record.boost_nbits)
    return bool(keys and direct(record.value_dim, record.value_nbits, record.value_group, record.rotation))


def permuting(record: Record) -> dict[str, int]:
    """Of a launch that packs a whole record besides other work: codes that are permuted take more than 80 registers,
    and ptxas, left to choose, spills instead; boosted keys and rotated values take more than 128 (:func:`pack_kernel`
    over a pool on sm_89, a step on sm_80)."""
    return {} if in_word_order(record) else {"maxnreg": 255 if record.boosted or record.rotation else 128}


@cache
def pack_launch(record: Record) -> dict[str, int]:
    """Programs a record, elements a program and warps of :func:`pack_kernel`: one warp, where nothing crosses warps,
    but of heads whose 16 values do not fit its registers."""
    warps = pack_warps(record) if not in_word_order(record) else 1 if record.value_dim <= 256 else 4
    return {"PARTS": num_parts(record, PART * warps), "SIZE": PART * warps, "num_warps": warps}
