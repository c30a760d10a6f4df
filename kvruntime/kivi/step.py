"""Triton: one decode step's new token, with nothing for the host to plan (the kernel of :meth:`KiviLayer.step`).

One program a row and head: where the ring of exact slots is full its oldest record is packed, then the token goes to its slot;
rotary embedding of its key, and of the query heads that share it, on the way.  The last program of a row writes the row's new
lengths.  Everything that a step decides lies in device memory, so a CUDA graph of it holds for any lengths.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kivi.quantize import freeze, pack_record, pack_warps, record_constants
from kvsim.record import Record

OVERLAP = True


@triton.jit
def rotated(x_ptr, d, mask, cos_ptr, sin_ptr, position, DIM: tl.constexpr):
    """``x * cos + rotate_half(x) * sin``, each product rounded to the type of ``x`` as PyTorch does it: kernels that call this
    are compiled without ``enable_fp_fusion``, which makes one rounding of a product and the sum, in float16 too."""
    half: tl.constexpr = DIM // 2
    other = tl.where(d < half, d + half, d - half)
    x = tl.load(x_ptr + d, mask=mask, other=0.0)
    turned = tl.load(x_ptr + other, mask=mask, other=0.0)
    cos = tl.load(cos_ptr + position * DIM + d, mask=mask, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + position * DIM + d, mask=mask, other=0.0).to(tl.float32)
    along = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    across = (tl.where(d < half, -turned.to(tl.float32), turned.to(tl.float32)) * sin).to(x.dtype).to(tl.float32)
    return (along + across).to(x.dtype)


@triton.jit
def step_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, exact_key_ptr, exact_value_ptr, records_ptr, params_ptr, lengths_ptr, ticket_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, num_slots, num_records, batch_size,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, KEY_NBITS: tl.constexpr,
    VALUE_NBITS: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_GROUP: tl.constexpr, RECORD: tl.constexpr,
    TILE: tl.constexpr, SINK: tl.constexpr, RESIDUAL: tl.constexpr, KEY_PARAMS: tl.constexpr, VALUE_PARAMS: tl.constexpr,
    RECORD_WORDS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROTARY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()  # the attention that may start now reads records of earlier steps: all written, because the
        gdc_wait()               # attention of the step before waited for them before it let anything start
    row = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    length = tl.load(lengths_ptr + row)
    packed = tl.load(lengths_ptr + batch_size + row)
    seen = tl.atomic_add(ticket_ptr + row, 1)  # every program of the row has read its lengths before it draws its ticket
    rows = row.to(tl.int64) * NUM_HEADS + head
    exact_key_ptr += rows * num_slots * KEY_DIM
    exact_value_ptr += rows * num_slots * VALUE_DIM
    full = length - SINK - packed >= RESIDUAL
    if full:
        number = packed // RECORD
        record_ptr = records_ptr + ((row.to(tl.int64) * num_records + number) * NUM_HEADS + head) * RECORD_WORDS
        row_params_ptr = params_ptr
        if KEY_GROUP == 0:
            row_params_ptr = params_ptr + rows * KEY_DIM
        pack_record(exact_key_ptr, exact_value_ptr, exact_key_ptr, exact_value_ptr, record_ptr, row_params_ptr, SINK + packed,
                    length, 0, 0, 0, batch_size * NUM_HEADS * KEY_DIM, KEY_DIM, VALUE_DIM, KEY_NBITS, VALUE_NBITS, KEY_GROUP,
                    VALUE_GROUP, RECORD, TILE, SINK, RESIDUAL, False, KEY_PARAMS, VALUE_PARAMS)  # fmt: skip
        tl.debug_barrier()  # the token takes the slot of the oldest one packed
    slot = length
    if length >= SINK:
        slot = SINK + (length - SINK) % RESIDUAL
    d = tl.arange(0, BLOCK_K)
    inside = d < KEY_DIM
    key_ptr += row.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    if ROTARY:
        key = rotated(key_ptr, d, inside, cos_ptr, sin_ptr, length, KEY_DIM)
        for member in range(Q_PER_KV):
            at = query_ptr + row.to(tl.int64) * stride_qb + (head * Q_PER_KV + member).to(tl.int64) * stride_qh
            turned = rotated(at, d, inside, cos_ptr, sin_ptr, length, KEY_DIM)
            tl.debug_barrier()  # all halves are read before one is written
            tl.store(at + d, turned, mask=inside)
    else:
        key = tl.load(key_ptr + d, mask=inside, other=0.0)
    tl.store(exact_key_ptr + slot * KEY_DIM + d, key.to(exact_key_ptr.dtype.element_ty), mask=inside)
    d = tl.arange(0, BLOCK_V)
    value = tl.load(value_ptr + row.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh + d, mask=d < VALUE_DIM, other=0.0)
    tl.store(exact_value_ptr + slot * VALUE_DIM + d, value.to(exact_value_ptr.dtype.element_ty), mask=d < VALUE_DIM)
    if seen == NUM_HEADS - 1:
        tl.store(lengths_ptr + row, length + 1)
        if full:
            tl.store(lengths_ptr + batch_size + row, packed + RECORD)
        tl.store(ticket_ptr + row, 0)


def overlaps(x: Tensor) -> bool:
    """Whether kernels may be launched while their predecessor still runs (each waits for it before it reads)."""
    return OVERLAP and x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)


def supports(record: Record, residual: int) -> bool:
    """Whether :func:`step` runs this record: a full ring holds at least one."""
    return record.num_tokens <= residual


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    records: Tensor,
    exact_key: Tensor,
    exact_value: Tensor,
    key_params: Tensor | None,
    lengths: Tensor,
    ticket: Tensor,
    record: Record,
    sink: int,
    residual: int,
) -> None:
    """Store one token a row where ``lengths`` says, pack what must make room, and count it in ``lengths``.

    | tensor | shape |
    |---|---|
    | query | [batch_size, num_q_heads, 1, key_dim]; with ``rotary`` it is embedded in place |
    | key, value | [batch_size, num_kv_heads, 1, dim], channels contiguous |
    | rotary | (cos, sin), each [positions, key_dim]: row b's token stands at position lengths[0, b]; None: already embedded |
    | records, exact_key, exact_value, key_params | as :func:`reference.append` |
    | lengths | [2, batch_size] int32: tokens held and tokens packed; updated |
    | ticket | [batch_size] int32 zeros, and zeros again afterwards |

    The caller has provided for the token.  Raises ``ValueError`` for what :func:`supports` does not allow.
    """
    if not supports(record, residual):
        raise ValueError(f"records of {record.num_tokens} tokens and a residual of {residual}: a step packs from the residual alone")
    batch_size, heads = key.shape[:2]
    if key_params is not None:
        freeze(key, exact_key, key_params, lengths, None, record, sink, residual)
    cos, sin = rotary if rotary is not None else (None, None)
    step_kernel[(batch_size * heads,)](
        query, key, value, cos, sin, exact_key, exact_value, records, key_params, lengths, ticket,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], exact_key.shape[2], records.shape[1], batch_size,
        NUM_HEADS=heads, Q_PER_KV=query.shape[1] // heads, SINK=sink, RESIDUAL=residual, **record_constants(record),
        BLOCK_K=triton.next_power_of_2(record.key_dim), BLOCK_V=triton.next_power_of_2(record.value_dim), ROTARY=rotary is not None,
        EARLY=(early := overlaps(key)), enable_fp_fusion=False, num_warps=pack_warps(record), **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
