"""Gluon: packed tiles and exact slots of a program's share of a row, for :mod:`kvruntime.methods.kivi.fast`."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy, mma_v2

from kvruntime.methods.kivi.fast_copies import at_stage, copy_first, copy_tile, draw, forget_cached, owned, record_of
from kvruntime.methods.kivi.fast_exact import exact_step
from kvruntime.methods.kivi.fast_operands import (
    BOOST,
    CHUNK,
    COLUMNS,
    HEADROOM,
    HIDDEN,
    MMA,
    ROWS,
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
from kvruntime.methods.kivi.fast_plan import TILE, padded


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
