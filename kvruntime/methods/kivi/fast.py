"""Gluon: decode attention over packed records, on the tensor cores and at the speed of the memory.

The dequantized key is ``code * scale + zero``, so with one scale a channel ``d`` and group of tokens, and one a token
``t`` and group of channels ``g`` for values::

    S[t]   = sum_d (query[d] scale[d]) code[t, d]  +  sum_d query[d] zero[d]
    out[d] = sum_t (p[t] scale[t, g]) code[t, d]   +  sum_t p[t] zero[t, g]

The scales go to the small operand (query, p) and the codes to the matrix unit as they lie: masked where they stand in
their word, a code is the float16 subnormal ``code * 2**(nbits * j - 24)``, exactly; ``2**(nbits * j)`` is
undone in the query and, for values, after the last record.  The records' word order (kvsim/methods/packing.py) is the
matrix operand's, so a program of one warp copies a tile of 64 tokens ahead (cp.async), and masks, multiplies,
and is done.

Matrices are ``[tokens or channels, heads]``: 8 columns hold the query heads that share a key/value head.  Rounding: the
query is exact (scaled by a power of two); ``query * scale`` is held as the sum of two float16 (the second in columns
4..7 where heads are at most 4, else by a second product); every tile has a fresh accumulator that is added in
float32, because the matrix unit's own additions truncate; sums of p, and of p * zero, are rows of one more product.

Range, whatever the cache holds: the query is scaled so that ``query * scale`` cannot pass 65,504 for any scale that
``reference.LIMIT`` allows, and where a tile has a value scale of 256 or more its weights are made smaller.  A key
scale below about 2**-8 leaves ``query * scale`` fewer than 11 bits.

A head of 96 channels is two chunks, of 64 and 32 channels, one of 80 is 64 and 16, each with a word order of its own
(:func:`spans`): whatever has channels is a tuple of two, in shared memory and in registers.  Scores are one chain of
products, and one softmax.  With boosted key channels (``BOOST_CODES``, the first word of their lower bits in a record)
packed channels are in the order of ``order_ptr``, and the lower bits are a product of their own over the first of them.
Where values are rotated (``CENTERED``) a value's zero is its scale times a constant, taken at the end.  Of 16 channels
at 2 bits the place of a code in its byte has a bit of the token (:func:`token_in_byte`).

Parallel over splits of the tokens, rows, key/value heads and blocks of 8 query heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels import merge
from kvruntime.kernels.launch import launch_kernel
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods.kivi.attention import rotated
from kvruntime.methods.kivi.fast_copies import (
    DRAWN,
    ask_for,
    at_stage,
    copy_first,
    copy_tile,
    draw,
    forget_cached,
    owned,
    prefetch,
    record_of,
)
from kvruntime.methods.kivi.fast_exact import exact_step
from kvruntime.methods.kivi.fast_merge import EXACT_UNITS, combine_kernel, merge_parts, units_of
from kvruntime.methods.kivi.fast_operands import (
    BOOST,
    CHUNK,
    COLUMNS,
    HEADROOM,
    HIDDEN,
    MMA,
    ROWS,
    TWICE_LOG2E,
    add,
    boosted_channels,
    capped,
    channels_shape,
    code_rows,
    largest_of_query,
    largest_scale_of,
    load_key_params,
    load_ordered,
    load_words,
    narrow_values,
    operand_order,
    packed_up,
    power_of_two,
    product_or_rest,
    reinterpret_half,
    repeat,
    repeated_rows,
    rescale_add,
    room,
    scaled_down,
    share_layout,
    softmax_step,
    spans,
    swap_halves,
    token_in_byte,
    undo_token,
    value_places,
    words_layout,
    words_shape,
    zero_layout,
)
from kvruntime.methods.kivi.fast_plan import (
    MAX_REGISTERS,
    MAX_ROWS,
    PROGRAMS_PER_SM,
    REGISTERS,
    STAGES,
    TILE,
    constants,
    merges,
    padded,
    plan_merge,
    plan_splits,
    programs_per_sm,
    spare,
    supports,
)
from kvruntime.methods.kivi.pack import places
from kvruntime.methods.kivi.reference import Fresh, Layout, Stored


@gluon.jit
def attend_split(
    query_ptr, base_ptr, exact_key_ptr, exact_value_ptr, codes, key_params, value_params, first, step, end, first_chunk,
    step_chunk, end_chunk, length, packed, num_slots, scale_log2, column, real, newest, table_ptr,
    draws_ptr, pages, order_ptr, sink, softcap, window,
    DIM: gl.constexpr, KEY_NBITS: gl.constexpr, VALUE_NBITS: gl.constexpr, KEY_GROUPS: gl.constexpr,
    VALUE_GROUPS: gl.constexpr, RECORD: gl.constexpr, KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr,
    RECORD_STRIDE: gl.constexpr, SINK: gl.constexpr, RESIDUAL: gl.constexpr, SHARED: gl.constexpr, BEGUN: gl.constexpr,
    EARLY: gl.constexpr, AT_ONCE: gl.constexpr, STAGES: gl.constexpr, PAGE: gl.constexpr, BOOST_CODES: gl.constexpr,
    CENTERED: gl.constexpr,
):  # fmt: skip
    """``(acc, sums, peak)`` of every ``step``-th tile from ``first`` to ``end`` and some chunks of exact slots.
    ``acc * 2**(24 - VALUE_NBITS * j)`` and rows 0..7 of ``sums`` (p * zero) make the output, rows 8..15 (p) its
    divisor; p is ``2**(HEADROOM + S - peak)``.  ``newest``: None, or the fresh tokens' keys and values, their strides
    between tokens, how many, the first real one, each column's position, and the last column's."""
    TILES: gl.constexpr = RECORD // TILE
    SPANS: gl.constexpr = spans(DIM, VALUE_GROUPS)
    GROUPS: gl.constexpr = padded(VALUE_GROUPS)
    KEY_STEP: gl.constexpr = 8 // KEY_NBITS  # codes a byte; code j of a byte lies at 2**(nbits * j - 24)
    KEY_ROOM: gl.constexpr = room(KEY_NBITS)
    PER_HEAD: gl.constexpr = gl.SliceLayout(1, MMA)
    ZERO_ROWS: gl.constexpr = zero_layout(GROUPS, TILE // 4)
    WIDE: gl.constexpr = DIM > 128  # registers are short: what can be made or read again is not kept
    NARROW_KEYS: gl.constexpr = token_in_byte(SPANS[len(SPANS) - 1][1], KEY_NBITS)
    ONCE: gl.constexpr = gl.BlockedLayout([1, 1, 8], [4, 4, 2], [1, 1, 1], [2, 1, 0])
    ZERO_SHAPE: gl.constexpr = [8 // GROUPS, GROUPS, 4, TILE // 4]

    # ---- the query is asked for first: behind the tiles it would wait for all of them
    loaded = ()
    for i in gl.static_range(len(SPANS)):
        k = gl.arange(0, SPANS[i][1], layout=gl.SliceLayout(0, gl.SliceLayout(2, COLUMNS)))
        channel = (((k >> 1) & 3) * (SPANS[i][1] // 4) + (k >> 4) * 4 + ((k >> 3) & 1) * 2 + (k & 1) + SPANS[i][0])[
            None, :, None
        ]
        at, mask = gl.broadcast(column + channel, real)
        loaded = loaded + (gl.load(query_ptr + at, mask=mask, other=0.0),)

    if BOOST_CODES > 0:
        BOOSTED: gl.constexpr = boosted_channels(DIM)
        ordered_query = load_ordered(query_ptr, order_ptr, column, real, DIM, DIM)
        boosted_query = load_ordered(query_ptr, order_ptr, column, real, BOOSTED, DIM)

    # ---- the first tiles, if they are not on their way; again those of a record that was packed since
    # they were asked for
    if not BEGUN:
        copy_first(codes, key_params, value_params, base_ptr, table_ptr, first, step, 0, end, DIM, KEY_NBITS,
                   VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS, VALUE_PARAMS, RECORD_STRIDE,
                   STAGES, BOOST_CODES, CENTERED)  # fmt: skip
    elif EARLY:
        if length - SINK - packed <= RESIDUAL - RECORD + 1:
            async_copy.wait_group(0)
            forget_cached()
            copy_first(codes, key_params, value_params, base_ptr, None, first, step, (packed - RECORD) // TILE, end,
                       DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS, VALUE_PARAMS,
                       RECORD_STRIDE, STAGES, BOOST_CODES, CENTERED)  # fmt: skip

    # ---- the query, its largest element scaled to [1, 2), in the order of an operand
    exponent = (largest_of_query(loaded).to(gl.int32, bitcast=True) >> 23) - 127
    exponent = gl.minimum(gl.maximum(exponent, -80), 80)
    queries, group_queries, scaled, parts, up_halves = (), (), (), (), ()
    for i in gl.static_range(len(SPANS)):
        query, down = gl.broadcast(loaded[i].to(gl.float32), power_of_two(-exponent)[:, None, :])
        query = query * down
        k = gl.arange(0, SPANS[i][1], layout=gl.SliceLayout(0, gl.SliceLayout(2, COLUMNS)))
        up_halves = up_halves + (
            power_of_two(KEY_ROOM - 1 - KEY_NBITS * ((k >> 3) & (KEY_STEP - 1)))[None, :, None].to(gl.float16),
        )
        query, up = gl.broadcast(
            query, power_of_two(KEY_ROOM - 1 - KEY_NBITS * ((k >> 3) & (KEY_STEP - 1)))[None, :, None]
        )
        scaled = scaled + ((query * up).to(gl.float16),)  # at most 2**KEY_ROOM, and a scale at most 65504 / 2**KEY_ROOM
        if SHARED:
            n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
            low = gl.broadcast(n >= 4, query)[0]
            if not WIDE:
                query = gl.where(low, 0.0, query)
            parts = parts + (gl.where(low, -1.0, 0.0).to(gl.float16),)
        queries = queries + (query.to(gl.float16),)
        group_queries = group_queries + (
            gl.convert_layout(repeat(queries[i], KEY_GROUPS, 0), COLUMNS, assert_trivial=True),
        )
    if BOOST_CODES > 0:  # packed channels are in another order, and the exact ones' query is not theirs
        gl.static_assert(len(SPANS) == 1 and KEY_GROUPS == 1)
        query = scaled_down(ordered_query, exponent)
        query, up = gl.broadcast(query, packed_up(DIM, KEY_NBITS, 0))
        scaled = ((query * up).to(gl.float16),)
        if SHARED:
            n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
            query = gl.where(gl.broadcast(n >= 4, query)[0], 0.0, query)
        group_queries = (query.to(gl.float16),)
        query = scaled_down(boosted_query, exponent)
        query, up = gl.broadcast(query, packed_up(BOOSTED, KEY_NBITS, BOOST))
        boosted_query = (query * up).to(gl.float16)
        if SHARED:
            n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
            boosted_part = gl.where(gl.broadcast(n >= 4, query)[0], -1.0, 0.0).to(gl.float16)
    factor = gl.convert_layout(power_of_two(exponent), PER_HEAD) * scale_log2  # of exact scores; of packed ones:
    packed_factor = factor * 2.0 ** (25 - KEY_ROOM)
    acc = ()
    for i in gl.static_range(len(SPANS)):
        acc = acc + (gl.zeros(channels_shape(SPANS[i][1], SPANS[i][3]), gl.float32, MMA),)
    sums = gl.zeros([1, 16, 8], gl.float32, MMA)
    peak = gl.full([1, 8], -1.0e20, gl.float32, PER_HEAD)
    if sink is not None:  # a token of no value, whose weight is 1 where it is seen
        peak = gl.maximum(peak, sink)
        row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
        seen = gl.where(sink > HIDDEN, 2.0**HEADROOM, 0.0)[:, None, :]
        seen, row = gl.broadcast(gl.broadcast(seen, sums)[0], row)
        sums = gl.where(row >= 8, seen, 0.0)

    # ---- exact tokens, 16 slots a step
    staged = ()
    for i in gl.static_range(len(SPANS)):
        staged = staged + (reinterpret_half(codes[i].index(STAGES - 1), CHUNK, SPANS[i][1]),)
    end_exact = end_chunk
    if newest is not None:
        chunks = (num_slots + CHUNK - 1) // CHUNK
        end_exact = gl.minimum(end_chunk, chunks)
    for chunk in range(first_chunk, end_exact, step_chunk):
        if PAGE == 0:
            acc, sums, peak = exact_step(acc, sums, peak, queries, factor, staged, exact_key_ptr, exact_value_ptr, DIM,
                                         DIM, chunk * CHUNK, length, packed, num_slots, None, None, None, None, None,
                                         softcap,
                                         VALUE_NBITS, SHARED, DIM, VALUE_GROUPS, SINK, RESIDUAL,
                                         AT_ONCE, 0)  # fmt: skip
        else:
            acc, sums, peak = exact_step(acc, sums, peak, queries, factor, staged, exact_key_ptr, exact_value_ptr,
                                         pages[3], pages[6], chunk * CHUNK, length, packed, length - packed, 0, None,
                                         pages[0], pages[1], pages[4], softcap, VALUE_NBITS, SHARED, DIM,
                                         VALUE_GROUPS, SINK,
                                         RESIDUAL, False, PAGE)  # fmt: skip

    # ---- fresh tokens, whose chunks are counted after the exact ones; none beyond the last column's position
    if newest is not None:
        done = (gl.maximum(end_exact - first_chunk, 0) + step_chunk - 1) // step_chunk
        end_fresh = gl.minimum(end_chunk, chunks + newest[7] // CHUNK + 1)
        for chunk in range(first_chunk + done * step_chunk, end_fresh, step_chunk):
            acc, sums, peak = exact_step(acc, sums, peak, queries, factor, staged, newest[0], newest[1], newest[2],
                                         newest[3], (chunk - chunks) * CHUNK, length, packed, newest[4], newest[5],
                                         newest[6], None, None, None, softcap, VALUE_NBITS, SHARED, DIM, VALUE_GROUPS,
                                         SINK,
                                         RESIDUAL, False, 0)  # fmt: skip

    # ---- packed tokens, tile after tile, the next ones on their way
    stage = 0
    tile = first
    ahead = first + (STAGES - 1) * step  # the tile that is asked for while ``tile`` is worked on
    if table_ptr is not None:  # read a step before it is needed
        next_ptr = record_of(base_ptr, table_ptr, ahead, ahead < end, TILES, RECORD_STRIDE)
    if draws_ptr is not None:
        gl.static_assert(STAGES == 2)
        own = owned(end, step)
        # of the tile after ``ahead``, which is known when this step ends: its number was asked for a step before
        turn = STAGES
        asked = gl.full([32], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
    while tile < end:
        async_copy.wait_group(STAGES - 2)
        free = gl.where(stage == 0, STAGES - 1, stage - 1)
        if table_ptr is not None:
            record_ptr = next_ptr
            next_ptr = record_of(base_ptr, table_ptr, ahead + step, ahead + step < end, TILES, RECORD_STRIDE)
        copy_tile(at_stage(codes, free), at_stage(key_params, free), value_params.index(free),
                  record_of(base_ptr, None, ahead, True, TILES, RECORD_STRIDE) if table_ptr is None else record_ptr,
                  ahead % TILES, ahead < end, DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS,
                  VALUE_PARAMS, BOOST_CODES, CENTERED)  # fmt: skip
        if draws_ptr is not None:
            drawn = gl.max(asked, axis=0)  # before the next is asked for: it may take the register
            asked = draw(draws_ptr, (turn + 1 >= own) & (ahead < end))
        words, key_scales, key_zeros, value_scales = (), (), (), ()
        for i in gl.static_range(len(SPANS)):
            words = words + (load_words(codes[i].index(stage), SPANS[i][1], KEY_NBITS, VALUE_NBITS),)
        for i in gl.static_range(len(SPANS)):
            key_scale, key_zero = load_key_params(key_params[i].index(stage), SPANS[i][1], KEY_GROUPS)
            key_scales, key_zeros = key_scales + (key_scale,), key_zeros + (key_zero,)
        lines = value_params.index(stage).reshape([2 * GROUPS, 4, TILE // 4])
        value_zero = lines.slice(0, GROUPS).load(gl.SliceLayout(0, ZERO_ROWS))
        for i in gl.static_range(len(SPANS)):
            share = lines.slice(GROUPS + SPANS[i][2], SPANS[i][3])
            value_scales = value_scales + (share.load(ONCE if WIDE else share_layout(SPANS[i][3], TILE // 4)),)
        if BOOST_CODES > 0:
            BOOST_SHAPE: gl.constexpr = words_shape(BOOSTED, BOOST)
            boost_words = codes[len(SPANS)].index(stage).reshape(BOOST_SHAPE).load(words_layout(BOOST_SHAPE))
            boost_scale = key_params[0].index(stage).reshape([2 * DIM // BOOSTED, 4, BOOSTED // 4])
            boost_scale = boost_scale.slice(0, 1).load(share_layout(1, BOOSTED // 4))
        largest = largest_scale_of(value_scales)
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
        margin = gl.maximum((largest.to(gl.int32, bitcast=True) >> 23) - 134, 0).to(gl.float32)  # scales from 2**8 on

        # ---- scores: codes, and the zeros' product, the same for every token of a group
        start = gl.zeros([KEY_GROUPS, 16, 8], gl.float32, MMA)
        for i in gl.static_range(len(SPANS)):
            start = mma_v2(repeated_rows(key_zeros[i]), group_queries[i], start)
        start = start * 2.0 ** (KEY_ROOM - 25)
        start = gl.convert_layout(repeat(start, TILE // KEY_GROUPS // 16, 1), MMA, assert_trivial=True)
        score = gl.zeros([KEY_GROUPS, TILE // KEY_GROUPS, 8], gl.float32, MMA)
        if BOOST_CODES > 0:
            key_scale = gl.convert_layout(operand_order(boost_scale), gl.SliceLayout(2, COLUMNS), assert_trivial=True)
            wide, key_scale = gl.broadcast(boosted_query, key_scale[:, :, None])
            rows = code_rows(boost_words, "key", 1, BOOSTED, BOOST)
            if SHARED:
                score = mma_v2(rows, product_or_rest(wide, key_scale, gl.broadcast(boosted_part, wide)[0]), score)
            else:
                rest = product_or_rest(wide, key_scale, gl.full(wide.shape, -1.0, gl.float16, COLUMNS))
                score = mma_v2(rows, wide * key_scale, mma_v2(rows, rest, score))
            if token_in_byte(BOOSTED, BOOST):
                score = undo_token(score, BOOST)
        if WIDE:
            scaled = ()
            for i in gl.static_range(len(SPANS)):
                scaled = scaled + (queries[i] * up_halves[i],)
        for i in gl.static_range(
            len(SPANS) - 1 if NARROW_KEYS else 0, -1 if NARROW_KEYS else len(SPANS), -1 if NARROW_KEYS else 1
        ):
            key_scale = gl.convert_layout(
                operand_order(key_scales[i]), gl.SliceLayout(2, COLUMNS), assert_trivial=True
            )[:, :, None]
            wide, key_scale = gl.broadcast(scaled[i], key_scale)
            rows = code_rows(words[i][0], "key", KEY_GROUPS, SPANS[i][1], KEY_NBITS)
            if SHARED:
                score = mma_v2(rows, product_or_rest(wide, key_scale, gl.broadcast(parts[i], wide)[0]), score)
            else:
                rest = product_or_rest(wide, key_scale, gl.full(wide.shape, -1.0, gl.float16, COLUMNS))
                score = mma_v2(rows, wide * key_scale, mma_v2(rows, rest, score))
            if token_in_byte(SPANS[i][1], KEY_NBITS):  # the first, of which the others' products go on
                score = undo_token(score, KEY_NBITS)
        if SHARED:
            score += swap_halves(score)
        score += start  # of columns n and n ^ 4 that are added, only n's: the other is nobody's
        score = gl.convert_layout(score.reshape([1, TILE, 8]), MMA, assert_trivial=True)
        score, score_factor = capped(score, packed_factor, softcap)
        if window is not None:  # exact tokens are newer than all that leave it
            token = gl.arange(0, TILE, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
            within = SINK + tile * TILE + token >= length - window
            score = gl.where(gl.broadcast(within, score)[0], score, float("-inf"))
        weight, alpha, peak = softmax_step(score, score_factor, peak, margin)

        # ---- values: sums of p * zero and p, then the codes
        if WIDE:
            value_scales = (lines.slice(GROUPS, GROUPS).load(share_layout(GROUPS, TILE // 4)),)
        value_zero = gl.broadcast(value_zero[None, :, :, :], gl.zeros(ZERO_SHAPE, gl.float16, ZERO_ROWS))[0]
        zero_rows = gl.join(value_zero, gl.full(ZERO_SHAPE, 1.0, gl.float16, ZERO_ROWS))
        zero_rows = zero_rows.reshape([8, 4, TILE // 16, 2, 2, 2]).permute([5, 0, 2, 3, 1, 4]).reshape([1, 16, TILE])
        zero_rows = gl.convert_layout(zero_rows, ROWS, assert_trivial=True)
        sums = rescale_add(sums, alpha, mma_v2(zero_rows, weight, gl.zeros([1, 16, 8], gl.float32, MMA)))
        new_acc = ()
        for i in gl.static_range(len(SPANS)):
            value_scale = gl.convert_layout(
                operand_order(value_scales[i]), gl.SliceLayout(2, COLUMNS), assert_trivial=True
            )[:, :, None]
            own_weight = gl.convert_layout(repeat(weight, SPANS[i][3], 0), COLUMNS, assert_trivial=True)
            own_weight, value_scale = gl.broadcast(own_weight, value_scale)
            rows = code_rows(words[i][1], "value", SPANS[i][3], SPANS[i][1], VALUE_NBITS)
            if token_in_byte(SPANS[i][1], VALUE_NBITS):
                fresh = narrow_values(rows, own_weight * value_scale, VALUE_NBITS)
            else:
                fresh = mma_v2(rows, own_weight * value_scale, gl.zeros(acc[i].shape, gl.float32, MMA))
            own_alpha = gl.convert_layout(repeat(alpha, SPANS[i][3], 0), MMA, assert_trivial=True)
            new_acc = new_acc + (rescale_add(acc[i], own_alpha, fresh),)
        acc = new_acc
        if draws_ptr is None:
            tile += step
            ahead += step
        else:
            tile = ahead
            ahead = gl.where(turn < own, ahead + step, own * step + drawn)
            turn += 1
    async_copy.wait_group(0)
    return acc, sums, peak


@gluon.jit
def span_output(
    acc, sums, FIRST: gl.constexpr, FIRST_GROUP: gl.constexpr, VALUE_NBITS: gl.constexpr, CENTERED: gl.constexpr
):
    """What a span's ``acc`` and the sums of p * zero make of the output; the channels before a group, and in it."""
    GROUPS: gl.constexpr = acc.shape[0]
    WIDTH: gl.constexpr = acc.shape[1]
    PER_HEAD: gl.constexpr = gl.SliceLayout(1, MMA)
    sums_row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    channel = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    group = gl.arange(0, GROUPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, MMA)))[:, None, None]
    out = acc * gl.broadcast(power_of_two(24 - VALUE_NBITS * value_places(GROUPS, WIDTH, VALUE_NBITS)), acc)[0]
    for g in gl.static_range(GROUPS):
        zeros = gl.convert_layout(gl.sum(gl.where(sums_row == FIRST_GROUP + g, sums, 0.0), axis=1), PER_HEAD)[
            :, None, :
        ]
        if CENTERED:  # they are sums of p * scale
            zeros = zeros * (-0.5 * ((1 << VALUE_NBITS) - 1))
        out += gl.where(group == g, zeros, 0.0)
    return out, group * WIDTH, channel + FIRST


@gluon.jit
def attend_part(
    query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, partial_ptr, lse_ptr, codes, key_params, value_params,
    block, slot, first, step, end, first_chunk, step_chunk, end_chunk, length, packed, num_slots, num_records,
    scale_log2, stride_qb, stride_qh, num_queries, stride_ql, new, table_ptr, draws_ptr, out_ptr, pages, order_ptr,
    sinks_ptr, softcap, window, begins,
    NUM_HEADS: gl.constexpr, Q_PER_KV: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, KEY_NBITS: gl.constexpr,
    VALUE_NBITS: gl.constexpr, KEY_GROUPS: gl.constexpr, VALUE_GROUPS: gl.constexpr, RECORD: gl.constexpr,
    SINK: gl.constexpr, RESIDUAL: gl.constexpr, KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr,
    RECORD_WORDS: gl.constexpr, BEGUN: gl.constexpr, EARLY: gl.constexpr, AT_ONCE: gl.constexpr, STAGES: gl.constexpr,
    PAGE: gl.constexpr, BOOST_CODES: gl.constexpr, CENTERED: gl.constexpr,
):  # fmt: skip
    """Some tokens of one row, for one block of query heads: ``(out, lse)`` to place ``slot``; all of them where
    ``out_ptr`` is given, and the result to there.

    ``begins``: whether it has the row's first tokens, and with them the sinks.
    Several queries a row: a block's columns are some of its ``num_queries * Q_PER_KV`` (query, head)s."""
    blocks = ((1 if num_queries is None else num_queries) * Q_PER_KV + HEADS - 1) // HEADS
    SHARED: gl.constexpr = HEADS <= 4  # columns 4..7 are free for the low parts
    SPANS: gl.constexpr = spans(DIM, VALUE_GROUPS)
    PER_HEAD: gl.constexpr = gl.SliceLayout(1, MMA)
    row = (block // (NUM_HEADS * blocks)).to(gl.int64)
    head = block // blocks % NUM_HEADS
    first_head = block % blocks * HEADS
    if table_ptr is None:
        base_ptr = records_ptr + (row * num_records * NUM_HEADS + head) * RECORD_WORDS
    else:
        base_ptr = records_ptr + head * RECORD_WORDS
        table_ptr += row * num_records
    if BOOST_CODES > 0:
        order_ptr += (row * NUM_HEADS + head) * DIM
    if PAGE == 0:
        slots = (row * NUM_HEADS + head) * num_slots * DIM
        exact_key_ptr += slots
        exact_value_ptr += slots
    else:  # of this row and head: its table, strides from page to page and token to token
        exact_key_ptr += head.to(gl.int64) * pages[2]
        exact_value_ptr += head.to(gl.int64) * pages[5]
        pages = (pages[0] + row * pages[7], pages[1], pages[2], pages[3], pages[4], pages[5], pages[6], pages[7])
    n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, COLUMNS)))[None, None, :]
    if SHARED:
        n = n & 3
    real = (n < HEADS) & (first_head + n < Q_PER_KV)
    column = (head * Q_PER_KV + first_head + n) * stride_qh
    newest = None
    if num_queries is not None:
        member = first_head + n
        real = (n < HEADS) & (member < num_queries * Q_PER_KV)
        column = (head * Q_PER_KV + member % Q_PER_KV) * stride_qh + member // Q_PER_KV * stride_ql
    if new is not None:
        n = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, MMA)))[None, None, :]
        position = (first_head + (n & 3 if SHARED else n)) // Q_PER_KV
        since = num_queries - gl.load(new[2] + row)
        newest = (new[0] + row * new[3] + head * new[4], new[1] + row * new[6] + head * new[7], new[5], new[8],
                 num_queries, since, position, (first_head + HEADS - 1) // Q_PER_KV)  # fmt: skip
    sink = None
    if sinks_ptr is not None:
        n = gl.arange(0, 8, layout=gl.SliceLayout(0, PER_HEAD))[None, :]
        member = first_head + (n & 3 if SHARED else n)
        seen = (member < (1 if num_queries is None else num_queries) * Q_PER_KV) & begins
        sink = gl.load(sinks_ptr + head * Q_PER_KV + member % Q_PER_KV, mask=seen, other=0.0).to(gl.float32)
        sink = gl.where(seen, sink * (TWICE_LOG2E / 2), HIDDEN)
    acc, sums, peak = attend_split(
        query_ptr + row * stride_qb, base_ptr, exact_key_ptr, exact_value_ptr, codes, key_params, value_params, first,
        step, end, first_chunk, step_chunk, end_chunk, length, packed, num_slots, scale_log2, column, real, newest,
        table_ptr, draws_ptr, pages, order_ptr, sink, softcap, window, DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUPS,
        VALUE_GROUPS,
        RECORD,
        KEY_PARAMS, VALUE_PARAMS, NUM_HEADS * RECORD_WORDS, SINK, RESIDUAL, SHARED, BEGUN, EARLY, AT_ONCE, STAGES,
        PAGE, BOOST_CODES, CENTERED,
    )  # fmt: skip

    # ---- (out, lse); where no token was seen, zero and HIDDEN
    sums_row = gl.arange(0, 16, layout=gl.SliceLayout(0, gl.SliceLayout(2, MMA)))[None, :, None]
    total = gl.convert_layout(gl.sum(gl.where(sums_row == 8, sums, 0.0), axis=1), PER_HEAD)  # [1, 8]
    saw = total != 0
    if new is not None:  # queries that are padding see nothing
        n = gl.arange(0, 8, layout=gl.SliceLayout(0, PER_HEAD))[None, :]
        saw = saw & ((first_head + (n & 3 if SHARED else n)) // Q_PER_KV >= num_queries - gl.load(new[2] + row))
    inverse = gl.where(saw, 1.0 / gl.where(saw, total, 1.0), 0.0)
    for i in gl.static_range(len(SPANS)):
        out, first_channel, channel = span_output(acc[i], sums, SPANS[i][0], SPANS[i][2], VALUE_NBITS, CENTERED)
        out = out * inverse[:, None, :]
        if new is not None:
            out = gl.where(gl.broadcast(saw[:, None, :], out)[0], out, 0.0)
        n = gl.arange(0, 8, layout=gl.SliceLayout(0, PER_HEAD))[None, :]
        if out_ptr is not None:
            at = ((row * NUM_HEADS + head) * Q_PER_KV + first_head + n)[:, None, :] * DIM + first_channel + channel
            mask = gl.broadcast(((n < HEADS) & (first_head + n < Q_PER_KV))[:, None, :], out)[0]
            gl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=mask)
        else:
            at = slot * HEADS + n
            mask = gl.broadcast((n < HEADS)[:, None, :], out)[0]
            gl.store(partial_ptr + at[:, None, :] * DIM + first_channel + channel, out, mask=mask)
    if out_ptr is None:
        lse = gl.where(saw, peak - HEADROOM + gl.log2(gl.where(saw, total, 1.0)), HIDDEN)
        gl.store(lse_ptr + at, lse, mask=n < HEADS)


@gluon.jit(do_not_specialize=["num_slots", "num_records", "batch_size", "num_splits", "num_queries"])
def attend_kernel(
    query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, order_ptr, lengths_ptr, packed_ptr, partial_ptr, lse_ptr,
    arrivals_ptr, draws_ptr, out_ptr, sinks_ptr, scale_log2, softcap, window, stride_qb, stride_qh, num_slots,
    num_records,
    batch_size, num_splits,
    num_queries, stride_ql, new_key_ptr, new_value_ptr, counts_ptr, stride_kb, stride_kh, stride_kt, stride_vb,
    stride_vh, stride_vt, table_ptr, exact_table_ptr, num_pages,
    stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt,
    NUM_HEADS: gl.constexpr, Q_PER_KV: gl.constexpr, HEADS: gl.constexpr, DIM: gl.constexpr, KEY_NBITS: gl.constexpr,
    VALUE_NBITS: gl.constexpr, KEY_GROUPS: gl.constexpr, VALUE_GROUPS: gl.constexpr, RECORD: gl.constexpr,
    SINK: gl.constexpr, RESIDUAL: gl.constexpr, KEY_PARAMS: gl.constexpr, VALUE_PARAMS: gl.constexpr,
    RECORD_WORDS: gl.constexpr, BLOCK_B: gl.constexpr, AT_ONCE: gl.constexpr, STAGES: gl.constexpr, SPARE: gl.constexpr,
    EARLY: gl.constexpr, WHOLE: gl.constexpr, PAGE: gl.constexpr, BOOST_CODES: gl.constexpr, CENTERED: gl.constexpr,
):  # fmt: skip
    """``BLOCK_B`` 0: program (split, block) has every num_splits-th tile and chunk, and the last one of a block merges
    its parts where ``arrivals_ptr`` has a count for each; ``WHOLE``: there is one, and nothing to merge; where
    ``draws_ptr`` has one, the last tiles are drawn (:func:`owned`).  Else all blocks' units lie in one line
    (:func:`units_of`), and each of the programs has an equal share of it, which may span blocks.  ``SPARE``:
    :func:`spare`.

    ``sinks_ptr``: a logit a query head, or None; ``softcap``: in powers of two, or None; ``window``: tokens, or
    None.
    ``num_queries`` and what follows: several queries a row and their fresh tokens, or None.
    ``table_ptr``: for each row ``num_records`` places, or None: records lie row after row.
    ``exact_table_ptr``: for each row ``num_pages`` pages of ``PAGE`` exact tokens, ``num_slots`` of which a row has at
    most; keys (``stride_x``) and values (``stride_y``) lie by strides from page to page, head to head,
    token to token."""
    pages = None
    if PAGE > 0:
        pages = (exact_table_ptr, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, num_pages)
    of_head = ((1 if num_queries is None else num_queries) * Q_PER_KV + HEADS - 1) // HEADS
    blocks = NUM_HEADS * of_head  # of a row
    FLAT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    SPANS: gl.constexpr = spans(DIM, VALUE_GROUPS)
    STAGE_BITS: gl.constexpr = TILE * (KEY_NBITS if KEY_NBITS > VALUE_NBITS else VALUE_NBITS) * 2  # of a channel
    codes, key_params = (), ()
    for i in gl.static_range(len(SPANS)):
        codes = codes + (gl.allocate_shared_memory(gl.int32, [STAGES, STAGE_BITS * SPANS[i][1] // 32], FLAT),)
    if BOOST_CODES > 0:
        BOOST_WORDS: gl.constexpr = TILE * boosted_channels(DIM) * BOOST // 32
        codes = codes + (gl.allocate_shared_memory(gl.int32, [STAGES, BOOST_WORDS], FLAT),)
    for i in gl.static_range(len(SPANS)):
        key_params = key_params + (
            gl.allocate_shared_memory(gl.float16, [STAGES + SPARE, 2 * KEY_GROUPS * SPANS[i][1]], FLAT),
        )
    value_params = gl.allocate_shared_memory(gl.float16, [STAGES, 2 * padded(VALUE_GROUPS) * TILE], FLAT)
    chunks = (num_slots + CHUNK - 1) // CHUNK
    new = None
    if num_queries is not None:
        chunks += (num_queries + CHUNK - 1) // CHUNK
        new = (new_key_ptr, new_value_ptr, counts_ptr, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt)
    if BLOCK_B == 0:
        split = gl.program_id(0)
        block = gl.program_id(1)
        if num_queries is not None:  # neighbours read the same records
            split, block = block, split
        certain = num_records * (RECORD // TILE)
        row_ptr = records_ptr + (block // blocks).to(gl.int64) * num_records * (NUM_HEADS * RECORD_WORDS)
        base_ptr = row_ptr + block // of_head % NUM_HEADS * RECORD_WORDS
        if table_ptr is None:
            copy_first(codes, key_params, value_params, base_ptr, None, split, num_splits, 0, certain, DIM, KEY_NBITS,
                       VALUE_NBITS, KEY_GROUPS, VALUE_GROUPS, RECORD, KEY_PARAMS, VALUE_PARAMS,
                       NUM_HEADS * RECORD_WORDS, STAGES, BOOST_CODES, CENTERED)  # fmt: skip
        if EARLY:
            if num_queries is None and PAGE == 0 and num_splits - 1 - split < chunks:
                lines = gl.minimum(gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0])) * 64, CHUNK * DIM - 1)
                at = gl.minimum((num_splits - 1 - split) * (CHUNK * DIM) + lines, num_slots * DIM - 1)
                at += (block // of_head).to(gl.int64) * num_slots * DIM
                ask_for(exact_key_ptr + at)
                ask_for(exact_value_ptr + at)
            if BOOST_CODES > 0:
                lines = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0])) * (DIM // 32)
                ask_for(order_ptr + (block // of_head).to(gl.int64) * DIM + lines)
            if table_ptr is None:
                tile = split + (STAGES - 1) * num_splits
                if (
                    tile < gl.load(packed_ptr + block // blocks, cache_modifier=".cg") // TILE
                ):  # of before or after that step
                    prefetch(
                        base_ptr + (tile // (RECORD // TILE)).to(gl.int64) * (NUM_HEADS * RECORD_WORDS), RECORD_WORDS
                    )
            gdc_wait()  # for the step that stored the newest token, where this was launched while it ran
            # combine_kernel may take its places on the device while this one runs, and waits there
            gdc_launch_dependents()
        length = gl.load(lengths_ptr + block // blocks)
        packed = gl.load(packed_ptr + block // blocks)
        attend_part(
            query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, partial_ptr, lse_ptr, codes, key_params,
            value_params, block, block * num_splits + split, split, num_splits, packed // TILE, num_splits - 1 - split,
            num_splits, chunks, length, packed, num_slots, num_records, scale_log2, stride_qb, stride_qh, num_queries,
            stride_ql, new, table_ptr, None if draws_ptr is None else draws_ptr + block, out_ptr if WHOLE else None,
            pages, order_ptr, sinks_ptr, softcap, window, split == 0, NUM_HEADS, Q_PER_KV, HEADS, DIM, KEY_NBITS,
            VALUE_NBITS,
            KEY_GROUPS, VALUE_GROUPS, RECORD,
            SINK, RESIDUAL, KEY_PARAMS, VALUE_PARAMS, RECORD_WORDS, table_ptr is None, EARLY, AT_ONCE, STAGES,
            PAGE, BOOST_CODES, CENTERED,
        )  # fmt: skip
        if arrivals_ptr is not None:
            member = block % of_head * HEADS
            merge_parts(
                partial_ptr, lse_ptr, arrivals_ptr, draws_ptr, out_ptr, block, block // of_head * Q_PER_KV + member,
                Q_PER_KV - member, num_splits, HEADS, DIM,
            )  # fmt: skip
    else:
        if EARLY:
            gdc_wait()
            gdc_launch_dependents()
        LANES: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
        b = gl.arange(0, BLOCK_B, layout=LANES)
        units = units_of(gl.load(packed_ptr + b, mask=b < batch_size, other=0), chunks) * blocks
        units = gl.where(b < batch_size, units, 0)
        ends = gl.associative_scan(units, 0, add)
        total = gl.sum(units, axis=0)
        share = (total + num_splits - 1) // num_splits
        unit = gl.program_id(0) * share
        end = gl.minimum(unit + share, total)
        while unit < end:
            row = gl.sum((ends <= unit).to(gl.int32), axis=0)
            length = gl.load(lengths_ptr + row)
            packed = gl.load(packed_ptr + row)
            own = units_of(packed, chunks)
            inside = unit - gl.sum(gl.where(b < row, units, 0), axis=0)
            block = row * blocks + inside // own
            start = inside % own
            stop = gl.minimum(own, start + end - unit)
            exact = EXACT_UNITS * chunks
            first = gl.maximum(start - exact, 0)
            last = gl.maximum(stop - exact, 0)
            attend_part(
                query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, partial_ptr, lse_ptr, codes, key_params,
                value_params, block, gl.program_id(0) + block, first, 1, last, (start + EXACT_UNITS - 1) // EXACT_UNITS,
                1, (gl.minimum(stop, exact) + EXACT_UNITS - 1) // EXACT_UNITS, length, packed, num_slots, num_records,
                scale_log2, stride_qb, stride_qh, num_queries, stride_ql, new, table_ptr, None, None, pages, order_ptr,
                sinks_ptr, softcap, window, start == 0, NUM_HEADS, Q_PER_KV, HEADS, DIM, KEY_NBITS, VALUE_NBITS,
                KEY_GROUPS, VALUE_GROUPS, RECORD, SINK, RESIDUAL, KEY_PARAMS, VALUE_PARAMS, RECORD_WORDS, False, EARLY,
                AT_ONCE, STAGES, PAGE, BOOST_CODES, CENTERED,
            )  # fmt: skip
            unit += stop - start


def attend(
    query: Tensor,
    stored: Stored,
    layout: Layout,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    *,
    num_splits: int | None = None,
    equal_shares: bool = False,
    num_tokens: int | None = None,
    arrivals: Tensor | None = None,
    early: bool = True,
    out: Tensor | None = None,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention over everything a layer stores; tensors as :func:`kvruntime.methods.kivi.reference.attend` has them.

    For what :func:`supports` allows: one query a row, or up to ``MAX_QUERIES`` that bring ``fresh`` tokens.
    ``lengths``, ``packed`` and the counts are int32 and stay on the device.  Every row is cut into ``num_splits``
    splits (default: the plan's, for rows of ``num_tokens`` or of what the buffers provide for).  ``equal_shares``: all
    rows' tokens lie in one line instead, and each of ``num_splits`` programs has an equal share of it, for heads of up
    to 128 channels and up to ``MAX_ROWS`` rows of very different lengths.  ``arrivals``: int32 zeros, two a query head
    of a row at least, which no other call uses at the same time: then, where a row has one query, programs share out
    the end of long rows as they come to it, and one launch does it all where splits are few.

    ``out [batch_size, num_q_heads, L, value_dim]``: where the output goes, contiguous; None: to a tensor of its own.

    ``early``: from compute capability 9.0 on this is launched while what runs before it on the stream still ends, and
    waits for that before it reads what that may have written, but for one thing: without a block table a program asks
    for its first tiles at once, and asks again for those of the record that ``step`` packs last.  Hence the
    precondition: a kernel before it that lets its dependents start before it ends
    (``griddepcontrol.launch_dependents``) packs into the rows' own records nothing but each row's newest one, as
    ``step`` does.  Kernels that never do, and those over a pool, are always safe; for others give ``early=False``.
    """
    record, sink, residual = layout
    if not supports(record, query, fresh, starts):
        queries = "a line of queries" if starts is not None else f"{query.shape[2]} queries"
        raise ValueError(f"{record} with {queries} of {query.dtype}: see supports()")
    if scores.window is not None and (fresh is not None or residual > scores.window):
        raise ValueError(f"a window of {scores.window}: allowed is one query a row, and no fewer than the residual")
    batch_size, q_heads, length, dim = query.shape
    heads = stored.exact_key.shape[1]
    where = places(stored, layout)
    num_slots, num_records, block_table = where.num_slots, where.num_records, where.block_table
    query = query if query.stride(3) == 1 else query.contiguous()
    num_queries = None if fresh is None else length
    fixed = constants(record, sink, residual, heads, q_heads // heads, num_queries)
    chunks = -(-num_slots // CHUNK.value)
    new: tuple[Any, ...] = (None,) * 9
    if fresh is not None:
        key, value = (x if x.stride(3) == 1 else x.contiguous() for x in fresh[:2])
        if record.rotation:
            value = rotated(value, record.rotation)
        new = (key, value, fresh[2], *key.stride()[:3], *value.stride()[:3])
        chunks += -(-length // CHUNK.value)
    if not chunks:  # nothing is provided for, nothing is held
        return query.new_zeros(batch_size, q_heads, length, dim) if out is None else out.zero_()
    blocks = heads * -(-fixed["Q_PER_KV"] * length // fixed["HEADS"])
    properties = torch.cuda.get_device_properties(query.device)
    sms = properties.multi_processor_count
    block_b = (
        max(32, triton.next_power_of_2(batch_size)) if equal_shares and dim <= 128 and batch_size <= MAX_ROWS else 0
    )
    splits = num_splits
    provided = num_records * record.num_tokens
    longest = provided if num_tokens is None else min(provided, num_tokens)
    if splits is None and block_b:
        splits = PROGRAMS_PER_SM[dim] * sms
    elif splits is None:
        splits = plan_splits(batch_size * blocks, longest // TILE.value + chunks, programs_per_sm(fixed), sms)
    early = early and properties.major >= 9
    draws, count = None, batch_size * blocks
    whole = splits == 1 and fresh is None and not block_b and not record.rotation
    if fresh is not None or block_b or whole or (arrivals is not None and arrivals.numel() < 2 * count):
        arrivals = None
    if arrivals is not None:
        if block_table is None and dim <= 128 and longest // TILE.value // splits > DRAWN.value:
            draws = arrivals[count : 2 * count]
        own = merges(splits, count, fixed["HEADS"] * dim, sms) and not record.rotation  # combine_kernel rotates
        arrivals = arrivals[:count] if own else None
    slots = batch_size * blocks + splits if block_b else 0 if whole else batch_size * blocks * splits
    partial = query.new_empty(slots, fixed["HEADS"], dim, dtype=torch.float32)
    lse = query.new_empty(slots, fixed["HEADS"], dtype=torch.float32)
    if out is None:
        out = query.new_empty(batch_size, q_heads, length, dim)
    grid = (splits, batch_size * blocks) if num_queries is None else (batch_size * blocks, splits)
    launch_kernel(
        attend_kernel, (splits,) if block_b else grid, query, stored.records, stored.exact_key, stored.exact_value,
        stored.key_order, stored.lengths, stored.packed,
        partial, lse, arrivals, draws, out, scores.sinks, scale * merge.LOG2E, scores.softcap_log2, scores.window,
        *query.stride()[:2], num_slots, num_records, batch_size, splits, num_queries,
        None if num_queries is None else query.stride(2), *new, block_table, where.exact_table, where.num_pages,
        *where.strides,
        **fixed, BLOCK_B=block_b, AT_ONCE=batch_size == 1 and not where.page, STAGES=STAGES, PAGE=where.page,
        SPARE=spare(fixed, properties.shared_memory_per_multiprocessor), EARLY=early, WHOLE=whole,
        enable_fp_fusion=True, num_warps=1,
        maxnreg=MAX_REGISTERS[dim] if fresh is None else REGISTERS, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    if arrivals is not None or whole:
        return out
    parts = splits // (batch_size * blocks) + 2 if block_b else splits
    block_s, block_d, warps = plan_merge(parts, dim, record.rotation)
    launch_kernel(
        combine_kernel, (batch_size * q_heads * length, dim // block_d), partial, lse, stored.packed, draws, out,
        chunks, batch_size, splits, num_queries, NUM_HEADS=heads,
        Q_PER_KV=fixed["Q_PER_KV"], HEADS=fixed["HEADS"], DIM=dim, BLOCK_B=block_b, BLOCK_D=block_d, BLOCK_S=block_s,
        EARLY=early, ROTATION=record.rotation,
        enable_fp_fusion=merge.FUSED_MERGE, num_warps=warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
