"""Triton: a prompt's tokens to their exact slots, and the launches of an append."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.pack import ALIGNMENT, freeze, of_layer, pack_kernel, pack_launch
from kvruntime.methods.kivi.words import (
    record_constants,
)
from kvsim.methods.kivi import Record


@triton.jit
def store_kernel(
    key_ptr, value_ptr, exact_key_ptr, exact_value_ptr, lengths_ptr, counts_ptr, layers_ptr,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, new_length, num_slots, batch_size, skip,
    NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, RECORD: tl.constexpr,
    SINK: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1) // NUM_HEADS
    head = (tl.program_id(1) % NUM_HEADS).to(tl.int64)
    length = tl.load(lengths_ptr + row)
    packed = tl.load(lengths_ptr + batch_size + row)
    count = new_length
    if counts_ptr is not None:
        count = tl.load(counts_ptr + row)
    over = tl.maximum(length + count - SINK - packed - RESIDUAL, 0)
    packed += (over + RECORD - 1) // RECORD * RECORD
    block = tl.program_id(0)
    block += tl.where(block > 0, skip, 0)  # what lies between the sink and the residual is in records
    t = block * BLOCK_T + tl.arange(0, BLOCK_T)
    token = length + t - (new_length - count)
    kept = (t < new_length) & (t >= new_length - count) & ((token < SINK) | (token >= SINK + packed))
    slot = tl.where(token < SINK, token, SINK + (token - SINK) % RESIDUAL)
    key_ptr = of_layer(key_ptr, layers_ptr, 0)
    value_ptr = of_layer(value_ptr, layers_ptr, 1)
    exact_key_ptr = of_layer(exact_key_ptr, layers_ptr, 2)
    exact_value_ptr = of_layer(exact_value_ptr, layers_ptr, 3)
    rows = row.to(tl.int64) * NUM_HEADS + head
    d = tl.arange(0, BLOCK_D)[None, :]
    at = t.to(tl.int64)[:, None]
    x = tl.load(
        key_ptr + row * stride_kb + head * stride_kh + at * stride_kt + d, mask=kept[:, None] & (d < KEY_DIM), other=0.0
    )
    out = exact_key_ptr + (rows * num_slots + slot[:, None]) * KEY_DIM + d
    tl.store(out, x.to(exact_key_ptr.dtype.element_ty), mask=kept[:, None] & (d < KEY_DIM))
    y = tl.load(
        value_ptr + row * stride_vb + head * stride_vh + at * stride_vt + d,
        mask=kept[:, None] & (d < VALUE_DIM),
        other=0.0,
    )
    out = exact_value_ptr + (rows * num_slots + slot[:, None]) * VALUE_DIM + d
    tl.store(out, y.to(exact_value_ptr.dtype.element_ty), mask=kept[:, None] & (d < VALUE_DIM))


def append(
    key: Tensor,
    value: Tensor,
    counts: list[int],
    lengths: list[int],
    packed: list[int],
    records: Tensor,
    exact_key: Tensor,
    exact_value: Tensor,
    record: Record,
    sink: int,
    residual: int,
    key_params: Tensor | None,
    lengths_ptr: Tensor,
    layers: Tensor | None = None,
) -> None:
    """Store new tokens: the tensors and their meaning are :func:`kvruntime.methods.kivi.reference.append`'s.

    ``lengths_ptr [2, batch_size]`` int32 holds ``lengths`` and ``packed`` on the device, as they are before; it is
    read, not written.  ``layers``: :func:`addresses` of many layers, the tensors being the first's; they share
    everything else.
    """
    batch_size, heads, new_length, _ = key.shape
    num_layers = 1 if layers is None else len(layers)
    if key.stride(3) != 1:
        key = key.contiguous()
    if value.stride(3) != 1:
        value = value.contiguous()
    states = list(zip(lengths, packed, counts, strict=True))
    plans = {state: reference.flush_plan(*state, record.num_tokens, sink, residual) - state[1] for state in set(states)}
    most = max(plans.values())
    ragged = (
        None if min(counts) == new_length else torch.tensor(counts, dtype=torch.int32).to(key.device, non_blocking=True)
    )
    strides = (*key.stride()[:3], *value.stride()[:3])
    if most:
        if key_params is not None:
            freeze(key, exact_key, key_params, lengths_ptr, ragged, record, sink, residual, layers)
        launch = pack_launch(record)
        pack_kernel[(most // record.num_tokens * launch["PARTS"], batch_size * heads, num_layers)](
            key, value, exact_key, exact_value, records, key_params, lengths_ptr, ragged, layers,
            *strides, new_length, exact_key.shape[2], records.shape[1], batch_size,
            NUM_HEADS=heads, NEW=new_length > 1 or record.num_tokens > residual,
            SINK=sink, RESIDUAL=residual, **record_constants(record), enable_fp_fusion=True, **launch,
        )  # fmt: skip
    dim = max(record.key_dim, record.value_dim)
    block = 1 if new_length == 1 else 16
    skip, blocks = 0, -(-new_length // block)
    if new_length > residual + sink + 2 * block:  # of a long prompt only both ends are stored
        tail = -(-(residual + block) // block)
        head_blocks = -(-(max(new_length - min(counts), 0) + sink) // block)
        skip = max(0, blocks - tail - 1) if head_blocks <= 1 else 0
        blocks -= skip
    store_kernel[(blocks, batch_size * heads, num_layers)](
        key, value, exact_key, exact_value, lengths_ptr, ragged, layers,
        *strides, new_length, exact_key.shape[2], batch_size, skip,
        NUM_HEADS=heads, KEY_DIM=record.key_dim, VALUE_DIM=record.value_dim, RECORD=record.num_tokens,
        SINK=sink, RESIDUAL=residual, BLOCK_T=block, BLOCK_D=triton.next_power_of_2(dim),
        enable_fp_fusion=True, num_warps=1 if block == 1 else 4,
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
