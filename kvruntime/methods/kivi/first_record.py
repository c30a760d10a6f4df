"""Triton: what is decided before a row packs for the first time, for all its records.

``weigh_kernel``: what key channels weigh by a prompt's queries, where some are boosted.  ``order_kernel``: the order of
these channels.  ``freeze_kernel``: where a whole sequence shares its key scales, those.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.boost import choose_order
from kvruntime.methods.kivi.kernel_arguments import New, of_layer
from kvruntime.methods.kivi.quantize import LIMIT, finite, load_tokens, new_tokens, scale_zero

WEIGHING = tl.constexpr(reference.WEIGHING)
TOP_WEIGHT = tl.constexpr(reference.TOP_WEIGHT)
WEIGHED_AT_ONCE = 8192
"""Elements of queries that a program of :func:`weigh_kernel` loads at once: 32 a thread."""


@triton.jit
def weigh_kernel(
    query_ptr, order_ptr, counts_ptr, stride_qb, stride_qh, stride_qt, num_queries,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """What the channels of one row and key/value head weigh, a program each; a row without new tokens keeps its own.

    Over the queries ``x`` of the head's group in the row's last ``WEIGHING`` tokens, in float32::

        square[d] = sum x[d]**2        share[d] = sqrt(square[d] / max square)
        (8 + code[d] % 8) 2**(code[d] // 8) ~ share[d] 2**TOP_WEIGHT

    which is ``channel_weights`` of :mod:`kvruntime.methods.kivi.reference`.  ``BLOCK_N`` queries are summed side by
    side, then all into one.  The code is the share's own bits, rounded half to even to three of its mantissa."""
    row = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    tokens = tl.minimum(new_tokens(row, counts_ptr, num_queries), tl.minimum(num_queries, WEIGHING))
    if tokens == 0:
        return
    query_ptr += row.to(tl.int64) * stride_qb + (head * Q_PER_KV).to(tl.int64) * stride_qh
    query_ptr += tl.cast(num_queries - tokens, tl.int64) * stride_qt
    d = tl.arange(0, BLOCK_D)
    squares = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for begin in range(0, Q_PER_KV * tokens, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)  # the group's heads one behind the other
        at = (n // tokens).to(tl.int64) * stride_qh + (n % tokens).to(tl.int64) * stride_qt
        wanted = (n < Q_PER_KV * tokens)[:, None] & (d < KEY_DIM)[None, :]
        x = finite(tl.load(query_ptr + at[:, None] + d[None, :], mask=wanted, other=0.0).to(tl.float32))[0]
        squares += x * x
    square = tl.sum(squares, 0)
    most = tl.maximum(tl.max(square, 0), 1e-30)
    share = tl.sqrt_rn(tl.div_rn(square, tl.zeros([BLOCK_D], tl.float32) + most)).to(tl.int32, bitcast=True)
    rounded = (share + 0x7FFFF + ((share >> 20) & 1)) >> 20
    code = tl.maximum(rounded - 8 * (130 - TOP_WEIGHT), 0)
    tl.store(order_ptr + (row.to(tl.int64) * NUM_HEADS + head) * KEY_DIM + d, code.to(tl.uint8), mask=d < KEY_DIM)


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


def weigh(query: Tensor, new: New, stored: reference.Stored) -> None:
    """Write what channels weigh to ``key_order`` of every row with ``new`` tokens; other rows are left alone.

    ``query [batch_size, num_q_heads, N, key_dim]``: of the last N of these tokens.
    """
    batch_size, num_q_heads, length, dim = query.shape
    if query.stride(3) != 1:
        query = query[:, :, -reference.WEIGHING :].contiguous()
        length = query.shape[2]
    block = triton.next_power_of_2(dim)
    weigh_kernel[(batch_size * new.num_heads,)](
        query, stored.key_order, new.counts, *query.stride()[:3], length,
        NUM_HEADS=new.num_heads, Q_PER_KV=num_q_heads // new.num_heads, KEY_DIM=dim, BLOCK_N=WEIGHED_AT_ONCE // block,
        BLOCK_D=block, enable_fp_fusion=True, num_warps=8,
    )  # fmt: skip


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
