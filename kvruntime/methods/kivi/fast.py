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
at 2 bits the place of a code in its byte has a bit of the token (``fast_operands.token_in_byte``).

Parallel over splits of the tokens, rows, key/value heads and blocks of 8 query heads.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels import merge
from kvruntime.kernels.launch import launch_kernel
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.methods.kivi.attention import rotated
from kvruntime.methods.kivi.fast_copies import DRAWN, ask_for, copy_first, prefetch
from kvruntime.methods.kivi.fast_merge import EXACT_UNITS, combine_kernel, merge_parts, units_of
from kvruntime.methods.kivi.fast_operands import (
    BOOST,
    CHUNK,
    COLUMNS,
    HEADROOM,
    HIDDEN,
    MMA,
    TWICE_LOG2E,
    add,
    boosted_channels,
    spans,
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
from kvruntime.methods.kivi.fast_split import attend_split, span_output
from kvruntime.methods.kivi.kernel_arguments import places
from kvruntime.methods.kivi.reference import Fresh, Layout, Stored


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
    ``draws_ptr`` has one, the last tiles are drawn (``fast_copies.owned``).  Else all blocks' units lie in one line
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

    ``out [batch_size, num_q_heads, 1, value_dim]``: where the output of one query a row goes, contiguous; None: to a
    tensor of its own, in which a query's heads lie side by side, as a model's output projection reads them.

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
        out = query.new_empty(batch_size, length, q_heads, dim).transpose(1, 2)
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
