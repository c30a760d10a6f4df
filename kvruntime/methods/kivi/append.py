"""Triton: a prompt's tokens to their exact slots, and the launches of an append."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvruntime.kernels import lines
from kvruntime.kernels.hadamard import rotated_tokens
from kvruntime.kernels.lines import rows_of
from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.first_record import freeze, order, weigh
from kvruntime.methods.kivi.kernel_arguments import ALIGNMENT, New, of_layer, places
from kvruntime.methods.kivi.pack import pack_kernel, pack_launch, permuting
from kvruntime.methods.kivi.quantize import LIMIT, new_tokens
from kvruntime.methods.kivi.reference import Layout, Stored
from kvruntime.methods.kivi.words import record_constants
from kvruntime.methods.rows import on_device


@triton.jit
def store_kernel(
    key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, lengths_ptr, packed_ptr, counts_ptr, starts_ptr, layers_ptr,
    exact_table_ptr, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_xb, stride_xh, stride_xt,
    stride_yb, stride_yh, stride_yt, new_length, num_slots, num_pages, batch_size, skip,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RECORD: tl.constexpr,
    SINK: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_B: tl.constexpr, ROTATION: tl.constexpr,
):  # fmt: skip
    """Of one row and head, or of a line with ``starts_ptr`` of one head, tokens of any rows."""
    block = tl.program_id(0)
    if BLOCK_B == 0:
        row = tl.program_id(1) // NUM_HEADS
        head = (tl.program_id(1) % NUM_HEADS).to(tl.int64)
        length = tl.load(lengths_ptr + row)
        packed = tl.load(packed_ptr + row)
        count = new_tokens(row, counts_ptr, new_length)
        over = tl.maximum(length + count - SINK - packed - RESIDUAL, 0)
        packed += (over + RECORD - 1) // RECORD * RECORD
        block += tl.where(block > 0, skip, 0)  # what lies between the sink and the residual is in records
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        token = length + t - (new_length - count)
        kept = (t < new_length) & (t >= new_length - count) & ((token < SINK) | (token >= SINK + packed))
    else:
        head = tl.program_id(1).to(tl.int64)
        t = block * BLOCK_T + tl.arange(0, BLOCK_T)
        inside = t < new_length
        row = rows_of(t, starts_ptr, batch_size, BLOCK_B)
        start = tl.load(starts_ptr + row)
        count = tl.load(starts_ptr + row + 1) - start
        length = tl.load(lengths_ptr + row)
        packed = tl.load(packed_ptr + row)
        over = tl.maximum(length + count - SINK - packed - RESIDUAL, 0)
        packed += (over + RECORD - 1) // RECORD * RECORD
        token = length + t - start
        kept = inside & ((token < SINK) | (token >= SINK + packed))
    key_ptr = of_layer(key_ptr, layers_ptr, 0)
    value_ptr = of_layer(value_ptr, layers_ptr, 1)
    exact_key_ptr = of_layer(exact_key_ptr, layers_ptr, 2)
    exact_value_ptr = of_layer(exact_value_ptr, layers_ptr, 3)
    if PAGE == 0:
        slot = tl.where(token < SINK, token, SINK + (token - SINK) % RESIDUAL)
        rows = row.to(tl.int64) * NUM_HEADS + head
        key_at = (rows * num_slots + slot) * KEY_DIM
        value_at = (rows * num_slots + slot) * VALUE_DIM
    else:
        page = tl.load(exact_table_ptr + row.to(tl.int64) * num_pages + token // PAGE, mask=kept, other=0).to(tl.int64)
        key_at = page * stride_xb + head * stride_xh + token % PAGE * stride_xt
        value_at = page * stride_yb + head * stride_yh + token % PAGE * stride_yt
    d = tl.arange(0, BLOCK_D)[None, :]
    at = t.to(tl.int64)[:, None]
    if BLOCK_B == 0:
        key_ptr += row * stride_kb
        value_ptr += row * stride_vb
    x = tl.load(key_ptr + head * stride_kh + at * stride_kt + d, mask=kept[:, None] & (d < KEY_DIM), other=0.0)
    out = exact_key_ptr + key_at[:, None] + d
    tl.store(out, x.to(exact_key_ptr.dtype.element_ty), mask=kept[:, None] & (d < KEY_DIM))
    y = tl.load(value_ptr + head * stride_vh + at * stride_vt + d, mask=kept[:, None] & (d < VALUE_DIM), other=0.0)
    if ROTATION > 0:
        y = rotated_tokens(y.to(tl.float32), exact_value_ptr.dtype.element_ty, BLOCK_T, BLOCK_D, ROTATION, LIMIT)
    out = exact_value_ptr + value_at[:, None] + d
    tl.store(out, y.to(exact_value_ptr.dtype.element_ty), mask=kept[:, None] & (d < VALUE_DIM))


def append(
    key: Tensor,
    value: Tensor,
    counts: Sequence[int] | Tensor | None,
    stored: Stored,
    layout: Layout,
    books: tuple[list[int], list[int]] | None = None,
    starts: Tensor | None = None,
    query: Tensor | None = None,
    layers: Tensor | None = None,
    is_ordered: bool = False,
) -> None:
    """Store new tokens: the tensors and their meaning are :func:`kvruntime.methods.kivi.reference.append`'s.

    Without ``books``, or with a line, nothing is read back: as many programs start as any lengths may need, whatever
    the rows hold, so that a CUDA graph of it holds too (``counts`` then None or int32 on the device).  With them, an
    append that packs nothing is one launch.  ``layers``: :func:`addresses` of many layers, the tensors being the
    first's; they share everything else, tables too.  ``is_ordered``: every row holds a record, whose order of channels
    stays.
    """
    record, sink, residual = layout
    if layers is not None and record.boosted:
        raise ValueError("many layers at once and boosted keys: each layer's order is chosen by a launch of its own")
    num_layers = 1 if layers is None else len(layers)
    batch_size = len(stored.lengths)
    if key.stride(-1) != 1:
        key = key.contiguous()
    if value.stride(-1) != 1:
        value = value.contiguous()
    new_length = key.shape[0 if starts is not None else 2]
    heads = key.shape[1]
    ragged = counts if isinstance(counts, Tensor) and starts is None else None
    least = 0
    if ragged is None and starts is None:
        known = [new_length] * batch_size if counts is None else list(counts)
        least = min(known)
        if least < new_length:
            ragged = on_device(known, key.device)
    new = New(key, value, heads, new_length, ragged, starts)
    if query is not None and stored.key_order is not None:
        weigh(query, new, stored)
    where, strides = places(stored, layout), new.strides()
    most = -(-new_length // record.num_tokens) * record.num_tokens  # a row's unpacked tokens fit its residual
    if books is not None and starts is None and not isinstance(counts, Tensor):
        states = set(zip(*books, known, strict=True))
        most = max(reference.flush_plan(*state, record.num_tokens, sink, residual) - state[1] for state in states)
    block_b = 0 if starts is None else lines.block_b(batch_size)
    rows = batch_size * heads if starts is None else heads
    if most:
        if stored.key_params is not None:
            freeze(new, stored, layout, layers)
        if stored.key_order is not None and not is_ordered and (books is None or starts is not None or 0 in books[1]):
            order(new, stored, layout)
        launch = pack_launch(record)
        blocks = (
            most // record.num_tokens if starts is None else lines.num_blocks(new_length, batch_size, record.num_tokens)
        )
        pack_kernel[(blocks * launch["PARTS"], rows, num_layers)](
            key, value, stored.exact_key, stored.exact_value, stored.records, stored.key_params, stored.key_order,
            stored.lengths, stored.packed, ragged, starts, layers, where.block_table, where.exact_table, *strides,
            *where.strides, new_length, where.num_slots, where.num_records, where.num_pages, batch_size,
            NUM_HEADS=heads, NEW=new_length > 1 or record.num_tokens > residual, SINK=sink, RESIDUAL=residual,
            PAGE=where.page, BLOCK_B=block_b, **record_constants(record), enable_fp_fusion=True, **launch,
            **(permuting(record) if where.page else {}),
        )  # fmt: skip
    dim = max(record.key_dim, record.value_dim)
    block = 1 if new_length == 1 else 16
    skip, blocks = 0, -(-new_length // block)
    if starts is None and new_length > residual + sink + 2 * block:  # of a long prompt only both ends are stored
        tail = -(-(residual + block) // block)
        head_blocks = -(-(max(new_length - least, 0) + sink) // block)
        skip = max(0, blocks - tail - 1) if head_blocks <= 1 else 0
        blocks -= skip
    store_kernel[(blocks, rows, num_layers)](
        key, value, stored.exact_key, stored.exact_value, stored.lengths, stored.packed, ragged, starts, layers,
        where.exact_table, *strides, *where.strides, new_length, where.num_slots, where.num_pages, batch_size, skip,
        NUM_HEADS=heads, KEY_DIM=record.key_dim, VALUE_DIM=record.value_dim, RECORD=record.num_tokens,
        SINK=sink, RESIDUAL=residual, BLOCK_T=block, BLOCK_D=triton.next_power_of_2(dim), PAGE=where.page,
        BLOCK_B=block_b, ROTATION=record.rotation,
        enable_fp_fusion=True, num_warps=1 if block == 1 else 4,
    )  # fmt: skip


@triton.jit
def count_kernel(lengths_ptr, packed_ptr, count, batch_size, RECORD: tl.constexpr, SINK: tl.constexpr,
                 RESIDUAL: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.arange(0, BLOCK)
    length = tl.load(lengths_ptr + row, mask=row < batch_size, other=0) + count
    packed = tl.load(packed_ptr + row, mask=row < batch_size, other=0)
    over = tl.maximum(length - SINK - packed - RESIDUAL, 0)
    tl.store(lengths_ptr + row, length, mask=row < batch_size)
    tl.store(packed_ptr + row, packed + (over + RECORD - 1) // RECORD * RECORD, mask=row < batch_size)


def count(stored: Stored, layout: Layout, num_tokens: int) -> None:
    """Enter ``num_tokens`` more a row, that :func:`append` has stored without books, in ``stored.lengths`` and
    ``stored.packed``."""
    record, sink, residual = layout
    batch_size = len(stored.lengths)
    count_kernel[(1,)](
        stored.lengths, stored.packed, num_tokens, batch_size, RECORD=record.num_tokens, SINK=sink, RESIDUAL=residual,
        BLOCK=triton.next_power_of_2(batch_size), enable_fp_fusion=False, num_warps=1,
    )  # fmt: skip


def addresses(layers: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]]) -> Tensor | None:
    """The table by which one :func:`append` stores many layers, int64 ``[num_layers, 6]`` on their device.

    ``layers``: key, value, exact_key, exact_value, records, key_params of each, alike in all but their address.
    None where a tensor does not begin at a multiple of ``ALIGNMENT`` bytes.
    """
    rows = [[0 if x is None else x.data_ptr() for x in layer] for layer in layers]
    if any(address % ALIGNMENT.value for row in rows for address in row):
        return None
    return torch.tensor(rows, dtype=torch.int64).to(layers[0][0].device, non_blocking=True)
