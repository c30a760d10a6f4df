"""Triton: the rotary embedding of one new token and of the query heads that share its head."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def rotated(x_ptr, d, mask, cos, sin, DIM: tl.constexpr):
    """``x * cos + rotate_half(x) * sin``, each product rounded to the type of ``x`` as PyTorch does it: kernels that call this
    are compiled without ``enable_fp_fusion``, which makes one rounding of a product and the sum, in float16 too."""
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
    """``(key, query, where the query lies, which of it is real)`` at the channels ``d`` that are wanted of each: ``key_ptr`` is the
    head's, ``query_ptr`` the row's.  Without ``ROTARY`` the query is left alone, and nothing of it real."""
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
