"""Triton: KIVI in an engine's pages (:mod:`kvruntime.paged`), with nothing for the host to plan.

``pages_kernel`` packs whole records out of exact pages.  Which of a row's records that are follows from its length with
and without this step's tokens, so a CUDA graph holds for all lengths, and a row whose pages are shared writes the words
that lie there already.  A row that brings one token packs before it attends, as a decode step does: that launch also
stores the token, because none that is packed then is new.  Rows that bring more attend first.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels.launch import overlaps
from kvruntime.kernels.slots import store_slots
from kvruntime.methods.kivi import attention
from kvruntime.methods.kivi.cache import _fast
from kvruntime.methods.kivi.pack import pack_launch, pack_part, permuting
from kvruntime.methods.kivi.paged import layout_of, record_of, stored
from kvruntime.methods.kivi.words import record_constants
from kvruntime.methods.room import Batch, Pages
from kvsim.methods.kivi import Kivi


@triton.jit
def pages_kernel(
    key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, records_ptr, starts_ptr, lengths_ptr, slots_ptr,
    block_table_ptr, exact_table_ptr, stride_kt, stride_kh, stride_vt, stride_vh, stride_xb, stride_xh, stride_xt,
    stride_yb, stride_yh, stride_yt, stride_block, stride_page,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_NBITS: tl.constexpr,
    VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr,
    TILE: tl.constexpr, RESIDUAL: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUE_PARAMS: tl.constexpr,
    RECORD_WORDS: tl.constexpr, PARTS: tl.constexpr, SIZE: tl.constexpr, PAGE: tl.constexpr, SINGLE: tl.constexpr,
    BLOCK_D: tl.constexpr, EARLY: tl.constexpr, BOOST: tl.constexpr, BOOST_CODES: tl.constexpr,
    ROTATION: tl.constexpr,
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
                y = tl.load(value_ptr + d, mask=d < VALUE_DIM, other=0.0).to(exact_value_ptr.dtype.element_ty)
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
              ROTATION)  # fmt: skip


def store(method: Kivi, key: Tensor, value: Tensor, pages: Pages, batch: Batch) -> None:
    if batch.most > 1:
        store_slots(key, value, pages.key, pages.value, batch.slots)
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
