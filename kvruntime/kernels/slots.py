"""Triton: tokens of a line to the places of a pool that a slot mapping names."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_T = 16


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["slots_ptr"])
def store_slots_kernel(
    key_ptr, value_ptr, pool_key_ptr, pool_value_ptr, slots_ptr, stride_kt, stride_kh, stride_vt, stride_vh, stride_xb,
    stride_xh, stride_xt, stride_yb, stride_yh, stride_yt, num_tokens,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``BLOCK_T`` tokens of one head; a token whose slot is below 0 goes nowhere."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    head = tl.program_id(1).to(tl.int64)
    slot = tl.load(slots_ptr + t, mask=t < num_tokens, other=-1).to(tl.int64)
    kept = slot >= 0
    slot = tl.where(kept, slot, 0)
    page = slot // PAGE
    place = slot % PAGE
    d = tl.arange(0, BLOCK_D)[None, :]
    at = t.to(tl.int64)[:, None]
    x = tl.load(key_ptr + at * stride_kt + head * stride_kh + d, mask=kept[:, None] & (d < KEY_DIM), other=0.0)
    out = pool_key_ptr + (page * stride_xb + head * stride_xh + place * stride_xt)[:, None] + d
    tl.store(out, x.to(pool_key_ptr.dtype.element_ty), mask=kept[:, None] & (d < KEY_DIM))
    y = tl.load(value_ptr + at * stride_vt + head * stride_vh + d, mask=kept[:, None] & (d < VALUE_DIM), other=0.0)
    out = pool_value_ptr + (page * stride_yb + head * stride_yh + place * stride_yt)[:, None] + d
    tl.store(out, y.to(pool_value_ptr.dtype.element_ty), mask=kept[:, None] & (d < VALUE_DIM))


def store_slots(key: Tensor, value: Tensor, pool_key: Tensor, pool_value: Tensor, slots: Tensor) -> None:
    """``key`` and ``value`` ``[tokens, num_kv_heads, dim]`` to pools ``[pool_size, num_kv_heads, n, dim]``: token t to
    place ``slots[t] % n`` of page ``slots[t] // n``, or nowhere where ``slots[t]`` is below 0."""
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    num_tokens, heads, key_dim = key.shape
    if not num_tokens:
        return
    store_slots_kernel[(triton.cdiv(num_tokens, BLOCK_T), heads)](
        key, value, pool_key, pool_value, slots, *key.stride()[:2], *value.stride()[:2], *pool_key.stride()[:3],
        *pool_value.stride()[:3], min(num_tokens, len(slots)),
        KEY_DIM=key_dim, VALUE_DIM=value.shape[2], PAGE=pool_key.shape[2], BLOCK_T=BLOCK_T,
        BLOCK_D=triton.next_power_of_2(max(key_dim, value.shape[2])), enable_fp_fusion=True,
        num_warps=4,
    )  # fmt: skip
