"""Triton: KIVI in an engine's pages (:mod:`kvruntime.paged`), with nothing for the host to plan.

``pages_kernel`` packs whole records out of exact pages.  Which of a row's records that are follows from its length with
and without this step's tokens, so a CUDA graph holds for all lengths, and a row whose pages are shared writes the words
that lie there already.  A row that brings one token packs before it attends, as a decode step does: that launch also
stores the token, because none that is packed then is new.  Rows that bring more still read from their pages what they
pack.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels import lines
from kvruntime.kernels.hadamard import rotate_rows, rotated_tokens
from kvruntime.kernels.launch import overlaps
from kvruntime.kernels.lines import row_of
from kvruntime.kernels.slots import store_slots
from kvruntime.methods.kivi import attention
from kvruntime.methods.kivi.attention import load_key_tile, load_value_tile
from kvruntime.methods.kivi.cache import _fast
from kvruntime.methods.kivi.pack import pack_launch, pack_part, permuting
from kvruntime.methods.kivi.paged import layout_of, record_of, stored
from kvruntime.methods.kivi.quantize import LIMIT
from kvruntime.methods.kivi.words import chunks, record_constants
from kvruntime.methods.room import Batch, Pages
from kvsim.methods.kivi import Kivi, Record

ANYWHERE = ["starts_ptr", "lengths_ptr", "slots_ptr", "block_table_ptr", "exact_table_ptr"]
"""What an engine slices from row to row: no step compiles a kernel anew because of where they begin."""


@triton.jit(do_not_specialize=["stride_block", "stride_page"], do_not_specialize_on_alignment=ANYWHERE)
def pages_kernel(
    key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, records_ptr, starts_ptr, lengths_ptr, slots_ptr,
    block_table_ptr, exact_table_ptr, stride_kt, stride_kh, stride_vt, stride_vh, stride_xb, stride_xh, stride_xt,
    stride_yb, stride_yh, stride_yt, stride_block, stride_page,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_NBITS: tl.constexpr,
    VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr,
    TILE: tl.constexpr, RESIDUAL: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUE_PARAMS: tl.constexpr,
    RECORD_WORDS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_D: tl.constexpr, EARLY: tl.constexpr, BOOST: tl.constexpr, BOOST_CODES: tl.constexpr,
    ROTATION: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """One part of a record of one row and head.  ``SINGLE``: of rows that bring one token, which is stored too; else of
    rows that bring more.  Strides of tables are those from row to row."""
    if EARLY:  # whoever reads a pool waits for this launch, and this one has waited for all before it
        gdc_launch_dependents()
        gdc_wait()
    part = tl.program_id(0) % PARTS
    ahead = tl.program_id(0) // PARTS
    row = tl.program_id(1) // NUM_HEADS
    head = (tl.program_id(1) % NUM_HEADS).to(tl.int64)
    start = tl.load(starts_ptr + row)
    count = tl.load(starts_ptr + row + 1) - start
    after = tl.load(lengths_ptr + row)
    if SINGLE:
        if count != 1:
            return
        if part == 0:
            slot = tl.load(slots_ptr + start).to(tl.int64)
            if slot >= 0:
                d = tl.arange(0, BLOCK_D)
                key_ptr += start.to(tl.int64) * stride_kt + head * stride_kh
                value_ptr += start.to(tl.int64) * stride_vt + head * stride_vh
                x = tl.load(key_ptr + d, mask=d < KEY_DIM, other=0.0).to(exact_key_ptr.dtype.element_ty)
                y = tl.load(value_ptr + d, mask=d < VALUE_DIM, other=0.0)
                if ROTATION > 0:
                    y = tl.reshape(y.to(tl.float32), (1, BLOCK_D))
                    y = rotated_tokens(y, exact_value_ptr.dtype.element_ty, 1, BLOCK_D, ROTATION, LIMIT)
                    y = tl.reshape(y, (BLOCK_D,))
                y = y.to(exact_value_ptr.dtype.element_ty)
                key_at = slot // PAGE * stride_xb + head * stride_xh + slot % PAGE * stride_xt
                value_at = slot // PAGE * stride_yb + head * stride_yh + slot % PAGE * stride_yt
                tl.store(exact_key_ptr + key_at + d, x, mask=d < KEY_DIM)
                tl.store(exact_value_ptr + value_at + d, y, mask=d < VALUE_DIM)
    elif count <= 1:
        return
    packed = (tl.maximum(after - count - RESIDUAL, 0) + RECORD - 1) // RECORD * RECORD
    if after - packed - RESIDUAL <= ahead * RECORD:
        return
    first = packed + ahead * RECORD
    block = tl.load(block_table_ptr + row.to(tl.int64) * stride_block + first // RECORD).to(tl.int64)
    record_ptr = records_ptr + (block * NUM_HEADS + head) * RECORD_WORDS
    table_ptr = exact_table_ptr + row.to(tl.int64) * stride_page
    exact_key_ptr += head * stride_xh
    exact_value_ptr += head * stride_yh
    pack_part(part, exact_key_ptr, exact_value_ptr, exact_key_ptr, exact_value_ptr, record_ptr, exact_key_ptr,
              exact_key_ptr, first, after, 0, 0, 0, 0, (table_ptr, stride_xb, stride_xt),
              (table_ptr, stride_yb, stride_yt), KEY_DIM, VALUE_DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUP, VALUE_GROUP,
              RECORD, TILE, 0, RESIDUAL, PAGE, False, KEY_PARAMS, VALUE_PARAMS, SIZE, BOOST, BOOST_CODES,
              ROTATION, MOST)  # fmt: skip


@triton.jit(
    do_not_specialize=["stride_block", "stride_page", "batch_size"],
    do_not_specialize_on_alignment=["starts_ptr", "begins_ptr", "before_ptr", "packed_ptr", *ANYWHERE[3:]],
)
def gather_kernel(
    key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, records_ptr, starts_ptr, before_ptr, packed_ptr, begins_ptr,
    block_table_ptr, exact_table_ptr, out_key_ptr, out_value_ptr, stride_kt, stride_kh, stride_vt, stride_vh, stride_xb,
    stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, stride_block, stride_page, batch_size,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_NBITS: tl.constexpr,
    VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr,
    TILE: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUE_PARAMS: tl.constexpr, RECORD_WORDS: tl.constexpr,
    PAGE: tl.constexpr, DOT: tl.constexpr, BLOCK_B: tl.constexpr, BOOST: tl.constexpr, BOOST_CODES: tl.constexpr,
    ROTATION: tl.constexpr,
):  # fmt: skip
    """A tile of one row and head: packed ones become numbers, others are copied."""
    head = tl.program_id(1).to(tl.int64)
    row, number, begin, length = row_of(tl.program_id(0), begins_ptr, batch_size, TILE, 1, BLOCK_B)
    first = number * TILE
    if first >= length:
        return
    before = tl.load(before_ptr + row)
    packed = tl.load(packed_ptr + row)
    t = first + tl.arange(0, TILE)
    real = t < length
    at = (begin + t).to(tl.int64) * NUM_HEADS + head
    KEY_CHUNKS: tl.constexpr = chunks(KEY_DIM)
    VALUE_CHUNKS: tl.constexpr = chunks(VALUE_DIM)
    if first < packed:
        block = tl.load(block_table_ptr + row.to(tl.int64) * stride_block + first // RECORD).to(tl.int64)
        record_ptr = records_ptr + (block * NUM_HEADS + head) * RECORD_WORDS
        half_ptr = record_ptr.to(tl.pointer_type(tl.float16), bitcast=True)
        tile = first % RECORD // TILE
        for i in tl.static_range(len(KEY_CHUNKS)):
            x = load_key_tile(record_ptr, half_ptr, half_ptr, 0, tile, KEY_CHUNKS[i][0], KEY_CHUNKS[i][1], DOT, KEY_DIM,
                              KEY_NBITS, KEY_GROUP, RECORD, TILE, KEY_PARAMS)  # fmt: skip
            d = KEY_CHUNKS[i][0] + tl.arange(0, KEY_CHUNKS[i][1])
            tl.store(out_key_ptr + at[:, None] * KEY_DIM + d[None, :], x.to(out_key_ptr.dtype.element_ty))
        for i in tl.static_range(len(VALUE_CHUNKS)):
            y = load_value_tile(record_ptr, half_ptr, tile, VALUE_CHUNKS[i][0], VALUE_CHUNKS[i][1], DOT, VALUE_DIM,
                                VALUE_NBITS, VALUE_GROUP, RECORD, TILE, RECORD * KEY_DIM * KEY_NBITS // 32,
                                VALUE_PARAMS, ROTATION)  # fmt: skip
            if ROTATION > 0:
                y = rotate_rows(y.to(tl.float32), TILE, VALUE_CHUNKS[i][1], ROTATION)
            d = VALUE_CHUNKS[i][0] + tl.arange(0, VALUE_CHUNKS[i][1])
            tl.store(out_value_ptr + at[:, None] * VALUE_DIM + d[None, :], y.to(out_value_ptr.dtype.element_ty))
    else:
        stored = t < before
        page = tl.load(exact_table_ptr + row.to(tl.int64) * stride_page + t // PAGE, mask=stored, other=0).to(tl.int64)
        new = (tl.load(starts_ptr + row) + t - before).to(tl.int64)
        for i in tl.static_range(len(KEY_CHUNKS)):
            c = KEY_CHUNKS[i][0] + tl.arange(0, KEY_CHUNKS[i][1])
            held_at = page * stride_xb + head * stride_xh + t % PAGE * stride_xt
            old = tl.load(exact_key_ptr + held_at[:, None] + c[None, :], mask=stored[:, None], other=0.0).to(
                out_key_ptr.dtype.element_ty
            )
            fresh_at = key_ptr + (new * stride_kt + head * stride_kh)[:, None] + c[None, :]
            new_token = tl.load(fresh_at, mask=(real & ~stored)[:, None], other=0.0).to(out_key_ptr.dtype.element_ty)
            out_at = out_key_ptr + at[:, None] * KEY_DIM + c[None, :]
            tl.store(out_at, tl.where(stored[:, None], old, new_token), mask=real[:, None])
        for i in tl.static_range(len(VALUE_CHUNKS)):
            c = VALUE_CHUNKS[i][0] + tl.arange(0, VALUE_CHUNKS[i][1])
            held_at = (
                exact_value_ptr + (page * stride_yb + head * stride_yh + t % PAGE * stride_yt)[:, None] + c[None, :]
            )
            old = tl.load(held_at, mask=stored[:, None], other=0.0)
            if ROTATION > 0:
                old = rotate_rows(old.to(tl.float32), TILE, VALUE_CHUNKS[i][1], ROTATION)
            old = old.to(out_value_ptr.dtype.element_ty)
            fresh_at = value_ptr + (new * stride_vt + head * stride_vh)[:, None] + c[None, :]
            new_token = tl.load(fresh_at, mask=(real & ~stored)[:, None], other=0.0).to(out_value_ptr.dtype.element_ty)
            out_at = out_value_ptr + at[:, None] * VALUE_DIM + c[None, :]
            tl.store(out_at, tl.where(stored[:, None], old, new_token), mask=real[:, None])


def gather(
    method: Kivi, key: Tensor, value: Tensor, pages: Pages, batch: Batch, begins: Tensor, into: tuple[Tensor, Tensor]
) -> None:
    assert batch.block_table is not None
    record, rows = record_of(method, pages), len(batch.lengths)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    heads = pages.key.shape[1]
    gather_kernel[(lines.num_blocks(len(into[0]), rows, record.tile), heads)](
        key, value, pages.key, pages.value, pages.records, batch.starts, batch.before, batch.packed, begins,
        batch.block_table, batch.exact_table, *into, *key.stride()[:2], *value.stride()[:2], *pages.key.stride()[:3],
        *pages.value.stride()[:3], batch.block_table.stride(0), batch.exact_table.stride(0), rows,
        NUM_HEADS=heads, PAGE=pages.key.shape[2], BLOCK_B=lines.block_b(rows),
        DOT=tl.float32 if key.dtype == torch.float32 else tl.float16, **record_constants(record),
        enable_fp_fusion=True, num_warps=gather_warps(record),
    )  # fmt: skip


def gather_warps(record: Record) -> int:
    """Of a program of :func:`gather_kernel`: of a head of 512 channels a tile takes 1,080 bytes of stack with four."""
    widest = 1 << max(record.key_dim, record.value_dim).bit_length() - 1
    return max(4, record.tile * widest // 2048)


def store(method: Kivi, key: Tensor, value: Tensor, pages: Pages, batch: Batch) -> None:
    if batch.most > 1 and len(key):
        rotation = record_of(method, pages).rotation
        held = attention.rotated(value, rotation, pages.value.dtype) if rotation else value
        store_slots(key, held, pages.key, pages.value, batch.slots)
    _launch(method, key, value, pages, batch, single=True)


def pack(method: Kivi, pages: Pages, batch: Batch) -> None:
    if batch.most > 1:
        _launch(method, pages.key[0].transpose(0, 1), pages.value[0].transpose(0, 1), pages, batch, single=False)


def _launch(method: Kivi, key: Tensor, value: Tensor, pages: Pages, batch: Batch, single: bool) -> None:
    """``key`` and ``value`` ``[tokens, num_kv_heads, dim]``: read where ``single``."""
    assert batch.block_table is not None
    record, rows = record_of(method, pages), len(batch.lengths)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    heads = pages.key.shape[1]
    most = 1 if single else -(-batch.most // record.num_tokens)
    launch = pack_launch(record)
    early = single and overlaps(key)
    pages_kernel[(most * launch["PARTS"], rows * heads)](
        key, value, pages.key, pages.value, pages.records, batch.starts, batch.lengths, batch.slots, batch.block_table,
        batch.exact_table, *key.stride()[:2], *value.stride()[:2], *pages.key.stride()[:3], *pages.value.stride()[:3],
        batch.block_table.stride(0), batch.exact_table.stride(0),
        NUM_HEADS=heads, RESIDUAL=method.residual_length, PAGE=pages.key.shape[2], SINGLE=single,
        BLOCK_D=triton.next_power_of_2(max(record.key_dim, record.value_dim)), EARLY=early, **record_constants(record),
        enable_fp_fusion=True, **launch, **permuting(record), **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def attend(
    method: Kivi,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Pages,
    batch: Batch,
    scale: float,
    *,
    out: Tensor | None = None,
    arrivals: Tensor | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    layout = layout_of(method, pages)
    if batch.most > 1:
        held, fresh = stored(pages, batch, batch.before), (key, value, None)
        made = attention.attend(query, held, layout, scale, fresh, batch.starts, num_tokens=num_tokens)
    else:
        held, alone = stored(pages, batch, batch.lengths), query[: len(batch.lengths), :, None]
        fast = _fast()
        if fast is not None and fast.supports(layout.record, alone):
            own: dict[str, Any] = {} if out is None else {"out": out[: len(alone), :, None]}
            made = fast.attend(alone, held, layout, scale, num_tokens=num_tokens, arrivals=arrivals, **own)[:, :, 0]
            if own:
                return made
        else:
            made = attention.attend(alone, held, layout, scale, num_tokens=num_tokens)[:, :, 0]
    if out is None:
        return made
    out[: len(made)].copy_(made)
    return out
