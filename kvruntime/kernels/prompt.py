"""Triton: attention of a forward's own queries with learned sinks or softcaps, which PyTorch's attention lacks.

A prompt and what a sliding layer keeps are plain tensors; this reads them once, block by block, with an online softmax
(arXiv 2205.14135).  A program has some queries of the heads that share a key/value head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvruntime.kernels.merge import HIDDEN, LOG2E, scaled, sink_logits, softmax_step
from kvruntime.kernels.reference import Scores

BYTES = 128, 256, 512
"""Of a key: up to the second 64 rows and columns are worked on at once, by four warps up to the first, else by eight;
up to the third 32."""


@triton.jit
def prompt_block(query, peak, total, acc, key_ptr, value_ptr, stride_kt, stride_vt, n, num_columns, visible, scale_log2,
                 softcap, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr,
                 DOT: tl.constexpr):  # fmt: skip
    """``(peak, total, acc)`` after the columns ``n``."""
    k = tl.arange(0, BLOCK_K)[None, :]
    v = tl.arange(0, BLOCK_V)[None, :]
    held = (n < num_columns)[:, None]
    at = n[:, None].to(tl.int64)
    key = tl.load(key_ptr + at * stride_kt + k, mask=held & (k < KEY_DIM), other=0.0)
    score = scaled(tl.dot(query, tl.trans(key.to(DOT)), input_precision="ieee"), scale_log2, softcap)
    weight, alpha, peak, total = softmax_step(score, visible, peak, total)
    value = tl.load(value_ptr + at * stride_vt + v, mask=held & (v < VALUE_DIM), other=0.0)
    acc = tl.dot(weight.to(DOT), value.to(DOT), acc * alpha[:, None], input_precision="ieee")
    return peak, total, acc


@triton.jit
def prompt_kernel(
    query_ptr, key_ptr, value_ptr, mask_ptr, sinks_ptr, out_ptr, scale_log2, softcap, stride_qb, stride_qh, stride_ql,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_mb, stride_ml, num_queries, num_columns,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Optional: ``mask_ptr [rows or 1, num_queries, num_columns]``, which columns a query sees; without it those up to
    its own, where the last query's is the last column.  ``out [rows, num_queries, query heads, VALUE_DIM]``."""
    m_block = tl.num_programs(0) - 1 - tl.program_id(0)  # those with most to see first
    row = (tl.program_id(1) // NUM_HEADS).to(tl.int64)
    head = tl.program_id(1) % NUM_HEADS
    m = m_block * BLOCK_M + tl.arange(0, BLOCK_M)  # position * Q_PER_KV + head in the group
    position = m // Q_PER_KV
    query_head = head * Q_PER_KV + m % Q_PER_KV
    real = position < num_queries
    k = tl.arange(0, BLOCK_K)
    v = tl.arange(0, BLOCK_V)
    at = query_head[:, None].to(tl.int64) * stride_qh + position[:, None].to(tl.int64) * stride_ql + k[None, :]
    query = tl.load(query_ptr + row * stride_qb + at, mask=real[:, None] & (k < KEY_DIM)[None, :], other=0.0).to(DOT)
    key_ptr += row * stride_kb + head.to(tl.int64) * stride_kh
    value_ptr += row * stride_vb + head.to(tl.int64) * stride_vh
    peak = tl.full([BLOCK_M], HIDDEN, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        peak, total = sink_logits(sinks_ptr, query_head, real, 0)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    newest = num_columns - num_queries + position  # each query's own column
    end = num_columns
    if mask_ptr is None:
        last = tl.minimum((m_block * BLOCK_M + BLOCK_M - 1) // Q_PER_KV, num_queries - 1)
        end = num_columns - num_queries + last + 1
    for begin in range(0, end, BLOCK_N):
        n = begin + tl.arange(0, BLOCK_N)
        visible = real[:, None] & (n < num_columns)[None, :]
        if mask_ptr is None:
            visible = visible & (n[None, :] <= newest[:, None])
            peak, total, acc = prompt_block(query, peak, total, acc, key_ptr, value_ptr, stride_kt, stride_vt, n,
                                            num_columns, visible, scale_log2, softcap, KEY_DIM, VALUE_DIM, BLOCK_K,
                                            BLOCK_V, DOT)  # fmt: skip
        else:
            mask_at = row * stride_mb + position[:, None].to(tl.int64) * stride_ml + n[None, :]
            visible = tl.load(mask_ptr + mask_at, mask=visible, other=0) != 0
            if tl.max(tl.max(visible.to(tl.int32), 1), 0) > 0:  # a window's blocks are few
                peak, total, acc = prompt_block(query, peak, total, acc, key_ptr, value_ptr, stride_kt, stride_vt, n,
                                                num_columns, visible, scale_log2, softcap, KEY_DIM, VALUE_DIM, BLOCK_K,
                                                BLOCK_V, DOT)  # fmt: skip
    saw = real & (total > 0)
    out = tl.where(saw[:, None], acc / tl.where(saw, total, 1.0)[:, None], 0.0)
    at = ((row * num_queries + position) * (NUM_HEADS * Q_PER_KV) + query_head)[:, None] * VALUE_DIM + v[None, :]
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=real[:, None] & (v < VALUE_DIM)[None, :])


def plan(rows: int, key_dim: int, value_dim: int, element_size: int) -> dict[str, int]:
    """Rows and columns a step, and warps, for ``rows`` (query, head)s of a key/value head."""
    token_nbytes = max(BYTES[0], triton.next_power_of_2(max(key_dim, value_dim)) * element_size)
    wide = token_nbytes > BYTES[2] or element_size > 2  # float32 has no matrix unit, and spills in more
    size = 16 if wide else 64 if token_nbytes <= BYTES[1] else 32
    block_m = min(size, max(16, triton.next_power_of_2(rows)))
    return {"BLOCK_M": block_m, "BLOCK_N": size, "num_warps": 4 if token_nbytes == BYTES[0] else 8, "num_stages": 2}


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, scores: Scores) -> Tensor:
    """``query [batch_size, num_q_heads, L, key_dim]`` over ``key`` and ``value [batch_size, num_kv_heads, columns,
    dim]``, causal where ``mask [batch_size or 1, 1, L, columns]`` bool is None.

    Returns ``[batch_size, L, num_q_heads, value_dim]`` in the query's type; a query that sees nothing gets zeros.
    """
    batch_size, num_q_heads, length, key_dim = query.shape
    heads, columns, value_dim = value.shape[1:]
    query, key, value = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key, value))
    mask_strides: tuple[int | None, ...] = (None, None)
    if mask is not None:
        mask = mask if mask.stride(3) == 1 else mask.contiguous()
        mask_strides = (0 if mask.shape[0] == 1 else mask.stride(0), 0 if mask.shape[2] == 1 else mask.stride(2))
    out = query.new_empty(batch_size, length, num_q_heads, value_dim)
    q_per_kv = num_q_heads // heads
    rows = length * q_per_kv
    dot = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}.get(query.dtype, tl.float16)
    fixed = plan(rows, key_dim, value_dim, query.element_size())
    prompt_kernel[(triton.cdiv(rows, fixed["BLOCK_M"]), batch_size * heads)](
        query, key, value, mask, scores.sinks, out, scale * LOG2E, scores.softcap_log2, *query.stride()[:3],
        *key.stride()[:3], *value.stride()[:3], *mask_strides, length, columns, NUM_HEADS=heads, Q_PER_KV=q_per_kv,
        KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=triton.next_power_of_2(value_dim), DOT=dot, enable_fp_fusion=True, **fixed,
    )  # fmt: skip
    return out
