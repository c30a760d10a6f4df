"""Gluon: decode attention over tokens that are coded one by one, in whole numbers on the tensor cores."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels.launch import overlaps
from kvruntime.kernels.merge import HIDDEN, LOG2E
from kvruntime.methods.token.fast_copies import copy_paged, page_of
from kvruntime.methods.token.fast_instructions import (
    divided,
    fma,
    four_of,
    mma,
    own_tables,
    selected,
    swapped,
    transposed,
)
from kvruntime.methods.token.fast_operands import (
    LINE,
    key_operands,
    load_scales,
    output_channel,
    query_channel,
    scale_and_zero,
    value_operands,
    whole_scores,
)
from kvruntime.methods.token.fast_plan import constants, page_tokens, plan
from kvruntime.methods.token.fast_words import (
    center_of,
    held_bytes,
    key_swizzle,
    lanes,
    value_layout,
    value_swizzle,
    value_types,
)
from kvruntime.methods.token.reference import Layout, Stored

MAGIC = gl.constexpr(12582912.0)
MAGIC_BITS = gl.constexpr(0x4B400000)
NAN_LSE = gl.constexpr(1.0e20)
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))
WEIGHT = gl.constexpr(65535.0)
WEIGHT_MAGIC = gl.constexpr(8388608.0)
QUERY = gl.constexpr(32639.0)


@gluon.jit(do_not_specialize=["num_blocks", "num_splits"], do_not_specialize_on_alignment=["lengths_ptr", "table_ptr"])
def attend_kernel(
    query_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr, lengths_ptr, table_ptr, partial_ptr,
    lse_ptr, scale_log2, stride_qb, stride_qh, stride_xb, stride_xh, stride_sb, stride_sh, stride_yb, stride_yh,
    stride_zb, stride_zh, num_blocks, num_splits,
    NUM_HEADS: gl.constexpr, Q_PER_KV: gl.constexpr, KEY_CODING: gl.constexpr, VALUE_CODING: gl.constexpr,
    DIM: gl.constexpr, KEY_LEVELS: gl.constexpr, VALUE_LEVELS: gl.constexpr, KEY_UNIT: gl.constexpr,
    VALUE_UNIT: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr, EARLY: gl.constexpr, MORE: gl.constexpr,
    PAGE: gl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    M: gl.constexpr = TILE // 16
    STEPS: gl.constexpr = DIM // 32
    WARP: gl.constexpr = lanes([8, 4], 0, 1)
    LS: gl.constexpr = lanes([M, 8, 4, 2, 2], 1, 2)
    LS2: gl.constexpr = lanes([1, 8, 4, 2], 1, 2)
    LQ: gl.constexpr = lanes([STEPS, 2, 4, 8, 4], 3, 4)
    keys = gl.allocate_shared_memory(gl.int32, [STAGES, TILE, held_bytes(KEY_CODING, DIM) // 4],
                                     key_swizzle(KEY_CODING, DIM))  # fmt: skip
    VALUE_HELD: gl.constexpr = held_bytes(VALUE_CODING, DIM) // 2
    values = gl.allocate_shared_memory(gl.int16, [STAGES, TILE, VALUE_HELD], value_swizzle(VALUE_HELD))
    SCALES: gl.constexpr = TILE * key_scale_ptr.dtype.element_ty.itemsize // 4
    key_scales = gl.allocate_shared_memory(gl.int32, [STAGES, SCALES], LINE)
    value_scales = gl.allocate_shared_memory(gl.int32, [STAGES, SCALES], LINE)
    split = gl.program_id(0)
    row = gl.program_id(1) // NUM_HEADS
    head = gl.program_id(1) % NUM_HEADS
    length = gl.load(lengths_ptr + row) + MORE
    row64 = row.to(gl.int64)
    head64 = head.to(gl.int64)
    query_ptr += row64 * stride_qb
    key_codes_ptr += head64 * stride_xh
    key_scale_ptr += head64 * stride_sh
    value_codes_ptr += head64 * stride_yh
    value_scale_ptr += head64 * stride_zh
    if PAGE > 0:
        table_ptr += row64 * num_blocks
    else:
        key_codes_ptr += row64 * stride_xb
        key_scale_ptr += row64 * stride_sb
        value_codes_ptr += row64 * stride_yb
        value_scale_ptr += row64 * stride_zb

    # ---- the first tiles are asked for
    end = length
    tiles = (length + TILE - 1) // TILE
    strides = (stride_xb, stride_sb, stride_yb, stride_zb)
    for index in gl.static_range(STAGES - 1):
        tile = split + index * num_splits
        copy_paged(keys, values, key_scales, value_scales, key_codes_ptr, value_codes_ptr, key_scale_ptr,
                   value_scale_ptr, page_of(table_ptr, tile, end, TILE, PAGE), strides, tile, end, index, KEY_CODING,
                   VALUE_CODING, DIM, TILE, PAGE)  # fmt: skip
    page = page_of(table_ptr, split + (STAGES - 1) * num_splits, end, TILE, PAGE)

    # ---- the query in whole numbers of 16 bits: columns 0..3 have the upper bytes, 4..7 the lower
    s = gl.arange(0, STEPS, layout=gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, LQ)))))[
        :, None, None, None, None
    ]
    half = gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, gl.SliceLayout(4, LQ)))))[
        None, :, None, None, None
    ]
    e = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, LQ)))))[
        None, None, :, None, None
    ]
    r = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, LQ)))))[
        None, None, None, :, None
    ]
    c = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, LQ)))))[
        None, None, None, None, :
    ]
    channel = query_channel(s, half, e, c, KEY_CODING, DIM)
    at, real = gl.broadcast((head * Q_PER_KV + (r & 3)) * stride_qh + channel, (r & 3) < Q_PER_KV)
    query = gl.load(query_ptr + at, mask=real, other=0.0).to(gl.float32)
    finite = gl.sum(gl.sum(gl.sum(gl.sum(query * 0.0, axis=2), axis=1), axis=0), axis=1)  # [8], NaN where some is not
    most = gl.max(gl.max(gl.max(gl.max(gl.abs(query), axis=2), axis=1), axis=0), axis=1)
    most = gl.maximum(most, 1.0e-30)
    ROWS: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(4, LQ))))
    most = gl.convert_layout(most, ROWS)
    finite = gl.convert_layout(finite, ROWS)
    whole = query * (QUERY / most)[None, None, None, :, None] + MAGIC
    bits = whole.to(gl.int32, bitcast=True)
    sums = gl.sum(gl.sum(gl.sum(gl.sum(whole - MAGIC, axis=2), axis=1), axis=0), axis=1)
    sums = gl.convert_layout(sums, ROWS)
    upper = gl.broadcast(r < 4, bits)[0]
    byte = gl.where(upper, (bits + 128) >> 8, bits) & 255
    packed = gl.sum(byte << (8 * e), axis=2)  # [STEPS, 2, 8, 4]
    packed = divided(packed.permute([2, 3, 0, 1]).reshape([8, 4, 2 * STEPS]))
    operand = ()
    for i in gl.static_range(2 * STEPS):
        operand = operand + (gl.convert_layout(packed[i], WARP, assert_trivial=True),)

    COLUMN: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, LS)))  # [4, 2]
    factor = gl.convert_layout((most * (scale_log2 * (KEY_UNIT / QUERY)) + finite).reshape([4, 2]), COLUMN)
    center = sums * center_of(KEY_CODING)  # taken off before the sum begins: its upper bytes, and what they leave
    upper = (center * (1.0 / 256.0) + MAGIC) - MAGIC
    center = gl.where(gl.arange(0, 8, layout=ROWS) < 4, upper, center - upper * 256.0)
    center = (MAGIC - center).to(gl.int32, bitcast=True).reshape([4, 2])
    even_start, odd_start = gl.split(gl.convert_layout(center, gl.SliceLayout(0, gl.SliceLayout(1, LS2))))
    nothing = gl.zeros([8, 4], gl.int32, WARP)
    even_start = nothing + gl.convert_layout(even_start, gl.SliceLayout(0, WARP), assert_trivial=True)[None, :]
    odd_start = nothing + gl.convert_layout(odd_start, gl.SliceLayout(0, WARP), assert_trivial=True)[None, :]
    sums_at = gl.convert_layout(sums.reshape([4, 2]), COLUMN)
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, gl.SliceLayout(4, LS)))))[
        None, None, :, None, None
    ]
    own = gl.where(lane < 2, 256.0, 1.0)
    others = gl.where(lane < 2, 1.0, 256.0)
    place = gl.arange(0, 8, layout=gl.SliceLayout(1, WARP))[:, None]
    even_order = gl.where(place < 4, 0x4341, 0x4240)
    odd_order = gl.where(place < 4, 0x3414, 0x2404)

    # ---- tokens of a tile: 16 m + 8 hi + r
    TOKENS: gl.constexpr = gl.SliceLayout(2, gl.SliceLayout(4, LS))  # [M, 8, 2]
    token = (
        gl.arange(0, M, layout=gl.SliceLayout(1, gl.SliceLayout(2, TOKENS)))[:, None, None] * 16
        + gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, TOKENS)))[None, :, None]
        + gl.arange(0, 2, layout=gl.SliceLayout(0, gl.SliceLayout(1, TOKENS)))[None, None, :] * 8
    )

    WORDS: gl.constexpr = VALUE_HELD // 2 if VALUE_CODING == "lloyd3" else VALUE_HELD
    OT: gl.constexpr = WORDS // 16
    OUTS: gl.constexpr = len(value_types(VALUE_CODING))
    ELEMENTS: gl.constexpr = 1 if VALUE_CODING == "int8" else 2
    LO: gl.constexpr = lanes([OT, 8, 4], 1, 2)
    acc = ()
    for _i in gl.static_range(OUTS * ELEMENTS * 2 * 4):
        acc = acc + (gl.zeros([OT, 8, 4], gl.float32, LO),)
    SOME: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(3, LS))  # [8, 4, 2]
    peak = gl.full([4, 2], -1.0e20, gl.float32, COLUMN)
    total = gl.zeros([8, 4, 2], gl.float32, SOME)
    zeros = gl.zeros([8, 4, 2], gl.float32, SOME)
    positive = gl.max(most, axis=0).to(gl.int32, bitcast=True)
    key_tables = own_tables(positive, KEY_LEVELS, WARP, 2)
    VALUE_WORDS: gl.constexpr = 8 if VALUE_CODING == "lloyd3" else WORDS
    value_tables = own_tables(positive, VALUE_LEVELS, value_layout(VALUE_WORDS, 16), 2)
    stage = 0
    for tile in range(split, tiles, num_splits):
        async_copy.wait_group(STAGES - 2)
        free = gl.where(stage == 0, STAGES - 1, stage - 1)
        copy_paged(keys, values, key_scales, value_scales, key_codes_ptr, value_codes_ptr, key_scale_ptr,
                   value_scale_ptr, page, strides, tile + (STAGES - 1) * num_splits, end, free, KEY_CODING,
                   VALUE_CODING, DIM, TILE, PAGE)  # fmt: skip
        page = page_of(table_ptr, tile + STAGES * num_splits, end, TILE, PAGE)  # asked for a step ahead
        key_scale, key_zero = scale_and_zero(
            load_scales(key_scales, stage, key_scale_ptr.dtype.element_ty, TILE, TOKENS), KEY_CODING
        )
        value_scale, value_zero = scale_and_zero(
            load_scales(value_scales, stage, value_scale_ptr.dtype.element_ty, TILE, TOKENS), VALUE_CODING
        )

        # ---- scores
        sums_of = ()
        for m in gl.static_range(M):
            rows = key_operands(keys, stage, m, key_tables, KEY_CODING, DIM, KEY_LEVELS)
            d = (even_start, odd_start, even_start, odd_start)
            for i in gl.static_range(STEPS):
                a = (rows[2 * i], rows[2 * STEPS + 2 * i], rows[2 * i + 1], rows[2 * STEPS + 2 * i + 1])
                d = mma(a, (operand[2 * i], operand[2 * i + 1]), d, False)
            sums_of = sums_of + (gl.join(gl.join(d[0], d[2]), gl.join(d[1], d[3])),)  # [8, 4, 2 (hi), 2 (column)]
        score = whole_scores(sums_of, LS) - MAGIC
        score = fma(swapped(score), others, score * own)  # rounded once, so alike in columns n and n + 4
        if KEY_CODING == "int4":
            score -= key_zero[:, :, None, :, None] * sums_at[None, None, :, None, :]
        score = score * key_scale[:, :, None, :, None]
        if (tile + 1) * TILE > end:
            real_token = tile * TILE + token < end
            score = gl.where(gl.broadcast(real_token[:, :, None, :, None], score)[0], score, float("-inf"))
            value_scale = gl.where(real_token, value_scale, 0.0)
        highest = gl.convert_layout(gl.max(gl.max(gl.max(score, axis=3), axis=0), axis=0), COLUMN, assert_trivial=True)
        highest = gl.maximum(highest * factor, -1.0e20)
        new_peak = gl.maximum(peak, highest)
        alpha = gl.exp2(peak - new_peak)
        beta = gl.exp2(highest - new_peak)
        peak = new_peak
        weight = gl.exp2(fma(score, factor[None, None, :, None, :], -highest[None, None, :, None, :]))
        fresh = gl.convert_layout(gl.sum(gl.sum(weight, axis=3), axis=0), SOME, assert_trivial=True)
        some_alpha = gl.convert_layout(alpha, gl.SliceLayout(0, SOME), assert_trivial=True)[None, :, :]
        some_beta = gl.convert_layout(beta, gl.SliceLayout(0, SOME), assert_trivial=True)[None, :, :]
        total = total * some_alpha + fresh * some_beta

        # ---- weights times scales, over the largest scale
        largest = gl.max(gl.max(gl.max(value_scale, axis=2), axis=0), axis=0)
        inverse = gl.where(largest > 0, 1.0 / gl.where(largest > 0, largest, 1.0), 0.0)
        weight = weight * (value_scale * inverse)[:, :, None, :, None]
        offset = weight
        if VALUE_CODING == "int4":
            offset = weight * value_zero[:, :, None, :, None]
        fresh = gl.convert_layout(gl.sum(gl.sum(offset, axis=3), axis=0), SOME, assert_trivial=True)
        zeros = zeros * some_alpha + fresh * (some_beta * largest)
        weight = gl.fma(
            weight, gl.full(weight.shape, WEIGHT, gl.float32, LS), gl.full(weight.shape, WEIGHT_MAGIC, gl.float32, LS)
        ).to(gl.int32, bitcast=True)
        even, odd = gl.split(weight)
        pair = transposed(even, odd)  # [M, 8, 4, 2 (hi)]
        pairs = divided(pair.permute([1, 2, 0, 3]).reshape([8, 4, 2 * M]))

        # ---- values
        zero = gl.full([OT, 8, 4], MAGIC_BITS, gl.int32, LO)
        products = ()
        for _i in gl.static_range(OUTS * ELEMENTS * 2):
            products = products + ((zero, zero, zero, zero),)
        for m in gl.static_range(M):
            columns = value_operands(values, stage, m, value_tables, VALUE_CODING, DIM, VALUE_LEVELS)
            b_even, b_odd = (), ()
            for hi in gl.static_range(2):
                x = gl.convert_layout(pairs[2 * m + hi], WARP, assert_trivial=True)
                even_bytes = gl.convert_layout(selected(x, even_order), gl.SliceLayout(0, LO), assert_trivial=True)
                odd_bytes = gl.convert_layout(selected(x, odd_order), gl.SliceLayout(0, LO), assert_trivial=True)
                b_even, b_odd = b_even + (even_bytes[None, :, :],), b_odd + (odd_bytes[None, :, :],)
            new_products = ()
            for number in gl.static_range(OUTS):
                for element in gl.static_range(ELEMENTS):
                    a = four_of(columns, (number * 2 + element) * 4)
                    for parity in gl.static_range(2):
                        old: gl.tuple = products[(number * ELEMENTS + element) * 2 + parity]
                        new_products = new_products + (mma(a, b_odd if parity == 1 else b_even, old, True),)
            products = new_products
        # two bits fewer, so that its product with MAGIC is exact
        factor_of = beta * (largest * (1.0 / WEIGHT))
        factor_of = (factor_of.to(gl.int32, bitcast=True) & -4).to(gl.float32, bitcast=True)
        alphas = gl.split(alpha)
        factors = gl.split(factor_of)
        magics = gl.split(factor_of * -MAGIC)
        new_acc = ()
        for number in gl.static_range(OUTS * ELEMENTS * 2):
            for i in gl.static_range(4):
                down = gl.convert_layout(alphas[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                         assert_trivial=True)[None, None, :]  # fmt: skip
                up = gl.convert_layout(factors[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                       assert_trivial=True)[None, None, :]  # fmt: skip
                less = gl.convert_layout(magics[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                         assert_trivial=True)[None, None, :]  # fmt: skip
                part = fma(products[number][i].to(gl.float32, bitcast=True), up, less)
                new_acc = new_acc + (fma(acc[number * 4 + i], down, part),)
        acc = new_acc
        stage = gl.where(stage == STAGES - 1, 0, stage + 1)
    async_copy.wait_group(0)

    # ---- the part
    total = gl.convert_layout(gl.sum(total, axis=0), COLUMN, assert_trivial=True)
    zeros = gl.convert_layout(gl.sum(zeros, axis=0), COLUMN, assert_trivial=True)
    saw = total != 0.0
    inverse = gl.where(saw, VALUE_UNIT / gl.where(saw, total, 1.0), 0.0)
    CENTER: gl.constexpr = 1.0 if VALUE_CODING == "int4" else center_of(VALUE_CODING)
    shift = gl.split(zeros * CENTER)
    inverses = gl.split(inverse)
    lane = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, LO)))[None, None, :]
    word = (
        gl.arange(0, OT, layout=gl.SliceLayout(1, gl.SliceLayout(2, LO)))[:, None, None] * 16
        + gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LO)))[None, :, None]
    )
    own = gl.where(lane < 2, 256.0, 1.0)
    others = gl.where(lane < 2, 1.0, 256.0)
    slot = (row64 * NUM_HEADS + head) * Q_PER_KV
    for number in gl.static_range(OUTS):
        for element in gl.static_range(ELEMENTS):
            for parity in gl.static_range(2):
                for i in gl.static_range(4):
                    x = acc[((number * ELEMENTS + element) * 2 + parity) * 4 + i]
                    x = swapped(x) * others + x * own
                    off = gl.convert_layout(shift[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                            assert_trivial=True)[None, None, :]  # fmt: skip
                    by = gl.convert_layout(inverses[i % 2], gl.SliceLayout(0, gl.SliceLayout(1, LO)),
                                           assert_trivial=True)[None, None, :]  # fmt: skip
                    x = (x - off) * by
                    member = 2 * lane + i % 2
                    d = output_channel(word + 8 * (i // 2), number, element, parity, VALUE_CODING)
                    at, mask = gl.broadcast(((slot + member) * num_splits + split) * DIM + d, member < Q_PER_KV)
                    mask = gl.broadcast(mask, x)[0]
                    gl.store(partial_ptr + at, x, mask=mask)
    CE: gl.constexpr = COLUMN
    member = (
        2 * gl.arange(0, 4, layout=gl.SliceLayout(1, CE))[:, None]
        + gl.arange(0, 2, layout=gl.SliceLayout(0, CE))[None, :]
    )
    lse = gl.where(saw, peak + gl.log2(gl.where(saw, total, 1.0)), HIDDEN)
    lse = gl.where(total == total, lse, NAN_LSE)  # a part that is not a number hides all others
    gl.store(lse_ptr + (slot + member) * num_splits + split, lse, mask=member < Q_PER_KV)


def attend_parts(
    query: Tensor, stored: Stored, layout: Layout, scale: float, partial: Tensor, lse: Tensor, more: int
) -> None:
    """Each split's output to ``partial [batch_size, num_q_heads, 1, splits, dim]``, its logarithm of sums to ``lse``.

    ``query``: rotated as the keys are; ``more``: tokens that a row holds besides those that its length counts."""
    batch_size, q_heads = query.shape[:2]
    heads, splits, page = stored.key_codes.shape[1], lse.shape[-1], page_tokens(stored)
    own, table = plan(layout, page), None if stored.block_table is None else stored.block_table.contiguous()
    early = overlaps(query)
    attend_kernel[(splits, batch_size * heads)](
        query, stored.key_codes, stored.key_scale, stored.value_codes, stored.value_scale, stored.lengths, table,
        partial, lse, scale * LOG2E, *query.stride()[:2], *(stride for x in stored[:4] for stride in x.stride()[:2]),
        None if table is None else table.shape[1], splits,
        NUM_HEADS=heads, Q_PER_KV=q_heads // heads, **constants(layout), TILE=own.tile, STAGES=own.stages, EARLY=early,
        MORE=more, PAGE=page, enable_fp_fusion=True, num_warps=1, maxnreg=own.registers,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
