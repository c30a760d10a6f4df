"""Attention over latents of MLA that are coded one by one (DeepSeek-V2, arXiv 2405.04434): absorbed, so that no head's
keys or values are ever made.

A token leaves a latent, which is key and value of every query head, and a rotary key beside it, each coded with a scale
of its own: the layer's ``key`` and ``value`` streams.  A query is the latent's part and the rotary part one behind the
other, ``[batch_size, num_q_heads, L, rank + rope]``, and the output ``[batch_size, num_q_heads, L, rank]`` is a sum of
latents.  :mod:`kvruntime.methods.token.latent_reference` says what that means.  Here it is one launch over the bytes,
and the merge of its parts: a tile of latents is read and decoded once, for scores and sums, in float16 unless the query
is float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvruntime.kernels.launch import num_multiprocessors
from kvruntime.kernels.merge import COMBINE_D, FUSED_MERGE, HIDDEN, LOG2E, combine_kernel
from kvruntime.kernels.splits import plan_splits
from kvruntime.methods.token.attention import OVERHEAD, number_of, rotated, scale_and_zero
from kvruntime.methods.token.coding import rotation, sections
from kvruntime.methods.token.levels import magnitudes
from kvruntime.methods.token.lookup import level_of, unit_of
from kvruntime.methods.token.reference import Layout, Stored

BLOCK_M = 16
"""Query heads a program."""
TILE = 32
"""Tokens a step of the loop, half of them in float32."""
MOST_MERGED = 16384
"""Numbers of all parts that a program of the merge holds."""
PROGRAMS_PER_SM = 1
"""Programs at once on a multiprocessor, as the splits are planned."""
CODINGS = ("int8", "int4", "e4m3", "e5m2", "lloyd2", "lloyd4")
"""What the kernel reads: a power of two of whole codes a byte."""


def supports(layout: Layout) -> bool:
    """Whether :func:`attend` reads latents and rotary keys of this coding: one of ``CODINGS`` for both."""
    return layout.key == layout.value and layout.key in CODINGS


@triton.jit
def decoded(codes_ptr, scale_ptr, n, real, CODING: tl.constexpr, LEVELS: tl.constexpr, NBITS: tl.constexpr,
            DIM: tl.constexpr, BLOCK: tl.constexpr, DOT: tl.constexpr):  # fmt: skip
    """The channels of tokens ``n``, of each place in a byte ``[tokens, BLOCK]``."""
    FIELDS: tl.constexpr = 8 // NBITS
    scale, zero = scale_and_zero(tl.load(scale_ptr + n, mask=real, other=0.0), CODING)
    byte = tl.arange(0, BLOCK)
    there = real[:, None] & (byte < DIM // FIELDS)[None, :]
    at = n.to(tl.int64)[:, None] * (DIM // FIELDS) + byte[None, :]
    words = tl.load(codes_ptr + at, mask=there, other=0).to(tl.int16)
    out = ()
    for f in tl.static_range(FIELDS):
        x = level_of((words,), f, CODING, LEVELS, NBITS, tl.float32)
        if CODING == "int4":
            x += zero[:, None]
        x = tl.where(there, x * (scale * unit_of(CODING))[:, None], 0.0)
        out = out + (x.to(DOT),)
    return out


@triton.jit
def queries(query_ptr, at, mask, FIRST: tl.constexpr, NBITS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr,
            DOT: tl.constexpr):  # fmt: skip
    """The channels of queries that :func:`decoded` has in each place of a byte: ``[BLOCK_M, BLOCK]``."""
    FIELDS: tl.constexpr = 8 // NBITS
    byte = tl.arange(0, BLOCK)
    there = mask[:, None] & (byte < DIM // FIELDS)[None, :]
    out = ()
    for f in tl.static_range(FIELDS):
        x = tl.load(query_ptr + at[:, None] + FIRST + byte[None, :] * FIELDS + f, mask=there, other=0.0)
        out = out + (number_of(x, DOT),)
    return out


@triton.jit(do_not_specialize=["num_splits"])
def latent_kernel(query_ptr, codes_ptr, scale_ptr, rope_codes_ptr, rope_scale_ptr, lengths_ptr, partial_ptr, lse_ptr,
                  scale_log2, stride_qb, stride_qh, slots, num_heads, num_splits,
                  RANK: tl.constexpr, ROPE: tl.constexpr, CODING: tl.constexpr, NBITS: tl.constexpr,
                  LEVELS: tl.constexpr, ROPE_LEVELS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_P: tl.constexpr,
                  BLOCK_M: tl.constexpr, TILE: tl.constexpr, DOT: tl.constexpr, MORE: tl.constexpr,
                  STAGES: tl.constexpr):  # fmt: skip
    """One split of a row's tokens for ``BLOCK_M`` query heads.  ``MORE``: tokens that a row holds besides those that
    its length counts."""
    FIELDS: tl.constexpr = 8 // NBITS
    split = tl.program_id(0)
    row = tl.program_id(1)
    head = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = head < num_heads
    length = tl.load(lengths_ptr + row) + MORE
    share = ((length + num_splits - 1) // num_splits + TILE - 1) // TILE * TILE
    start = split * share
    end = tl.minimum(start + share, length)
    at = row.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh
    query = queries(query_ptr, at, mask, 0, NBITS, RANK, BLOCK_R, DOT)
    rotary = queries(query_ptr, at, mask, RANK, NBITS, ROPE, BLOCK_P, DOT)
    acc = ()
    for _f in tl.static_range(FIELDS):
        acc = acc + (tl.zeros([BLOCK_M, BLOCK_R], tl.float32),)
    peak = tl.full([BLOCK_M], -1.0e20, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    first = row.to(tl.int64) * slots
    codes_ptr += first * (RANK // FIELDS)
    rope_codes_ptr += first * (ROPE // FIELDS)
    scale_ptr += first
    rope_scale_ptr += first
    for begin in tl.range(start, end, TILE, num_stages=STAGES):
        n = begin + tl.arange(0, TILE)
        real = n < end
        latent = decoded(codes_ptr, scale_ptr, n, real, CODING, LEVELS, NBITS, RANK, BLOCK_R, DOT)
        rope = decoded(rope_codes_ptr, rope_scale_ptr, n, real, CODING, ROPE_LEVELS, NBITS, ROPE, BLOCK_P, DOT)
        score = tl.zeros([BLOCK_M, TILE], tl.float32)
        for f in tl.static_range(FIELDS):
            score = tl.dot(query[f], tl.trans(latent[f]), score, input_precision="ieee")
            score = tl.dot(rotary[f], tl.trans(rope[f]), score, input_precision="ieee")
        score = tl.where(real[None, :], score * scale_log2, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - new_peak[:, None])
        alpha = tl.exp2(peak - new_peak)
        total = total * alpha + tl.sum(weight, 1)
        peak = new_peak
        new_acc = ()
        for f in tl.static_range(FIELDS):
            new_acc = new_acc + (tl.dot(weight.to(DOT), latent[f], acc[f] * alpha[:, None], input_precision="ieee"),)
        acc = new_acc
    saw = mask & (total > 0)
    inverse = tl.where(saw, 1.0 / tl.where(saw, total, 1.0), 0.0)
    out_row = (row.to(tl.int64) * num_heads + head) * num_splits + split
    byte = tl.arange(0, BLOCK_R)
    there = mask[:, None] & (byte < RANK // FIELDS)[None, :]
    for f in tl.static_range(FIELDS):
        tl.store(partial_ptr + out_row[:, None] * RANK + byte[None, :] * FIELDS + f, acc[f] * inverse[:, None],
                 mask=there)  # fmt: skip
    tl.store(lse_ptr + out_row, tl.where(saw, peak + tl.log2(tl.where(saw, total, 1.0)), HIDDEN), mask=mask)


def attend(
    query: Tensor,
    stored: Stored,
    layout: Layout,
    scale: float,
    stepped: bool = False,
    num_tokens: int | None = None,
    num_splits: int | None = None,
) -> Tensor:
    """Attention of one query a row, by the kernel: ``[batch_size, num_q_heads, 1, rank]``.

    ``num_tokens``: the most that a row will hold; it plans the splits (default: what is provided for).  Raises
    ``ValueError`` for what :func:`supports` does not allow.
    """
    if not supports(layout):
        raise ValueError(f"latents of {layout.key} and {layout.value}: the kernel reads {', '.join(CODINGS)}")
    (batch_size, heads, *_), dtype = query.shape, query.dtype
    rank, rope, coding = layout.key_dim, layout.value_dim, layout.key
    turn = rotation(coding, rank)
    if turn:
        parts = zip(query.split([rank, rope], -1), (stored.key_signs, stored.value_signs), (rank, rope), strict=True)
        query = torch.cat([rotated(x, signs, rotation(coding, dim)) for x, signs, dim in parts], -1)
    query = query if query.stride(3) == 1 else query.contiguous()
    nbits = sections(coding, rank)[0][2]
    lloyd = coding.startswith("lloyd")
    wide, slots = query.dtype == torch.float32, stored.key_codes.shape[2]
    tile, blocks = TILE // 2 if wide else TILE, triton.cdiv(heads, BLOCK_M)
    if (splits := num_splits) is None:
        sms = num_multiprocessors(query.device) if query.is_cuda else 1
        splits = plan_splits(batch_size * blocks, max(1, num_tokens or slots), tile, sms * PROGRAMS_PER_SM, OVERHEAD)
        splits = min(splits, max(1, MOST_MERGED // (turn or COMBINE_D)))
    out = torch.empty(batch_size, heads, 1, rank, dtype=dtype, device=query.device)
    partial = torch.empty(batch_size, heads, splits, rank, dtype=torch.float32, device=query.device)
    lse = torch.empty(batch_size, heads, splits, dtype=torch.float32, device=query.device)
    latent_kernel[(splits, batch_size, blocks)](
        query, stored.key_codes, stored.key_scale, stored.value_codes, stored.value_scale, stored.lengths, partial, lse,
        scale * LOG2E, *query.stride()[:2], slots, heads, splits, RANK=rank, ROPE=rope, CODING=coding, NBITS=nbits,
        LEVELS=magnitudes(rank, nbits) if lloyd else (), ROPE_LEVELS=magnitudes(rope, nbits) if lloyd else (),
        BLOCK_R=max(16, triton.next_power_of_2(rank * nbits // 8)),
        BLOCK_P=max(16, triton.next_power_of_2(rope * nbits // 8)),
        BLOCK_M=BLOCK_M, TILE=tile, DOT=tl.float32 if wide else tl.float16, MORE=int(stepped), STAGES=1 if wide else 2,
        enable_fp_fusion=True, num_warps=8,
    )  # fmt: skip
    dim = turn or COMBINE_D
    combine_kernel[(batch_size * heads, triton.cdiv(rank, dim))](
        partial, lse, out, splits, VALUE_DIM=rank, BLOCK_D=dim, BLOCK_S=triton.next_power_of_2(splits), ROTATION=turn,
        signs_ptr=stored.key_signs if turn else None, enable_fp_fusion=FUSED_MERGE, num_warps=8 if dim > 64 else 4,
    )  # fmt: skip
    return out
