"""Triton: the rotary embedding of a step's new tokens and of their query heads."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rotated(x_ptr, d, mask, cos, sin, DIM: tl.constexpr):
    """``x * cos + rotate_half(x) * sin``, each product rounded to the type of ``x`` as PyTorch does it: kernels that
    call this are compiled without ``enable_fp_fusion``, which makes one rounding of a product and the sum,
    in float16 too."""
    half: tl.constexpr = DIM // 2
    other = tl.where(d < half, d + half, d - half)
    x = tl.load(x_ptr + d, mask=mask, other=0.0)
    turned = tl.load(x_ptr + other, mask=mask, other=0.0)
    along = (x.to(tl.float32) * cos).to(x.dtype).to(tl.float32)
    across = (tl.where(d < half, -turned.to(tl.float32), turned.to(tl.float32)) * sin).to(x.dtype).to(tl.float32)
    return (along + across).to(x.dtype)


@triton.jit
def embedded_token(query_ptr, key_ptr, cos_ptr, sin_ptr, position, head, stride_qh, own_key, own_query, d,
                   ROTARY: tl.constexpr, DIM: tl.constexpr, Q_PER_KV: tl.constexpr, BLOCK_Q: tl.constexpr):  # fmt: skip
    """``(key, query, where the query lies, which of it is real)`` at the channels ``d`` that are wanted of each:
    ``key_ptr`` is the head's, ``query_ptr`` the row's.  Without ``ROTARY`` the query is left alone,
    and nothing of it real."""
    m = tl.arange(0, BLOCK_Q)
    heads_ptr = query_ptr + (head * Q_PER_KV + m)[:, None].to(tl.int64) * stride_qh
    real = (m < (Q_PER_KV if ROTARY else 0))[:, None] & own_query[None, :]
    if ROTARY:
        cos = tl.load(cos_ptr + position * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
        sin = tl.load(sin_ptr + position * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
        key = rotated(key_ptr, d, own_key, cos, sin, DIM)
        query = rotated(heads_ptr, d[None, :], real, cos[None, :], sin[None, :], DIM)
    else:
        key = tl.load(key_ptr + d, mask=own_key, other=0.0)
        query = tl.zeros([BLOCK_Q, d.shape[0]], query_ptr.dtype.element_ty)
    return key, query, heads_ptr + d[None, :], real


@triton.jit
def rotate_kernel(
    query_ptr, key_ptr, cos_ptr, sin_ptr, query_out_ptr, key_out_ptr,
    stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_cb, stride_ct, length,
    NUM_Q_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    token = tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BLOCK)
    inside = d < DIM
    at = row * stride_cb + token * stride_ct + d
    cos = tl.load(cos_ptr + at, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if head < NUM_Q_HEADS:
        query_ptr += row * stride_qb + head * stride_qh + token * stride_qt
        query = rotated(query_ptr, d, inside, cos, sin, DIM)
        tl.store(query_out_ptr + ((row * NUM_Q_HEADS + head) * length + token) * DIM + d, query, mask=inside)
    else:
        head -= NUM_Q_HEADS
        key_ptr += row * stride_kb + head * stride_kh + token * stride_kt
        key = rotated(key_ptr, d, inside, cos, sin, DIM)
        tl.store(key_out_ptr + ((row * NUM_KV_HEADS + head) * length + token) * DIM + d, key, mask=inside)


def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """``x * cos + rotate_half(x) * sin`` of L tokens a row, in one launch.

    ``query [batch_size, num_q_heads, L, dim]`` and ``key [batch_size, num_kv_heads, L, dim]``, channels side by side;
    ``cos`` and ``sin`` ``[batch_size or 1, L, dim]`` of their type, contiguous.  Rounded as PyTorch does it.
    """
    batch_size, num_q_heads, length, dim = query.shape
    num_kv_heads = key.shape[1]
    out = (query.new_empty(query.shape), key.new_empty(key.shape))
    rotate_kernel[(batch_size, num_q_heads + num_kv_heads, length)](
        query, key, cos, sin, *out, *query.stride()[:3], *key.stride()[:3],
        cos.stride(0) if len(cos) > 1 else 0, cos.stride(1), length,
        NUM_Q_HEADS=num_q_heads, NUM_KV_HEADS=num_kv_heads, DIM=dim, BLOCK=triton.next_power_of_2(dim), num_warps=1,
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
