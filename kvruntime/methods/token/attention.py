"""Triton: attention over tokens that are coded one by one, and over fresh ones, in one pass over the bytes.

For each query, with online softmax over blocks of tokens (arXiv 2205.14135; split over programs as in flash-decoding)::

    S[t] = (level(key code) . query) * key scale[t]          out = sum_t (p[t] * value scale[t]) level(value code)

so that scales multiply one number a token, not a channel.  Codings that rotate have their queries rotated before, once,
and their output turned back where the splits are merged.

Parallel over splits of the tokens, key/value heads (whose query heads share every load) and blocks of queries.  Tokens
are the rows of both products, queries their columns.  A word of codes has several fields: each field of all words of a
token is one operand, multiplied by the query's channels of that field, so no code moves between threads.  Weights are
divided by the largest value scale of their block, so that their products with scales stay within float16.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels import lines
from kvruntime.kernels.hadamard import rotate_rows
from kvruntime.kernels.launch import num_multiprocessors, overlaps
from kvruntime.kernels.lines import row_of
from kvruntime.kernels.merge import COMBINE_D, FUSED_MERGE, HIDDEN, LOG2E, combine_kernel
from kvruntime.kernels.splits import plan_splits
from kvruntime.methods.token import fast, fast_plan
from kvruntime.methods.token.lookup import INTERPRETED, field_at, field_levels, load_shifts, load_tables, unit_of
from kvruntime.methods.token.reference import Fresh, Layout, Stored
from kvruntime.methods.token.store import LIMIT, constants, line_strides, product_dtype, strides_of, table_of
from kvruntime.methods.token.words import (
    chunk_first,
    chunk_width,
    fields_before,
    first_bits,
    num_bytes,
    num_chunks,
    num_pieces,
    piece_bits,
    piece_fields,
    piece_first,
    piece_planes,
    piece_section,
    piece_words,
    rotation,
    word_sizes,
)

OVERHEAD = 2
"""Tiles that a program costs besides its own."""
LEAST_M = 8
MOST_M = {True: 16, False: 8}
"""Queries a program, at least, and at most of codes of four bits and fewer, and of others: more take all registers."""
TILE = 32
"""Tokens a step of the loop; half where more would take all registers of a thread."""
NUM_STAGES = 3
NUM_WARPS = 1
ROTATED_ROWS = 4
"""Vectors that a program of :func:`rotated` takes."""
PROGRAMS_PER_SM = {True: 16, False: 10}
"""Programs of one warp a multiprocessor, as the splits are planned: of codes of four bits at most, and of others."""
LARGE_TILE, LARGE_PROGRAMS = 64, 6
"""Those of few queries a row over fp8, in heads of 128 channels at most."""
MERGED_VALUES = 2048
"""Of a warp of a merge, at most four.  More warps are slower: the next layer's attention finds fewer registers."""


@triton.jit
def channels_of(CODING: tl.constexpr, DIM: tl.constexpr, NUMBER: tl.constexpr, PLACE: tl.constexpr):
    """The channels of the ``PLACE``th field of a piece's words."""
    FIELDS: tl.constexpr = piece_fields(CODING, DIM, NUMBER)
    BITS: tl.constexpr = first_bits(piece_bits(CODING, DIM, NUMBER))
    SIZE: tl.constexpr = BITS * FIELDS
    k = tl.arange(0, piece_words(CODING, DIM, NUMBER))
    d = k * FIELDS
    if SIZE < 16:
        d = k % SIZE * (16 // BITS) + k // SIZE * FIELDS
    return piece_first(CODING, DIM, NUMBER) + d + field_at(PLACE, FIELDS)


@triton.constexpr_function
def levels_at(levels, name, dim, number):
    """The levels of the ``number``th piece; none of codings without."""
    return levels[piece_section(name, dim, number)] if levels else ()


@triton.jit
def load_plane(codes_ptr, at, real, AT: tl.constexpr, SIZE: tl.constexpr, WORDS: tl.constexpr, ACROSS: tl.constexpr):
    """Words ``[tokens, WORDS]`` int16 of ``SIZE`` bits, for each token from byte ``at + AT`` on; with ``ACROSS``
    ``[WORDS, tokens]``.  Of less than 16 bits several lie in one and are still to be shifted
    (:func:`kvruntime.methods.token.lookup.load_shifts`)."""
    k = tl.arange(0, WORDS)
    if SIZE < 16:
        k = k % SIZE
    if ACROSS:
        where = (at // 2 + AT // 2)[None, :] + k[:, None]
        real = real[None, :]
    else:
        where = (at // 2 + AT // 2)[:, None] + k[None, :]
        real = real[:, None]
    return tl.load(codes_ptr.to(tl.pointer_type(tl.int16), bitcast=True) + where, mask=real, other=0)


@triton.jit
def load_piece(codes_ptr, at, real, CODING: tl.constexpr, DIM: tl.constexpr, NUMBER: tl.constexpr,
               ACROSS: tl.constexpr):  # fmt: skip
    """The words of a piece's planes."""
    PLANES: tl.constexpr = piece_planes(CODING, DIM, NUMBER)
    SIZES: tl.constexpr = word_sizes(CODING, DIM, NUMBER)
    words = ()
    for p in tl.static_range(len(PLANES)):
        words = words + (load_plane(codes_ptr, at, real, PLANES[p][1], SIZES[p], piece_words(CODING, DIM, NUMBER),
                                    ACROSS),)  # fmt: skip
    return words


@triton.jit
def load_scales(key_ptr, value_ptr, table_ptr, begin, end, stride_sb, stride_st, stride_zb, stride_zt,
                TILE: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """Scales of ``TILE`` keys and values from token ``begin`` on, as they are stored."""
    n = begin + tl.arange(0, TILE)
    real = n < end
    if PAGE == 0:
        key_at = n.to(tl.int64)
        value_at = key_at
    else:
        block = tl.load(table_ptr + n // PAGE, mask=real, other=0).to(tl.int64)
        key_at = block * stride_sb + n % PAGE * stride_st
        value_at = block * stride_zb + n % PAGE * stride_zt
    return tl.load(key_ptr + key_at, mask=real, other=0.0), tl.load(value_ptr + value_at, mask=real, other=0.0)


@triton.jit
def scale_and_zero(stored, CODING: tl.constexpr):
    """``(scale, 8 - zero point)`` in float32 of scales as they are stored; without zero points the scale twice."""
    if CODING == "int4":
        TYPE: tl.constexpr = stored.dtype
        SAME: tl.constexpr = tl.int32 if TYPE == tl.float32 else tl.int16
        bits = stored.to(SAME, bitcast=True)
        scale = tl.where(stored == stored, bits & ~15, bits).to(SAME).to(TYPE, bitcast=True).to(tl.float32)
        return scale, 8.0 - (bits & 15).to(tl.float32)
    return stored.to(tl.float32), stored.to(tl.float32)


@triton.jit
def new_peak_of(score, visible, peak):
    score = tl.where(visible, score, float("-inf"))
    return score, tl.maximum(peak, tl.max(score, 0))


@triton.jit(
    do_not_specialize=["num_queries", "num_blocks", "batch_size", "num_splits"],
    do_not_specialize_on_alignment=["lengths_ptr", "table_ptr", "starts_ptr"],
)
def attend_kernel(
    query_ptr, key_codes_ptr, key_scale_ptr, value_codes_ptr, value_scale_ptr, key_lookup_ptr, value_lookup_ptr,
    lengths_ptr, table_ptr, new_key_ptr, new_value_ptr, counts_ptr, starts_ptr, partial_ptr, lse_ptr, scale_log2,
    stride_qb, stride_qh, stride_ql, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_xb,
    stride_xh, stride_xt, stride_sb, stride_sh,
    stride_st, stride_yb, stride_yh, stride_yt, stride_zb, stride_zh, stride_zt, num_queries, num_blocks, batch_size,
    num_splits,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_CODING: tl.constexpr, VALUE_CODING: tl.constexpr,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_LEVELS: tl.constexpr, VALUE_LEVELS: tl.constexpr,
    BLOCK_M: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr,
    NUM_STAGES: tl.constexpr, EARLY: tl.constexpr, MORE: tl.constexpr, PAGE: tl.constexpr, BLOCK_B: tl.constexpr,
    FAST: tl.constexpr, LONE: tl.constexpr = False,
):  # fmt: skip
    """``num_queries``: None where each row has one.
    ``MORE``: tokens that a row holds besides those that its length counts.
    ``LONE``: of a row of a line that brings one token, this is counted in its length, and not read as it comes.
    Optional: ``table_ptr``, for each row ``num_blocks`` places of ``PAGE`` tokens; ``new_key_ptr`` and what belongs to
    it, fresh tokens; ``starts_ptr``, where each row begins in the line that queries and fresh tokens are.  ``FAST``:
    levels are looked up in pairs, by instructions of NVIDIA's, with 2 by those that read fp8."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    split = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    if BLOCK_B == 0:
        row = tl.program_id(1) // NUM_HEADS
        head = tl.program_id(1) % NUM_HEADS
        query_ptr += row.to(tl.int64) * stride_qb
    else:
        head = tl.program_id(1)
        row, m_block, start_query, num_queries = row_of(
            tl.program_id(2), starts_ptr, batch_size, BLOCK_M, Q_PER_KV, BLOCK_B
        )
        if m_block * BLOCK_M >= num_queries * Q_PER_KV:
            return
        query_ptr += start_query.to(tl.int64) * stride_ql
    length = tl.load(lengths_ptr + row) + MORE
    share = ((length + num_splits - 1) // num_splits + TILE - 1) // TILE * TILE
    start = split * share
    end = tl.minimum(start + share, length)
    if num_queries is None:
        mask = m < Q_PER_KV
        query_at = (head * Q_PER_KV + m).to(tl.int64) * stride_qh
    else:  # numbered position * Q_PER_KV + head in the group
        if BLOCK_B == 0:
            m_block = tl.program_id(2)
        m += m_block * BLOCK_M
        position = m // Q_PER_KV
        query_head = head * Q_PER_KV + m % Q_PER_KV
        mask = position < num_queries
        query_at = query_head.to(tl.int64) * stride_qh + position.to(tl.int64) * stride_ql
    query = ()  # of each piece and field, [words, BLOCK_M]
    sums = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(num_pieces(KEY_CODING, KEY_DIM)):
        for j in tl.static_range(piece_fields(KEY_CODING, KEY_DIM, i)):
            d = channels_of(KEY_CODING, KEY_DIM, i, j)
            x = tl.load(query_ptr + query_at[None, :] + d[:, None], mask=mask[None, :], other=0.0)
            if DOT == tl.float16 and x.dtype == tl.bfloat16:
                x = tl.minimum(tl.maximum(x.to(tl.float32), -LIMIT), LIMIT)
            query = query + (x.to(DOT),)
            if KEY_CODING == "int4":
                sums += tl.sum(x.to(DOT).to(tl.float32), 0)
    acc = ()
    for i in tl.static_range(num_pieces(VALUE_CODING, VALUE_DIM)):
        for _j in tl.static_range(piece_fields(VALUE_CODING, VALUE_DIM, i)):
            acc = acc + (tl.zeros([piece_words(VALUE_CODING, VALUE_DIM, i), BLOCK_M], tl.float32),)
    zeros = tl.zeros([BLOCK_M], tl.float32)  # what zero points take off every channel
    peak = tl.full([BLOCK_M], -1.0e20, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if PAGE > 0:
        table_ptr += row.to(tl.int64) * num_blocks
        key_codes_ptr += head.to(tl.int64) * stride_xh
        key_scale_ptr += head.to(tl.int64) * stride_sh
        value_codes_ptr += head.to(tl.int64) * stride_yh
        value_scale_ptr += head.to(tl.int64) * stride_zh
    else:
        key_codes_ptr += row.to(tl.int64) * stride_xb + head.to(tl.int64) * stride_xh
        key_scale_ptr += row.to(tl.int64) * stride_sb + head.to(tl.int64) * stride_sh
        value_codes_ptr += row.to(tl.int64) * stride_yb + head.to(tl.int64) * stride_yh
        value_scale_ptr += row.to(tl.int64) * stride_zb + head.to(tl.int64) * stride_zh
    key_tables = ()  # of each piece
    key_shifts = ()
    for i in tl.static_range(num_pieces(KEY_CODING, KEY_DIM)):
        key_shifts = key_shifts + (load_shifts(key_lookup_ptr, KEY_CODING, KEY_DIM, i, False, FAST),)
        if FAST:
            key_tables = key_tables + (load_tables(key_lookup_ptr, KEY_CODING, KEY_DIM, i),)
        else:
            key_tables = key_tables + ((),)
    value_tables = ()
    value_shifts = ()
    for i in tl.static_range(num_pieces(VALUE_CODING, VALUE_DIM)):
        value_shifts = value_shifts + (load_shifts(value_lookup_ptr, VALUE_CODING, VALUE_DIM, i, True, FAST),)
        if FAST:
            value_tables = value_tables + (load_tables(value_lookup_ptr, VALUE_CODING, VALUE_DIM, i),)
        else:
            value_tables = value_tables + ((),)
    key_next, value_next = load_scales(key_scale_ptr, value_scale_ptr, table_ptr, start, end, stride_sb, stride_st,
                                       stride_zb, stride_zt, TILE, PAGE)  # fmt: skip
    for begin in tl.range(start, end, TILE, num_stages=NUM_STAGES):
        n = begin + tl.arange(0, TILE)
        real = n < end
        if PAGE == 0:
            key_at = n * num_bytes(KEY_CODING, KEY_DIM)
            value_at = n * num_bytes(VALUE_CODING, VALUE_DIM)
        else:
            if PAGE % TILE == 0:
                block = tl.load(table_ptr + begin // PAGE).to(tl.int64)
            else:
                block = tl.load(table_ptr + n // PAGE, mask=real, other=0).to(tl.int64)
            key_at = block * stride_xb + n % PAGE * stride_xt
            value_at = block * stride_yb + n % PAGE * stride_yt
        key_scale = key_next
        value_scale = value_next
        key_next, value_next = load_scales(key_scale_ptr, value_scale_ptr, table_ptr, begin + TILE, end, stride_sb,
                                           stride_st, stride_zb, stride_zt, TILE, PAGE)  # fmt: skip
        score = tl.zeros([TILE, BLOCK_M], tl.float32)
        for i in tl.static_range(num_pieces(KEY_CODING, KEY_DIM)):
            words = load_piece(key_codes_ptr, key_at, real, KEY_CODING, KEY_DIM, i, False)
            for j in tl.static_range((piece_fields(KEY_CODING, KEY_DIM, i) + 1) // 2):
                found = field_levels(words, key_shifts[i], key_tables[i], j, KEY_CODING,
                                     levels_at(KEY_LEVELS, KEY_CODING, KEY_DIM, i), piece_bits(KEY_CODING, KEY_DIM, i),
                                     piece_fields(KEY_CODING, KEY_DIM, i), word_sizes(KEY_CODING, KEY_DIM, i), DOT,
                                     FAST)  # fmt: skip
                for e in tl.static_range(len(found)):
                    score = tl.dot(
                        found[e],
                        query[fields_before(KEY_CODING, KEY_DIM, i) + 2 * j + e],
                        score,
                        input_precision="ieee",
                    )
        key_scale, zero = scale_and_zero(key_scale, KEY_CODING)
        if KEY_CODING == "int4":
            score += zero[:, None] * sums[None, :]
        score = score * (key_scale * (scale_log2 * unit_of(KEY_CODING)))[:, None]
        score, new_peak = new_peak_of(score, real[:, None], peak)
        weight = tl.exp2(score - new_peak[None, :])
        alpha = tl.exp2(peak - new_peak)
        total = total * alpha + tl.sum(weight, 0)
        peak = new_peak
        value_scale, zero = scale_and_zero(value_scale, VALUE_CODING)
        most = tl.max(value_scale, 0)
        weight = weight * (value_scale * tl.where(most > 0, 1.0 / tl.where(most > 0, most, 1.0), 0.0))[:, None]
        most = most * unit_of(VALUE_CODING)
        if VALUE_CODING == "int4":
            zeros = zeros * alpha + tl.sum(weight * zero[:, None], 0) * most
        weight = weight.to(DOT)
        new_acc = ()
        for i in tl.static_range(num_pieces(VALUE_CODING, VALUE_DIM)):
            words = load_piece(value_codes_ptr, value_at, real, VALUE_CODING, VALUE_DIM, i, True)
            for j in tl.static_range((piece_fields(VALUE_CODING, VALUE_DIM, i) + 1) // 2):
                found = field_levels(words, value_shifts[i], value_tables[i], j, VALUE_CODING,
                                     levels_at(VALUE_LEVELS, VALUE_CODING, VALUE_DIM, i),
                                     piece_bits(VALUE_CODING, VALUE_DIM, i), piece_fields(VALUE_CODING, VALUE_DIM, i),
                                     word_sizes(VALUE_CODING, VALUE_DIM, i), DOT, FAST)  # fmt: skip
                for e in tl.static_range(len(found)):
                    part = tl.dot(found[e], weight, input_precision="ieee")
                    new_acc = new_acc + (
                        acc[fields_before(VALUE_CODING, VALUE_DIM, i) + 2 * j + e] * alpha[None, :] + part * most,
                    )
        acc = new_acc
    if new_key_ptr is not None:
        if BLOCK_B == 0:
            first = num_queries - tl.load(counts_ptr + row)
            new_key_ptr += row.to(tl.int64) * stride_kb
            new_value_ptr += row.to(tl.int64) * stride_vb
        else:
            first = 0
            new_key_ptr += start_query.to(tl.int64) * stride_kt
            new_value_ptr += start_query.to(tl.int64) * stride_vt
        new_key_ptr += head.to(tl.int64) * stride_kh
        new_value_ptr += head.to(tl.int64) * stride_vh
        seeing = mask & (position >= first)
        last = tl.minimum((m_block * BLOCK_M + BLOCK_M - 1) // Q_PER_KV + 1, num_queries)
        if LONE:
            last = tl.where(num_queries == 1, 0, last)
        NEW: tl.constexpr = 32
        for number in range(num_splits - 1 - split, (last + NEW - 1) // NEW, num_splits):
            t = number * NEW + tl.arange(0, NEW)
            real = (t >= first) & (t < last)
            at = t.to(tl.int64)[:, None]
            score = tl.zeros([NEW, BLOCK_M], tl.float32)
            for i in tl.static_range(num_pieces(KEY_CODING, KEY_DIM)):
                for j in tl.static_range(piece_fields(KEY_CODING, KEY_DIM, i)):
                    kd = channels_of(KEY_CODING, KEY_DIM, i, j)
                    key = tl.load(new_key_ptr + at * stride_kt + kd[None, :], mask=real[:, None], other=0.0)
                    score = tl.dot(number_of(key, DOT), query[fields_before(KEY_CODING, KEY_DIM, i) + j], score,
                                   input_precision="ieee")  # fmt: skip
            visible = real[:, None] & (t[:, None] <= position[None, :])
            score, new_peak = new_peak_of(score * scale_log2, visible, peak)
            weight = tl.exp2(score - new_peak[None, :])
            alpha = tl.exp2(peak - new_peak)
            total = total * alpha + tl.sum(weight, 0)
            peak = new_peak
            zeros = zeros * alpha
            weight = weight.to(DOT)
            new_acc = ()
            for i in tl.static_range(num_pieces(VALUE_CODING, VALUE_DIM)):
                for j in tl.static_range(piece_fields(VALUE_CODING, VALUE_DIM, i)):
                    vd = channels_of(VALUE_CODING, VALUE_DIM, i, j)
                    value = tl.load(new_value_ptr + at * stride_vt + vd[None, :], mask=real[:, None], other=0.0)
                    old = acc[fields_before(VALUE_CODING, VALUE_DIM, i) + j] * alpha[None, :]
                    new_acc = new_acc + (tl.dot(tl.trans(number_of(value, DOT)), weight, old,
                                                input_precision="ieee"),)  # fmt: skip
            acc = new_acc
    saw = total > 0
    if new_key_ptr is not None:
        saw = saw & seeing  # queries that are padding see nothing
    if num_queries is None:
        at = ((row * NUM_HEADS + head) * Q_PER_KV + m).to(tl.int64)
    elif BLOCK_B == 0:
        at = (row.to(tl.int64) * (NUM_HEADS * Q_PER_KV) + query_head) * num_queries + position
    else:
        at = (start_query + position).to(tl.int64) * (NUM_HEADS * Q_PER_KV) + query_head
    at = at * num_splits + split
    inverse = tl.where(saw, 1.0 / tl.where(saw, total, 1.0), 0.0)
    for i in tl.static_range(num_pieces(VALUE_CODING, VALUE_DIM)):
        for j in tl.static_range(piece_fields(VALUE_CODING, VALUE_DIM, i)):
            d = channels_of(VALUE_CODING, VALUE_DIM, i, j)
            result: tl.tensor = acc[fields_before(VALUE_CODING, VALUE_DIM, i) + j]
            if VALUE_CODING == "int4":
                result += zeros[None, :]
            result = tl.where(saw[None, :], result * inverse[None, :], 0.0)
            tl.store(partial_ptr + at[None, :] * VALUE_DIM + d[:, None], result.to(partial_ptr.dtype.element_ty),
                     mask=mask[None, :])  # fmt: skip
    tl.store(lse_ptr + at, tl.where(saw, peak + tl.log2(tl.where(saw, total, 1.0)), HIDDEN), mask=mask)


@triton.jit
def number_of(x, DOT: tl.constexpr):
    """A fresh number in the type of the product, clamped to its range."""
    if DOT == tl.float16 and x.dtype == tl.bfloat16:
        x = x.to(tl.float32)
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -LIMIT), LIMIT), x)
    return x.to(DOT)


@triton.jit
def rotate_kernel(x_ptr, signs_ptr, out_ptr, num_rows, DIM: tl.constexpr, SIZE: tl.constexpr, N: tl.constexpr,
                  EARLY: tl.constexpr):  # fmt: skip
    """``out = H (signs * x)`` of ``N`` rows of contiguous ``x [num_rows, DIM]``."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    r = (tl.program_id(0) * N + tl.arange(0, N)).to(tl.int64)
    for i in tl.static_range(num_chunks(DIM)):
        d = chunk_first(DIM, i) + tl.arange(0, chunk_width(DIM, i))
        at = r[:, None] * DIM + d[None, :]
        x = tl.load(x_ptr + at, mask=(r < num_rows)[:, None], other=0.0).to(tl.float32)
        x = rotate_rows(x * tl.load(signs_ptr + d).to(tl.float32)[None, :], N, chunk_width(DIM, i), SIZE)
        x = tl.where(x == x, tl.minimum(tl.maximum(x, -LIMIT), LIMIT), x)
        tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=(r < num_rows)[:, None])


def rotated(x: Tensor, signs: Tensor, size: int) -> Tensor:
    """``x [..., dim]`` as codes' coordinates are, contiguous, in the type of the products."""
    x = x.contiguous()
    out = torch.empty_like(x, dtype=product_dtype(x))
    dim, early = x.shape[-1], overlaps(x)
    num_rows, each = x.numel() // dim, ROTATED_ROWS
    rotate_kernel[(triton.cdiv(num_rows, each),)](
        x, signs, out, num_rows, DIM=dim, SIZE=size, N=each, EARLY=early, num_warps=1, enable_fp_fusion=False,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def reads_fp8(device: torch.device) -> bool:
    """Whether a device has instructions that read fp8."""
    return torch.cuda.get_device_capability(device) >= (8, 9)


def few_bits(layout: Layout) -> bool:
    """Whether neither keys nor values have codes of more than four bits."""
    return all(name == "int4" or name.startswith("lloyd") for name in (layout.key, layout.value))


def is_fp8(layout: Layout) -> bool:
    """Whether keys and values are fp8."""
    return all(name in ("e4m3", "e5m2") for name in (layout.key, layout.value))


def plan_tile(layout: Layout, block_m: int) -> int:
    """Tokens a step of the loop."""
    streams = ((layout.key, layout.key_dim), (layout.value, layout.value_dim))
    if is_fp8(layout) and block_m == LEAST_M:
        return LARGE_TILE if max(layout.key_dim, layout.value_dim) <= 128 else TILE // 2
    small = few_bits(layout) and all(num_pieces(*each) == 1 for each in streams)
    return TILE if small or block_m == LEAST_M else TILE // 2


def plan_warps(parts: int, dim: int) -> int:
    """Of a program that merges so many parts of ``dim`` channels and rotates them.

    >>> plan_warps(2, 128), plan_warps(32, 128), plan_warps(128, 128)
    (1, 2, 4)
    """
    return max(1, min(4, parts * dim // MERGED_VALUES))


def attend(
    query: Tensor,
    stored: Stored,
    layout: Layout,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    *,
    stepped: bool = False,
    num_tokens: int | None = None,
    num_splits: int | None = None,
    portable: bool = INTERPRETED,
    turned: Tensor | None = None,
    lone: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Attention over everything a layer stores: the tensors are :func:`kvruntime.methods.token.reference.attend`'s.

    ``num_tokens``: the most that a row will hold; it plans the splits (default: what is provided for).  ``num_splits``:
    another number of them.  ``portable``: without instructions of NVIDIA's.  ``turned``: the query as
    :func:`kvruntime.methods.token.store.step` left it, of codings that rotate.  ``lone``: a row of a line that
    brings one token has stored it, and its length counts it.  ``out``: where the output goes, contiguous.
    """
    lengths, heads = stored.lengths, stored.key_codes.shape[1]
    batch_size, q_heads, dtype = len(lengths), query.shape[1], query.dtype
    key_turn, value_turn = (
        rotation(*each) for each in ((layout.key, layout.key_dim), (layout.value, layout.value_dim))
    )
    if key_turn:
        query = rotated(query, stored.key_signs, key_turn) if turned is None else turned
    query = query if query.stride(-1) == 1 else query.contiguous()
    length, q_per_kv = query.shape[2 if starts is None else 0], q_heads // heads
    most_m = MOST_M[few_bits(layout)]
    alone = starts is None and fresh is None and length == 1 and q_per_kv <= most_m
    new_key = new_value = counts = None
    strides: tuple[int | None, ...] = (None,) * 6
    if fresh is not None:
        new_key, new_value, counts = fresh
        new_key = rotated(new_key, stored.key_signs, key_turn) if key_turn else new_key
        new_value = rotated(new_value, stored.value_signs, value_turn) if value_turn else new_value
        new_key, new_value = (x if x.stride(-1) == 1 else x.contiguous() for x in (new_key, new_value))
        counts = None if starts is not None else counts
        strides = (*line_strides(new_key, starts), *line_strides(new_value, starts))
    table, num_blocks = table_of(stored)
    each = q_per_kv * (1 if alone else length)
    block_m = max(LEAST_M, min(most_m, triton.next_power_of_2(each)))
    tile = plan_tile(layout, block_m)
    blocks, rows = triton.cdiv(each, block_m), batch_size * heads
    if starts is not None:
        blocks, rows = lines.num_blocks(length, batch_size, block_m, q_per_kv), heads
    if out is None:
        out = torch.empty(*query.shape[:-1], layout.value_dim, dtype=dtype, device=query.device)
    slots = stored.key_codes.shape[2]
    longest = max(1, num_tokens or (slots if num_blocks is None else slots * num_blocks))
    splits = num_splits
    quick = not portable and fast_plan.supports(query, stored, layout, fresh, starts)
    if splits is None:
        sms = num_multiprocessors(query.device) if query.is_cuda else 1
        at_once = LARGE_PROGRAMS if tile == LARGE_TILE else PROGRAMS_PER_SM[few_bits(layout)]
        if quick:
            own = fast_plan.plan(layout, fast_plan.page_tokens(stored))
            tile, at_once = own.tile, own.programs
        splits = plan_splits(rows * blocks, longest, tile, sms * at_once, OVERHEAD)
    merged = splits > 1 or value_turn > 0 or quick
    lse = torch.empty(*out.shape[:-1], splits, dtype=torch.float32, device=query.device)
    partial = (
        torch.empty(*out.shape[:-1], splits, layout.value_dim, dtype=torch.float32, device=query.device)
        if merged
        else out
    )
    wide = dtype == torch.float32
    early = overlaps(query)
    if quick:
        fast.attend_parts(query, stored, layout, scale, partial, lse, int(stepped))
    else:
        attend_kernel[(splits, rows, blocks)](
            query, stored.key_codes, stored.key_scale, stored.value_codes, stored.value_scale, stored.key_lookup,
            stored.value_lookup, lengths, table, new_key,
            new_value, counts, starts, partial, lse, scale * LOG2E, *line_strides(query, starts), *strides,
            *strides_of(stored), None if alone else length, num_blocks, batch_size, splits, **constants(stored, layout),
            Q_PER_KV=q_per_kv, BLOCK_M=block_m, TILE=tile, DOT=tl.float32 if wide else tl.float16,
            NUM_STAGES=NUM_STAGES, MORE=int(stepped), BLOCK_B=0 if starts is None else lines.block_b(batch_size),
            FAST=0 if wide or portable else 1 + reads_fp8(query.device), LONE=lone, EARLY=early, enable_fp_fusion=True,
            num_warps=NUM_WARPS, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    if merged:
        dim, block_s = value_turn or COMBINE_D, triton.next_power_of_2(splits)
        combine_kernel[(out.numel() // layout.value_dim, triton.cdiv(layout.value_dim, dim))](
            partial, lse, out, splits, VALUE_DIM=layout.value_dim, BLOCK_D=dim, BLOCK_S=block_s, ROTATION=value_turn,
            signs_ptr=stored.value_signs if value_turn else None, enable_fp_fusion=FUSED_MERGE,
            num_warps=plan_warps(block_s, dim) if value_turn else 4, EARLY=early,
            **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out
