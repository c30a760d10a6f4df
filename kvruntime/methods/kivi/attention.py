"""Triton: decode attention over packed records, exact tokens and fresh tokens, in one pass over the data.

For each query row, with online softmax over blocks of tokens (arXiv 2205.14135; split over programs as in
flash-decoding)::

    key, value = code * scale + zero        dequantized in registers, one tile at a time, never stored
    S = scale * query . key                 m' = max(m, max S)      p = exp(S - m')
    l = l * exp(m - m') + sum p             out = out * exp(m - m') + p . value

Parallel over splits of the tokens, key/value heads (whose query heads share every load) and blocks of query rows.
Where all rows' queries are one line, there are as many blocks as any lengths may need, and each finds its
row among the starts.
Splits leave ``(out, lse)`` in float32, and ``combine_kernel`` merges them.  float16 and bfloat16 models multiply in
float16 (bfloat16 data is exact there up to 65,504; the packed part is bounded by ``reference.LIMIT``) and
accumulate in float32; float32 models multiply in float32.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvruntime.kernels import lines
from kvruntime.kernels.hadamard import rotate_kernel
from kvruntime.kernels.launch import launch_kernel, num_multiprocessors
from kvruntime.kernels.lines import row_of
from kvruntime.kernels.merge import (
    COMBINE_D,
    FUSED_MERGE,
    HIDDEN,
    LOG2E,
    combine_kernel,
    scaled,
    sink_logits,
    softmax_step,
)
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.kernels.splits import MAX_SPLITS
from kvruntime.methods.kivi.kernel_arguments import New, places
from kvruntime.methods.kivi.reference import LIMIT, Fresh, Layout, Stored, fresh_type
from kvruntime.methods.kivi.words import (
    boosted_channels,
    chunks,
    groups_in,
    order_axes,
    planes,
    record_constants,
    value_param_offset,
    whole_groups,
    words_before,
)
from kvsim.methods.kivi import Record

WIDE = 512
"""Bytes of a head's channels above which a step takes fewer tokens and rows, so that it fits shared memory."""
REGISTERS = 255
"""Of a thread that looks up a table: left to choose, ptxas takes 168 on sm_80 and spills."""


@triton.jit
def load_plane(words_ptr, STREAM: tl.constexpr, TILE: tl.constexpr, CHANNEL: tl.constexpr, WIDTH: tl.constexpr,
               NBITS: tl.constexpr, BITS: tl.constexpr, LOW: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """One plane of a tile's codes as numbers ``[TILE, WIDTH]``: they become ``DOT`` while still in memory order, so
    that whatever moves between threads is two bytes an element.  In float16 by way of ``1024 + code``, whose last bits
    are the code."""
    AXES: tl.constexpr = order_axes(STREAM, TILE, WIDTH, BITS, 1)
    WORDS: tl.constexpr = TILE * WIDTH * BITS // 32
    at = words_before(TILE, CHANNEL, NBITS, WIDTH, LOW) + tl.arange(0, WORDS)
    index = tl.arange(0, 32 // BITS)
    plane = tl.load(words_ptr + at)[:, None] >> (BITS * (index >> 1) + 16 * (index & 1))[None, :]
    plane = plane & ((1 << BITS) - 1)
    if DOT == tl.float16:
        level = (plane | 0x6400).to(tl.int16).to(tl.float16, bitcast=True) - 1024.0
    else:
        level = plane.to(DOT)
    return tl.reshape(tl.permute(tl.reshape(level, AXES[0]), AXES[1]), (TILE, WIDTH))


@triton.jit
def load_levels(words_ptr, STREAM: tl.constexpr, TILE: tl.constexpr, CHANNEL: tl.constexpr, WIDTH: tl.constexpr,
                NBITS: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """One tile's codes as numbers ``[TILE, WIDTH]`` of type ``DOT``, exact."""
    PLANE_LIST: tl.constexpr = planes(NBITS)
    level = load_plane(words_ptr, STREAM, TILE, CHANNEL, WIDTH, NBITS, PLANE_LIST[0][0], 0, DOT)
    for i in tl.static_range(1, len(PLANE_LIST)):
        plane = load_plane(words_ptr, STREAM, TILE, CHANNEL, WIDTH, NBITS, PLANE_LIST[i][0], PLANE_LIST[i][1], DOT)
        level = level + plane * (1 << PLANE_LIST[i][1])
    return level


@triton.jit
def load_key_tile(record_ptr, half_ptr, params_ptr, zero_offset, tile, C0: tl.constexpr, W: tl.constexpr,
                  DOT: tl.constexpr, KEY_DIM: tl.constexpr, KEY_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr,
                  RECORD: tl.constexpr, TILE: tl.constexpr, KEY_PARAMS: tl.constexpr):  # fmt: skip
    """Keys ``[TILE, W]`` of tile ``tile`` of a record."""
    d = C0 + tl.arange(0, W)
    x = load_levels(record_ptr + tile * (TILE * KEY_DIM * KEY_NBITS // 32), "key", TILE, C0, W, KEY_NBITS, DOT)
    if KEY_GROUP == 0:
        scale = tl.load(params_ptr + d).to(DOT)[None, :]
        zero = tl.load(params_ptr + zero_offset + d).to(DOT)[None, :]
    elif KEY_GROUP >= TILE:
        at = 2 * KEY_PARAMS + tile * TILE // KEY_GROUP * KEY_DIM + d
        scale = tl.load(half_ptr + at).to(DOT)[None, :]
        zero = tl.load(half_ptr + at + RECORD // KEY_GROUP * KEY_DIM).to(DOT)[None, :]
    else:
        GROUPS: tl.constexpr = TILE // KEY_GROUP
        at = 2 * KEY_PARAMS + (tile * GROUPS + tl.arange(0, GROUPS))[:, None] * KEY_DIM + d[None, :]
        scale = tl.load(half_ptr + at).to(DOT)[:, None, :]
        zero = tl.load(half_ptr + at + RECORD // KEY_GROUP * KEY_DIM).to(DOT)[:, None, :]
        x = tl.reshape(x, (GROUPS, KEY_GROUP, W))
    return tl.reshape(tl.fma(x, scale, zero), (TILE, W))  # one rounding, whatever the compiler may fuse


@triton.jit
def load_boost_tile(record_ptr, half_ptr, tile, BOOSTED: tl.constexpr, DOT: tl.constexpr, KEY_DIM: tl.constexpr,
                    KEY_GROUP: tl.constexpr, RECORD: tl.constexpr, TILE: tl.constexpr, KEY_PARAMS: tl.constexpr,
                    BOOST: tl.constexpr, BOOST_CODES: tl.constexpr):  # fmt: skip
    """What the lower bits of the boosted channels add to keys, ``[TILE, BOOSTED]`` of tile ``tile`` of a record."""
    d = tl.arange(0, BOOSTED)
    words_ptr = record_ptr + BOOST_CODES + tile * (TILE * BOOSTED * BOOST // 32)
    x = load_levels(words_ptr, "key", TILE, 0, BOOSTED, BOOST, DOT) * (1.0 / (1 << BOOST))
    if KEY_GROUP >= TILE:
        scale = tl.load(half_ptr + 2 * KEY_PARAMS + tile * TILE // KEY_GROUP * KEY_DIM + d).to(DOT)[None, :]
    else:
        GROUPS: tl.constexpr = TILE // KEY_GROUP
        at = 2 * KEY_PARAMS + (tile * GROUPS + tl.arange(0, GROUPS))[:, None] * KEY_DIM + d[None, :]
        scale = tl.load(half_ptr + at).to(DOT)[:, None, :]
        x = tl.reshape(x, (GROUPS, KEY_GROUP, BOOSTED))
    return tl.reshape(x * scale, (TILE, BOOSTED))


@triton.jit
def load_value_tile(record_ptr, half_ptr, tile, C0: tl.constexpr, W: tl.constexpr, DOT: tl.constexpr,
                    VALUE_DIM: tl.constexpr, VALUE_NBITS: tl.constexpr, VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr,
                    TILE: tl.constexpr, VALUE_CODES: tl.constexpr, VALUE_PARAMS: tl.constexpr,
                    ROTATION: tl.constexpr):  # fmt: skip
    """Values ``[TILE, W]`` of tile ``tile`` of a record."""
    GROUPS: tl.constexpr = groups_in(C0, W, VALUE_GROUP)
    ZEROS: tl.constexpr = RECORD * (VALUE_DIM // VALUE_GROUP)
    t = tile * TILE + tl.arange(0, TILE)
    words_ptr = record_ptr + VALUE_CODES + tile * (TILE * VALUE_DIM * VALUE_NBITS // 32)
    x = load_levels(words_ptr, "value", TILE, C0, W, VALUE_NBITS, DOT)
    if ROTATION > 0:
        scale = tl.load(half_ptr + 2 * VALUE_PARAMS + value_param_offset(0, t, RECORD)).to(DOT)[:, None]
        x = x - 0.5 * ((1 << VALUE_NBITS) - 1)
        zero = tl.zeros([TILE, 1], DOT)
    elif GROUPS[1] - GROUPS[0] == 1:
        at = 2 * VALUE_PARAMS + value_param_offset(GROUPS[0], t, RECORD)
        scale = tl.load(half_ptr + at).to(DOT)[:, None]
        zero = tl.load(half_ptr + at + ZEROS).to(DOT)[:, None]
    elif whole_groups(C0, W, VALUE_GROUP):
        group = GROUPS[0] + tl.arange(0, W // VALUE_GROUP)
        at = 2 * VALUE_PARAMS + value_param_offset(group[None, :], t[:, None], RECORD)
        scale = tl.load(half_ptr + at).to(DOT)[:, :, None]
        zero = tl.load(half_ptr + at + ZEROS).to(DOT)[:, :, None]
        x = tl.reshape(x, (TILE, W // VALUE_GROUP, VALUE_GROUP))
    else:
        group = (C0 + tl.arange(0, W)) // VALUE_GROUP
        at = 2 * VALUE_PARAMS + value_param_offset(group[None, :], t[:, None], RECORD)
        scale = tl.load(half_ptr + at).to(DOT)
        zero = tl.load(half_ptr + at + ZEROS).to(DOT)
    return tl.reshape(tl.fma(x, scale, zero), (TILE, W))  # one rounding, whatever the compiler may fuse


@triton.jit
def load_plain(ptr, at, mask, C0: tl.constexpr, W: tl.constexpr, DOT: tl.constexpr):
    """Plain tokens ``[tokens, W]`` at element offsets ``at`` in the type of the dot, clamped to its range."""
    x = tl.load(ptr + at[:, None] + (C0 + tl.arange(0, W))[None, :], mask=mask[:, None], other=0.0)
    if DOT == tl.float16 and x.dtype != tl.float16:
        x = x.to(tl.float32)
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -65504.0), 65504.0), x)
    return x.to(DOT)


@triton.jit
def attend_plain(query, acc, peak, total, key_ptr, value_ptr, key_at, value_at, visible, held, scale_log2,
                 softcap, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """A block of tokens that lie uncompressed; ``held`` says which of its places hold a token."""
    KEY_CHUNKS: tl.constexpr = chunks(KEY_DIM)
    VALUE_CHUNKS: tl.constexpr = chunks(VALUE_DIM)
    score = tl.zeros(visible.shape, tl.float32)
    for i in tl.static_range(len(KEY_CHUNKS)):
        key = load_plain(key_ptr, key_at, held, KEY_CHUNKS[i][0], KEY_CHUNKS[i][1], DOT)
        score = tl.dot(query[i], tl.trans(key), score, input_precision="ieee")
    weight, alpha, peak, total = softmax_step(scaled(score, scale_log2, softcap), visible, peak, total)
    new_acc = ()
    for i in tl.static_range(len(VALUE_CHUNKS) - 1, -1, -1):
        value = load_plain(value_ptr, value_at, held, VALUE_CHUNKS[i][0], VALUE_CHUNKS[i][1], DOT)
        new_acc = (tl.dot(weight.to(DOT), value, acc[i] * alpha[:, None], input_precision="ieee"),) + new_acc
    return new_acc, peak, total


@triton.jit
def attend_kernel(
    query_ptr, records_ptr, exact_key_ptr, exact_value_ptr, params_ptr, order_ptr, lengths_ptr, packed_ptr, new_key_ptr,
    new_value_ptr, counts_ptr, starts_ptr, table_ptr, exact_table_ptr, out_ptr, lse_ptr, sinks_ptr, scale_log2,
    softcap, window, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt,
    stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, num_queries, num_slots, num_records, num_pages,
    batch_size, num_splits,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_NBITS: tl.constexpr, VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, KEY_PARAMS: tl.constexpr,
    VALUE_PARAMS: tl.constexpr, RECORD_WORDS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DOT: tl.constexpr, NUM_STAGES: tl.constexpr, PAGE: tl.constexpr, BLOCK_B: tl.constexpr, BOOST: tl.constexpr,
    BOOST_CODES: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """Optional: ``sinks_ptr``, a logit a query head; ``softcap``, in powers of two; ``window``, tokens;
    ``order_ptr``, of boosted channels;
    ``counts_ptr``, fresh tokens a row; ``starts_ptr``, where each row begins in the line that queries and fresh tokens
    are, ``BLOCK_B`` of whose rows are looked through; ``table_ptr``, for each row ``num_records`` places of records;
    ``exact_table_ptr``, for each row ``num_pages`` pages of ``PAGE`` exact tokens, keys and values by strides of their
    own."""
    split = tl.program_id(0)
    if BLOCK_B == 0:
        row = tl.program_id(1) // NUM_HEADS
        head = tl.program_id(1) % NUM_HEADS
        m_block = tl.program_id(2)
        query_ptr += row.to(tl.int64) * stride_qb
    else:
        head = tl.program_id(1)
        row, m_block, start, num_queries = row_of(tl.program_id(2), starts_ptr, batch_size, BLOCK_M, Q_PER_KV, BLOCK_B)
        if m_block * BLOCK_M >= num_queries * Q_PER_KV:
            return
        query_ptr += start.to(tl.int64) * stride_ql
    length = tl.load(lengths_ptr + row)
    packed = tl.load(packed_ptr + row)
    KEY_CHUNKS: tl.constexpr = chunks(KEY_DIM)
    VALUE_CHUNKS: tl.constexpr = chunks(VALUE_DIM)
    VALUE_CODES: tl.constexpr = RECORD * KEY_DIM * KEY_NBITS // 32
    TILES: tl.constexpr = RECORD // TILE
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)  # query rows: position * Q_PER_KV + head in the group
    position = m // Q_PER_KV
    query_head = head * Q_PER_KV + m % Q_PER_KV
    real = position < num_queries
    query_at = query_ptr + query_head[:, None].to(tl.int64) * stride_qh + position[:, None] * stride_ql
    query = ()
    for i in tl.static_range(len(KEY_CHUNKS)):
        d = KEY_CHUNKS[i][0] + tl.arange(0, KEY_CHUNKS[i][1])
        query = query + (tl.load(query_at + d[None, :], mask=real[:, None], other=0.0).to(DOT),)
    acc = ()
    for i in tl.static_range(len(VALUE_CHUNKS)):
        acc = acc + (tl.full([BLOCK_M, VALUE_CHUNKS[i][1]], 0.0, tl.float32),)
    peak = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        peak, total = sink_logits(sinks_ptr, query_head, real, split)
    rows = row.to(tl.int64) * NUM_HEADS + head

    # ---- with a window, the token before the first that a query sees
    if window is not None:
        if new_key_ptr is None:
            oldest = length - 1 - window + position * 0
        elif BLOCK_B == 0:
            oldest = length + position - num_queries + tl.load(counts_ptr + row) - window
        else:
            oldest = length + position - window

    # ---- the query in the order of the packed channels, and at the boosted ones
    packed_query = query
    if BOOST > 0:
        BOOSTED: tl.constexpr = boosted_channels(KEY_DIM)
        order_ptr += rows * KEY_DIM
        packed_query = ()
        for i in tl.static_range(len(KEY_CHUNKS)):
            d = tl.load(order_ptr + KEY_CHUNKS[i][0] + tl.arange(0, KEY_CHUNKS[i][1])).to(tl.int32)
            d = tl.minimum(d, KEY_DIM - 1)  # before a first record weights lie there
            packed_query = packed_query + (tl.load(query_at + d[None, :], mask=real[:, None], other=0.0).to(DOT),)
        d = tl.minimum(tl.load(order_ptr + tl.arange(0, BOOSTED)).to(tl.int32), KEY_DIM - 1)
        boost_query = tl.load(query_at + d[None, :], mask=real[:, None], other=0.0).to(DOT)

    # ---- packed records, a contiguous share of the tiles
    num_tiles = packed // TILE
    share = (num_tiles + num_splits - 1) // num_splits
    if table_ptr is None:
        base_ptr = records_ptr + (row.to(tl.int64) * num_records * NUM_HEADS + head) * RECORD_WORDS
    else:
        base_ptr = records_ptr + head * RECORD_WORDS
    record_stride = tl.full([], NUM_HEADS * RECORD_WORDS, tl.int64)
    seq_params_ptr = params_ptr
    if KEY_GROUP == 0:
        seq_params_ptr = params_ptr + rows * KEY_DIM
    for index in tl.range(split * share, tl.minimum(split * share + share, num_tiles), num_stages=NUM_STAGES):
        block = index // TILES
        if table_ptr is not None:
            block = tl.load(table_ptr + row * num_records + block)
        record_ptr = base_ptr + record_stride * block
        half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True)
        tile = index % TILES
        score = tl.zeros([BLOCK_M, TILE], tl.float32)
        if BOOST > 0:
            key = load_boost_tile(record_ptr, half_ptr, tile, BOOSTED, DOT, KEY_DIM, KEY_GROUP, RECORD, TILE,
                                  KEY_PARAMS, BOOST, BOOST_CODES)  # fmt: skip
            score = tl.dot(boost_query, tl.trans(key), score, input_precision="ieee")
        # Narrow chunks first, here and below: Triton deals the warps out by the last product of a chain, and where that
        # has no more columns than rows (16) every warp does all of every product.
        for i in tl.static_range(len(KEY_CHUNKS) - 1, -1, -1):
            key = load_key_tile(record_ptr, half_ptr, seq_params_ptr, batch_size * NUM_HEADS * KEY_DIM, tile,
                                KEY_CHUNKS[i][0], KEY_CHUNKS[i][1], DOT, KEY_DIM, KEY_NBITS, KEY_GROUP, RECORD,
                                TILE, KEY_PARAMS)  # fmt: skip
            score = tl.dot(packed_query[i], tl.trans(key), score, input_precision="ieee")
        score = scaled(score, scale_log2, softcap)
        if window is not None:
            token = SINK + index * TILE + tl.arange(0, TILE)
            score = tl.where(token[None, :] > oldest[:, None], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        alpha = tl.exp2(peak - new_peak)
        weight = tl.exp2(score - new_peak[:, None])
        peak = new_peak
        total = total * alpha + tl.sum(weight, 1)
        new_acc = ()
        for i in tl.static_range(len(VALUE_CHUNKS) - 1, -1, -1):
            value = load_value_tile(record_ptr, half_ptr, tile, VALUE_CHUNKS[i][0], VALUE_CHUNKS[i][1], DOT, VALUE_DIM,
                                    VALUE_NBITS, VALUE_GROUP, RECORD, TILE, VALUE_CODES,
                                    VALUE_PARAMS, ROTATION)  # fmt: skip
            new_acc = (tl.dot(weight.to(DOT), value, acc[i] * alpha[:, None], input_precision="ieee"),) + new_acc
        acc = new_acc

    # ---- exact tokens: the sink, then the ring, or a pool's; the last split, which has the fewest tiles, starts
    n = tl.arange(0, BLOCK_N)
    if PAGE > 0:
        num_slots = length - packed
    for block in range(num_splits - 1 - split, (num_slots + BLOCK_N - 1) // BLOCK_N, num_splits):
        slot = block * BLOCK_N + n
        if PAGE == 0:
            ahead = slot - SINK - packed % RESIDUAL  # ring slots, as distance from the oldest unpacked token
            ahead = tl.where(ahead < 0, ahead + RESIDUAL, ahead)
            token = tl.where(slot < SINK, slot, SINK + packed + ahead)
            held = (slot < num_slots) & (token < length)
            own_key_ptr = exact_key_ptr + rows * num_slots * KEY_DIM
            own_value_ptr = exact_value_ptr + rows * num_slots * VALUE_DIM
            key_at = slot * KEY_DIM
            value_at = slot * VALUE_DIM
        else:
            token = packed + slot
            held = token < length
            page = tl.load(exact_table_ptr + row.to(tl.int64) * num_pages + token // PAGE, mask=held, other=0).to(
                tl.int64
            )
            own_key_ptr = exact_key_ptr + head.to(tl.int64) * stride_xh
            own_value_ptr = exact_value_ptr + head.to(tl.int64) * stride_yh
            key_at = page * stride_xb + token % PAGE * stride_xt
            value_at = page * stride_yb + token % PAGE * stride_yt
        visible = held[None, :] & real[:, None]
        if window is not None:
            visible = visible & (token[None, :] > oldest[:, None])
        acc, peak, total = attend_plain(
            query, acc, peak, total, own_key_ptr, own_value_ptr, key_at, value_at, visible, held,
            scale_log2, softcap, KEY_DIM, VALUE_DIM, DOT,
        )  # fmt: skip

    # ---- fresh tokens, causal
    if new_key_ptr is not None:
        if BLOCK_B == 0:
            first = num_queries - tl.load(counts_ptr + row)
            new_key_ptr += row.to(tl.int64) * stride_kb
            new_value_ptr += row.to(tl.int64) * stride_vb
        else:
            first = 0
            new_key_ptr += start.to(tl.int64) * stride_kt
            new_value_ptr += start.to(tl.int64) * stride_vt
        real = real & (position >= first)
        last = tl.minimum((m_block * BLOCK_M + BLOCK_M - 1) // Q_PER_KV + 1, num_queries)
        for block in range(num_splits - 1 - split, (last + BLOCK_N - 1) // BLOCK_N, num_splits):
            t = block * BLOCK_N + n
            held = (t >= first) & (t < num_queries)
            visible = held[None, :] & real[:, None] & (t[None, :] <= position[:, None])
            if window is not None:
                visible = visible & (length + t[None, :] - first > oldest[:, None])
            acc, peak, total = attend_plain(
                query, acc, peak, total, new_key_ptr + head.to(tl.int64) * stride_kh,
                new_value_ptr + head.to(tl.int64) * stride_vh, t.to(tl.int64) * stride_kt, t.to(tl.int64) * stride_vt,
                visible, held, scale_log2, softcap,
                KEY_DIM, VALUE_DIM, DOT,
            )  # fmt: skip

    # ---- (out, lse) of this split; a query that saw nothing, or is padding, is zero
    saw = real & (total > 0)
    inverse = tl.where(saw, 1.0 / tl.where(saw, total, 1.0), 0.0)
    inside = position < num_queries
    if BLOCK_B == 0:
        out_row = (row.to(tl.int64) * num_queries + position) * (NUM_HEADS * Q_PER_KV) + query_head
    else:
        out_row = (start + position).to(tl.int64) * (NUM_HEADS * Q_PER_KV) + query_head
    out_row = out_row * num_splits + split
    for i in tl.static_range(len(VALUE_CHUNKS)):
        d = VALUE_CHUNKS[i][0] + tl.arange(0, VALUE_CHUNKS[i][1])
        out = tl.where(saw[:, None], acc[i] * inverse[:, None], 0.0)
        tl.store(
            out_ptr + out_row[:, None] * VALUE_DIM + d[None, :], out.to(out_ptr.dtype.element_ty), mask=inside[:, None]
        )
    if lse_ptr is not None:
        lse = tl.where(saw, peak + tl.log2(tl.where(saw, total, 1.0)), HIDDEN)
        tl.store(lse_ptr + out_row, lse, mask=inside)


def plan_splits(programs: int, num_tokens: int, num_sms: int) -> int:
    """Splits of the tokens: enough to fill ``num_sms`` four times over, each of at least 128 tokens."""
    return max(1, min(4 * num_sms // max(1, programs), -(-num_tokens // 128), MAX_SPLITS))


def block_rows(rows: int, dim: int) -> int:
    """Query rows a program: 16 (the matrix unit's least), or 32 where the registers allow.

    Not 64: there Triton 3.6 goes over to Hopper's warp-group instructions, and heads of 96 channels came out wrong (up
    to 0.4 of the norm).
    """
    return 16 if rows <= 16 or dim & (dim - 1) else 32


def attend(
    query: Tensor,
    stored: Stored,
    layout: Layout,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    num_splits: int | None = None,
    num_tokens: int | None = None,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention over everything a layer stores; tensors as :func:`kvruntime.methods.kivi.reference.attend` has them.

    Lengths, counts, starts and tables are int32 and stay on the device.  A query's heads come out side by side, as a
    model's output projection reads them.  ``num_splits`` overrides the plan, which is made for rows of ``num_tokens``,
    or of what the buffers provide for.
    """
    record, sink, residual = layout
    batch_size, heads = len(stored.lengths), stored.exact_key.shape[1]
    where = places(stored, layout)
    query = query if query.stride(-1) == 1 else query.contiguous()
    q_heads = query.shape[1]
    q_per_kv = q_heads // heads
    new_key = new_value = counts = None
    strides: tuple[int, ...] = (0,) * 6
    if fresh is not None:
        new_key, new_value = (x if x.stride(-1) == 1 else x.contiguous() for x in fresh[:2])
        if record.rotation:
            new_value = rotated(new_value, record.rotation)
        counts = fresh[2] if starts is None else None
        strides = New(new_key, new_value, heads, 0, counts, starts).strides()
    num_queries = query.shape[2 if starts is None else 0]
    dim = max(record.key_dim, record.value_dim)
    wide = dim * query.element_size() > WIDE
    block_m = 16 if wide else block_rows(num_queries * q_per_kv, dim)
    if starts is None:
        blocks, rows = -(-num_queries * q_per_kv // block_m), batch_size * heads
        query_strides = query.stride()[:3]
        out = query.new_empty(batch_size, num_queries, q_heads, record.value_dim)
    else:
        blocks, rows = lines.num_blocks(num_queries, batch_size, block_m, q_per_kv), heads
        query_strides = (0, query.stride(1), query.stride(0))
        out = query.new_empty(num_queries, q_heads, record.value_dim)
    if num_splits is None:
        sms = num_multiprocessors(query.device) if query.is_cuda else 1
        provided = where.num_records * record.num_tokens + where.num_slots
        longest = provided if num_tokens is None else min(provided, num_tokens)
        num_splits = plan_splits(rows * blocks, longest, sms)
    partial, lse = out, None
    merged = num_splits > 1 or record.rotation > 0  # whoever merges rotates
    if merged:
        partial = out.new_empty(*out.shape[:-1], num_splits, record.value_dim, dtype=torch.float32)
        lse = out.new_empty(*out.shape[:-1], num_splits, dtype=torch.float32)
    looked_up = where.block_table is not None or where.exact_table is not None or starts is not None
    launch_kernel(
        attend_kernel, (num_splits, rows, blocks), query, stored.records, stored.exact_key, stored.exact_value,
        stored.key_params, stored.key_order,
        stored.lengths, stored.packed, new_key, new_value, counts, starts, where.block_table, where.exact_table,
        partial, lse, scores.sinks, scale * LOG2E, scores.softcap_log2, scores.window, *query_strides, *strides,
        *where.strides,
        num_queries, where.num_slots, where.num_records, where.num_pages, batch_size, num_splits,
        NUM_HEADS=heads, Q_PER_KV=q_per_kv, SINK=sink, RESIDUAL=residual, BLOCK_M=block_m, PAGE=where.page,
        BLOCK_B=0 if starts is None else lines.block_b(batch_size),
        DOT=tl.float32 if query.dtype == torch.float32 else tl.float16, **record_constants(record),
        enable_fp_fusion=True, **launch(record, block_m, wide), **({"maxnreg": REGISTERS} if looked_up else {}),
    )  # fmt: skip
    if merged:
        block_d = record.rotation or COMBINE_D
        launch_kernel(
            combine_kernel, (out.numel() // record.value_dim, triton.cdiv(record.value_dim, block_d)), partial, lse,
            out, num_splits, VALUE_DIM=record.value_dim, BLOCK_D=block_d, ROTATION=record.rotation,
            BLOCK_S=triton.next_power_of_2(num_splits), enable_fp_fusion=FUSED_MERGE,
            num_warps=8 if block_d > 64 else 4,
        )  # fmt: skip
    return out if starts is not None else out.transpose(1, 2)


def rotated(value: Tensor, size: int, dtype: torch.dtype | None = None) -> Tensor:
    """``value [batch_size, heads, tokens, dim]`` rotated as it is stored, or a line's ``[tokens, heads, dim]``;
    in ``dtype``, or in ``fresh_type``."""
    line = value.dim() == 3
    x = value.transpose(0, 1)[None] if line else value
    batch_size, heads, tokens, dim = x.shape
    out = torch.empty((batch_size, heads, tokens, dim), dtype=dtype or fresh_type(x.dtype), device=x.device)
    rotate_kernel[(triton.cdiv(tokens, 16), batch_size * heads)](
        x, out, *x.stride()[:3], tokens, NUM_HEADS=heads, DIM=dim, SIZE=size, BLOCK_T=16,
        BLOCK_D=triton.next_power_of_2(dim), LIMIT=LIMIT, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
    return out[0].transpose(0, 1) if line else out


@cache
def launch(record: Record, block_m: int, wide: bool = False) -> dict[str, int]:
    """Warps, pipeline stages and exact tokens a step.

    Two warps are the fastest that was measured for decoding on an H100 (of 2, 4, 8); where a tile and its scales would
    not fit the registers of two on some card, and for many queries, more.  ``wide``: fewer exact tokens a step.
    """
    dim = max(record.key_dim, record.value_dim)
    odd = dim & (dim - 1) != 0
    light = not odd and (dim <= 64 or (dim == 128 and 0 < record.key_group <= 32))
    warps = 8 if dim > 128 or block_m > 16 else 2 if light else 4
    return {"num_warps": warps, "NUM_STAGES": 2 if warps == 2 else 1, "BLOCK_N": 16 if odd or wide else 32}
