"""Triton: one decode step's new token, with nothing for the host to plan (the kernel of :meth:`KiviLayer.step`).

A program stores the new token of one row and head.  It applies the rotary embedding to the token's key and to the query
heads that share it.  Where the ring of exact slots is full, it first packs the ring's oldest record; then the token
goes to its slot.  Where rows and heads are few, each part of a record has a program of its own, and the token is stored
by the parts that hold the record's first token, because they alone read what lay in its slot.

All that a token needs is asked for at once, because nothing else takes time here.  Programs count each other only where
a record is packed: the last of a row's programs writes the row's number of packed tokens, when all have read it.  The
row's length comes from ``lengths``, which no program here changes before all have read it.  Everything that a step
decides lies in device memory, so a CUDA graph of it holds for any lengths.
"""

from __future__ import annotations

from functools import cache

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels.hadamard import rotated_tokens
from kvruntime.kernels.launch import launch_kernel, overlaps
from kvruntime.kernels.rotary import embedded_token
from kvruntime.methods.kivi.boost import choose_order
from kvruntime.methods.kivi.first_record import freeze
from kvruntime.methods.kivi.kernel_arguments import New, places
from kvruntime.methods.kivi.pack import in_word_order, num_parts, pack_part, pack_warps, permuting, record_at
from kvruntime.methods.kivi.pack_words import direct, key_part, num_key_parts, num_value_parts
from kvruntime.methods.kivi.quantize import LIMIT
from kvruntime.methods.kivi.reference import Layout, Stored
from kvruntime.methods.kivi.words import MOST_CODES, record_constants
from kvsim.methods.kivi import Record

FEW_PROGRAMS = 264
"""A record's parts have a program each while those are no more (an H100 has 132 multiprocessors)."""
PART_WARPS = 4
"""Of a part's program."""
WHOLE = 16384
"""Elements that a program packs at once where it packs a whole record."""


@triton.constexpr_function
def key_columns(record_length, dim, nbits, group, size, other):
    """Channels of a key part: all parts with a record's first tokens come first, one beside the other."""
    return key_part(record_length, dim, group, size)[1] if direct(dim, nbits, group, other) else dim


@triton.jit
def step_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, exact_key_ptr, exact_value_ptr, records_ptr, params_ptr, order_ptr,
    lengths_ptr, positions_ptr, held_ptr, packed_ptr, ticket_ptr, block_table_ptr, exact_table_ptr, stride_qb,
    stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh,
    stride_yt, num_slots, num_records, num_pages, batch_size,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    KEY_NBITS: tl.constexpr, VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr,
    RECORD: tl.constexpr, TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, KEY_PARAMS: tl.constexpr,
    VALUE_PARAMS: tl.constexpr, RECORD_WORDS: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, SIZE: tl.constexpr, SPREAD: tl.constexpr, ROTARY: tl.constexpr, EARLY: tl.constexpr,
    PAGE: tl.constexpr, BOOST: tl.constexpr, BOOST_CODES: tl.constexpr, ROTATION: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """``SPREAD``: each of a record's parts, of ``SIZE`` elements, has a program of its own.  ``lengths_ptr`` is read,
    ``held_ptr`` and ``packed_ptr`` are written.  Tables, strides and ``PAGE``: as
    :func:`kvruntime.methods.kivi.pack.pack_kernel`."""
    if EARLY:
        # the attention that may start now reads records of earlier steps: all written, because the attention of the
        # step before waited for them before it let anything start
        gdc_launch_dependents()
        gdc_wait()
    KEY_PARTS: tl.constexpr = num_key_parts(RECORD, KEY_DIM, KEY_NBITS, KEY_GROUP, SIZE, BOOST)
    PARTS: tl.constexpr = KEY_PARTS + num_value_parts(RECORD, VALUE_DIM, VALUE_NBITS, VALUE_GROUP, SIZE, ROTATION)
    PROGRAMS: tl.constexpr = PARTS if SPREAD else 1  # of a row and head
    program = tl.program_id(0) % PROGRAMS
    row = tl.program_id(0) // (NUM_HEADS * PROGRAMS)
    head = tl.program_id(0) // PROGRAMS % NUM_HEADS
    length = tl.load(lengths_ptr + row)
    packed = tl.load(packed_ptr + row)
    position = length
    if ROTARY:
        position = tl.load(positions_ptr + row)
    d = tl.arange(0, BLOCK_K)
    v = tl.arange(0, BLOCK_V)
    own_key, own_value, own_query = d < KEY_DIM, v < VALUE_DIM, d < KEY_DIM
    if SPREAD:  # a token's slot is read by those parts alone that have the record's first token: they store it
        WIDTH: tl.constexpr = key_columns(RECORD, KEY_DIM, KEY_NBITS, KEY_GROUP, SIZE, BOOST)
        first = program * WIDTH
        own_key = (d >= first) & (d < tl.minimum(first + WIDTH, KEY_DIM))
        own_value = v < tl.where(program == KEY_PARTS, VALUE_DIM, 0)
        own_query = d < tl.where(program == PARTS - 1, KEY_DIM, 0)
    query_ptr += row.to(tl.int64) * stride_qb
    key_ptr += row.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    value_ptr += row.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    key, query, query_at, real = embedded_token(query_ptr, key_ptr, cos_ptr, sin_ptr, position, head, stride_qh,
                                                own_key, own_query, d, ROTARY, KEY_DIM, Q_PER_KV, BLOCK_Q)  # fmt: skip
    value = tl.load(value_ptr + v, mask=own_value, other=0.0)
    if ROTATION > 0:
        value = tl.reshape(value.to(tl.float32), (1, BLOCK_V))
        value = rotated_tokens(value, exact_value_ptr.dtype.element_ty, 1, BLOCK_V, ROTATION, LIMIT)
        value = tl.reshape(value, (BLOCK_V,))
    tl.debug_barrier()  # all of the program has read what is written below
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
    full = length - SINK - packed >= RESIDUAL
    seen = -1
    if full:
        seen = tl.atomic_add(ticket_ptr + row, 1)  # ``packed`` may change only when all have read it
        number = packed // RECORD
        record_ptr = record_at(records_ptr, block_table_ptr, row, number, num_records, head, NUM_HEADS, RECORD_WORDS)
        row_params_ptr = params_ptr
        if KEY_GROUP == 0:
            row_params_ptr = params_ptr + rows * KEY_DIM
        if BOOST > 0:
            order_ptr += rows * KEY_DIM
            if packed == 0:
                if not SPREAD or program < KEY_PARTS:
                    choose_order(exact_key_ptr, exact_key_ptr, order_ptr, SINK, length, 0, 0, key_pages, False, KEY_DIM,
                                 BLOCK_K, RECORD, SINK, RESIDUAL, PAGE)  # fmt: skip
                    tl.debug_barrier()  # threads read what others wrote
        for turn in tl.static_range(1 if SPREAD else PARTS):
            part = turn
            if SPREAD:
                part = program
            pack_part(part, exact_key_ptr, exact_value_ptr, exact_key_ptr, exact_value_ptr, record_ptr, row_params_ptr,
                      order_ptr, SINK + packed, length, 0, 0, 0, batch_size * NUM_HEADS * KEY_DIM, key_pages,
                      value_pages, KEY_DIM, VALUE_DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUP, VALUE_GROUP, RECORD, TILE,
                      SINK, RESIDUAL, PAGE, False, KEY_PARAMS, VALUE_PARAMS, SIZE, BOOST,
                      BOOST_CODES, ROTATION, MOST)  # fmt: skip
        tl.debug_barrier()  # the token takes the slot of the oldest one packed
    if PAGE == 0:
        slot = length
        if length >= SINK:
            slot = SINK + (length - SINK) % RESIDUAL
        key_at = slot * KEY_DIM
        value_at = slot * VALUE_DIM
    else:
        page = tl.load(exact_table_ptr + row.to(tl.int64) * num_pages + length // PAGE).to(tl.int64)
        key_at = page * stride_xb + length % PAGE * stride_xt
        value_at = page * stride_yb + length % PAGE * stride_yt
    tl.store(query_at, query, mask=real)
    tl.store(exact_key_ptr + key_at + d, key.to(exact_key_ptr.dtype.element_ty), mask=own_key)
    tl.store(exact_value_ptr + value_at + v, value.to(exact_value_ptr.dtype.element_ty), mask=own_value)
    if tl.program_id(0) == row * (NUM_HEADS * PROGRAMS):
        tl.store(held_ptr + row, length + 1)
    if seen == NUM_HEADS * PROGRAMS - 1:
        tl.store(packed_ptr + row, packed + RECORD)
        tl.store(ticket_ptr + row, 0)


@cache
def parts_launch(record: Record) -> tuple[int, int, int]:
    """Programs a row and head where a record's parts have one each, elements of such a part, and its program's warps.

    Narrow heads have two parts: every program is one more that a step without a record to pack starts."""
    size = 4096 if max(record.key_dim, record.value_dim) <= 64 else 2048
    return num_parts(record, size), size, PART_WARPS if in_word_order(record) else pack_warps(record)


def supports(record: Record, residual: int) -> bool:
    """Whether :func:`step` runs this record: a full ring holds at least one."""
    return record.num_tokens <= residual


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stored: Stored,
    layout: Layout,
    lengths: Tensor,
    positions: Tensor,
    ticket: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Store one token a row, pack what must make room, and count both.

    The tensors are :func:`kvruntime.methods.kivi.reference.step`'s.

    ``ticket [batch_size]``: int32 zeros, and zeros again afterwards.  Key and value lie channel by channel.  The caller
    has provided for the token.  Raises ``ValueError`` for what :func:`supports` does not allow.
    """
    record, sink, residual = layout
    if not supports(record, residual):
        raise ValueError(
            f"records of {record.num_tokens} tokens and a residual of {residual}: a step packs from the residual alone"
        )
    batch_size, heads = key.shape[:2]
    where = places(stored, layout)
    if stored.key_params is not None:
        freeze(New(key, value, heads, 1, None, None), stored, layout)
    cos, sin = rotary if rotary is not None else (None, None)
    programs, size, warps = parts_launch(record)
    if not (spread := batch_size * heads * programs <= FEW_PROGRAMS):
        programs, size, warps = 1, WHOLE, pack_warps(record)
    own = {} if spread else permuting(record)
    early = overlaps(key)
    launch_kernel(
        step_kernel, (batch_size * heads * programs,), query, key, value, cos, sin, stored.exact_key,
        stored.exact_value, stored.records, stored.key_params,
        stored.key_order, lengths, positions, stored.lengths, stored.packed, ticket, where.block_table,
        where.exact_table, *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], *where.strides, where.num_slots,
        where.num_records, where.num_pages, batch_size,
        NUM_HEADS=heads, Q_PER_KV=query.shape[1] // heads, SINK=sink, RESIDUAL=residual, **record_constants(record),
        BLOCK_Q=triton.next_power_of_2(query.shape[1] // heads), BLOCK_K=triton.next_power_of_2(record.key_dim),
        BLOCK_V=triton.next_power_of_2(record.value_dim), SIZE=size, SPREAD=spread, ROTARY=rotary is not None,
        PAGE=where.page, EARLY=early, MOST=MOST_CODES, enable_fp_fusion=False, num_warps=warps, **own,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
