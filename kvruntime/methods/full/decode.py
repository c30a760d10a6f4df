"""Triton: an uncompressed cache whose lengths lie on the device (the kernels of :meth:`FullLayer.step`,
and of an engine's pool).

``store_kernel``: the new token to its slot, rotary embedding on the way; one program a row and head.
``append_kernel``: many new tokens.  ``attend_kernel``: ``out = softmax(scale q k^T) v`` of one row and key/value head
over one split of its tokens, the query heads that share the head as one block of rows, of several queries as many
blocks as those take; the splits are merged by :func:`kvruntime.kernels.merge.combine_kernel`.  Nothing is planned by
length, so a CUDA graph of a step holds for any.
Tokens lie in their rows' own slots, or by a block table in a pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels import lines
from kvruntime.kernels.launch import num_multiprocessors, overlaps
from kvruntime.kernels.lines import row_of, rows_of
from kvruntime.kernels.merge import COMBINE_D, FUSED_MERGE, HIDDEN, LOG2E, combine_kernel, scaled, sink_logits
from kvruntime.kernels.reference import PLAIN, Scores
from kvruntime.kernels.rotary import embedded_token
from kvruntime.kernels.splits import plan_splits
from kvruntime.methods.full.reference import Fresh, Stored, check

TILES = {2: (128, 64, 32, 16), 4: (16,)}
"""Tokens a step of the loop by bytes a number, the first that shared memory takes; more in float32 spill."""
NUM_STAGES = 3
"""One tile that is worked on and two under way, which lie in shared memory."""
SHARED_BYTES = 99 << 10
"""Shared memory of a program where no device says, that of sm_89."""
BESIDE_BYTES = 10 << 10
"""Of it beside the tiles: queries, weights and what a program reserves."""
POOL_TILE = 64
"""Tokens a step of the loop at most where a block holds fewer: each looks up its place,
and more take all registers of sm_80."""
MAX_Q_PER_KV = 16


@triton.jit
def store_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, stored_key_ptr, stored_value_ptr, lengths_ptr, positions_ptr,
    table_ptr, stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, stride_xb, stride_xh, stride_xt,
    stride_yb, stride_yh, stride_yt, num_slots, num_blocks,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROTARY: tl.constexpr, EARLY: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    length = tl.load(lengths_ptr + row)
    position = length
    if ROTARY:
        position = tl.load(positions_ptr + row)
    if PAGE == 0:
        slot = (row.to(tl.int64) * NUM_HEADS + head) * num_slots + length
        stored_key_ptr += slot * KEY_DIM
        stored_value_ptr += slot * VALUE_DIM
    else:
        block = tl.load(table_ptr + row.to(tl.int64) * num_blocks + length // PAGE).to(tl.int64)
        stored_key_ptr += block * stride_xb + head.to(tl.int64) * stride_xh + length % PAGE * stride_xt
        stored_value_ptr += block * stride_yb + head.to(tl.int64) * stride_yh + length % PAGE * stride_yt
    d = tl.arange(0, BLOCK_K)
    inside = d < KEY_DIM
    query_ptr += row.to(tl.int64) * stride_qb
    key_ptr += row.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    key, query, query_at, real = embedded_token(query_ptr, key_ptr, cos_ptr, sin_ptr, position, head, stride_qh, inside,
                                                inside, d, ROTARY, KEY_DIM, Q_PER_KV, BLOCK_Q)  # fmt: skip
    value_at = row.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    v = tl.arange(0, BLOCK_V)
    value = tl.load(value_ptr + value_at + v, mask=v < VALUE_DIM, other=0.0)
    tl.debug_barrier()  # all halves are read before one is written
    tl.store(query_at, query, mask=real)
    tl.store(stored_key_ptr + d, key.to(stored_key_ptr.dtype.element_ty), mask=inside)
    tl.store(stored_value_ptr + v, value.to(stored_value_ptr.dtype.element_ty), mask=v < VALUE_DIM)


@triton.jit
def append_kernel(
    key_ptr, value_ptr, stored_key_ptr, stored_value_ptr, lengths_ptr, counts_ptr, starts_ptr, table_ptr, stride_kb,
    stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh,
    stride_yt, new_length, num_blocks, batch_size, NUM_HEADS: tl.constexpr, KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PAGE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """New tokens of one row and head, or of a line with ``starts_ptr`` of one head, tokens of any rows."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    if BLOCK_B == 0:
        row = tl.program_id(1) // NUM_HEADS
        head = (tl.program_id(1) % NUM_HEADS).to(tl.int64)
        count = new_length
        if counts_ptr is not None:
            count = tl.load(counts_ptr + row)
        start = new_length - count
        key_ptr += row.to(tl.int64) * stride_kb
        value_ptr += row.to(tl.int64) * stride_vb
    else:
        head = tl.program_id(1).to(tl.int64)
        row = rows_of(t, starts_ptr, batch_size, BLOCK_B)
        start = tl.load(starts_ptr + row)
    kept = (t >= start) & (t < new_length)
    token = tl.load(lengths_ptr + row) + t - start
    if PAGE == 0:
        place = row.to(tl.int64) + token * 0
        slot = token
    else:
        place = tl.load(table_ptr + row.to(tl.int64) * num_blocks + token // PAGE, mask=kept, other=0).to(tl.int64)
        slot = token % PAGE
    d = tl.arange(0, BLOCK_D)[None, :]
    at = t.to(tl.int64)[:, None]
    key_at = place * stride_xb + head * stride_xh + slot * stride_xt
    value_at = place * stride_yb + head * stride_yh + slot * stride_yt
    mask = kept[:, None] & (d < KEY_DIM)
    x = tl.load(key_ptr + head * stride_kh + at * stride_kt + d, mask=mask, other=0.0)
    tl.store(stored_key_ptr + key_at[:, None] + d, x.to(stored_key_ptr.dtype.element_ty), mask=mask)
    mask = kept[:, None] & (d < VALUE_DIM)
    x = tl.load(value_ptr + head * stride_vh + at * stride_vt + d, mask=mask, other=0.0)
    tl.store(stored_value_ptr + value_at[:, None] + d, x.to(stored_value_ptr.dtype.element_ty), mask=mask)


@triton.jit
def attend_block(query, key, value, visible, peak, total, acc, scale_log2, softcap, DOT: tl.constexpr):
    """``(peak, total, acc)`` after a block of tokens: keys and values ``[BLOCK_N, ...]``; ``visible`` broadcasts to
    ``[BLOCK_M, BLOCK_N]``."""
    score = tl.dot(query, tl.trans(key.to(DOT)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
    score = scaled(score, scale_log2, softcap)
    score = tl.where(visible, score, float("-inf"))
    new_peak = tl.maximum(peak, tl.max(score, 1))
    weight = tl.exp2(score - new_peak[:, None])
    alpha = tl.exp2(peak - new_peak)
    total = total * alpha + tl.sum(weight, 1)
    acc = acc * alpha[:, None] + tl.dot(weight.to(DOT), value.to(DOT), input_precision="ieee")
    return new_peak, total, acc


@triton.jit
def attend_kernel(
    query_ptr, key_ptr, value_ptr, lengths_ptr, table_ptr, new_key_ptr, new_value_ptr, counts_ptr, starts_ptr,
    partial_ptr, lse_ptr, sinks_ptr, scale_log2, softcap, stride_qb, stride_qh, stride_ql, stride_kb, stride_kh,
    stride_kt, stride_vb, stride_vh, stride_vt, stride_xb, stride_xh, stride_xt, stride_yb, stride_yh, stride_yt,
    num_queries, num_slots, num_blocks, batch_size, num_splits,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr,
    NUM_STAGES: tl.constexpr, EARLY: tl.constexpr, MORE: tl.constexpr, PAGE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """``num_queries``: None where each row has one.
    ``MORE``: tokens that a row holds besides those that its length counts.
    Optional: ``sinks_ptr``, a logit a query head; ``softcap``, in powers of two; ``table_ptr``, for each row
    ``num_blocks`` places of ``PAGE`` tokens; ``new_key_ptr`` and what belongs to it, fresh tokens; ``starts_ptr``,
    where each row begins in the line that queries and fresh tokens are."""
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    split = tl.program_id(0)
    m = tl.arange(0, BLOCK_M)
    if BLOCK_B == 0:
        row = tl.program_id(1) // NUM_HEADS
        head = tl.program_id(1) % NUM_HEADS
        query_ptr += row.to(tl.int64) * stride_qb
    else:
        head = tl.program_id(1)
        row, m_block, start_query, num_queries = row_of(
            tl.program_id(2), starts_ptr, batch_size, BLOCK_M, Q_PER_KV, BLOCK_B
        )
        if m_block * BLOCK_M >= num_queries * Q_PER_KV:
            return
        query_ptr += start_query.to(tl.int64) * stride_ql
    length = tl.load(lengths_ptr + row) + MORE
    share = ((length + num_splits - 1) // num_splits + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    start = split * share
    end = tl.minimum(start + share, length)
    k = tl.arange(0, BLOCK_K)
    v = tl.arange(0, BLOCK_V)
    if num_queries is None:
        mask = m < Q_PER_KV
        at = (head * Q_PER_KV + m)[:, None].to(tl.int64) * stride_qh + k[None, :]
    else:  # numbered position * Q_PER_KV + head in the group
        if BLOCK_B == 0:
            m_block = tl.program_id(2)
        m += m_block * BLOCK_M
        position = m // Q_PER_KV
        query_head = head * Q_PER_KV + m % Q_PER_KV
        mask = position < num_queries
        at = query_head[:, None].to(tl.int64) * stride_qh + position[:, None].to(tl.int64) * stride_ql + k[None, :]
    query = tl.load(query_ptr + at, mask=mask[:, None] & (k < KEY_DIM)[None, :], other=0.0).to(
        DOT
    )  # [BLOCK_M, BLOCK_K]
    peak = tl.full([BLOCK_M], -1.0e20, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if sinks_ptr is not None:
        peak, total = sink_logits(sinks_ptr, head * Q_PER_KV + m % Q_PER_KV, mask, split)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    if PAGE == 0:
        base = (row.to(tl.int64) * NUM_HEADS + head) * num_slots
    else:
        key_ptr += head.to(tl.int64) * stride_xh
        value_ptr += head.to(tl.int64) * stride_yh
        table_ptr += row.to(tl.int64) * num_blocks
    for begin in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        n = begin + tl.arange(0, BLOCK_N)
        real = n < end
        if PAGE == 0:
            key_at = (base + n) * KEY_DIM
            value_at = (base + n) * VALUE_DIM
        else:
            if PAGE % BLOCK_N == 0:
                block = tl.load(table_ptr + begin // PAGE).to(tl.int64)
            else:
                block = tl.load(table_ptr + n // PAGE, mask=real, other=0).to(tl.int64)
            key_at = block * stride_xb + n % PAGE * stride_xt
            value_at = block * stride_yb + n % PAGE * stride_yt
        key = tl.load(key_ptr + key_at[:, None] + k[None, :], mask=real[:, None] & (k < KEY_DIM)[None, :], other=0.0)
        value = tl.load(
            value_ptr + value_at[:, None] + v[None, :], mask=real[:, None] & (v < VALUE_DIM)[None, :], other=0.0
        )
        peak, total, acc = attend_block(query, key, value, real[None, :], peak, total, acc, scale_log2, softcap, DOT)
    if new_key_ptr is not None:
        if BLOCK_B == 0:
            first = num_queries - tl.load(counts_ptr + row)
            new_key_ptr += row.to(tl.int64) * stride_kb
            new_value_ptr += row.to(tl.int64) * stride_vb
        else:
            first = 0
            new_key_ptr += start_query.to(tl.int64) * stride_kt
            new_value_ptr += start_query.to(tl.int64) * stride_vt
        new_key_ptr += head.to(tl.int64) * stride_kh
        new_value_ptr += head.to(tl.int64) * stride_vh
        seeing = mask & (position >= first)
        last = tl.minimum((m_block * BLOCK_M + BLOCK_M - 1) // Q_PER_KV + 1, num_queries)
        for block in range(num_splits - 1 - split, (last + BLOCK_N - 1) // BLOCK_N, num_splits):
            t = block * BLOCK_N + tl.arange(0, BLOCK_N)
            real = (t >= first) & (t < last)
            new_at = t.to(tl.int64)[:, None]
            key = tl.load(
                new_key_ptr + new_at * stride_kt + k[None, :], mask=real[:, None] & (k < KEY_DIM)[None, :], other=0.0
            )
            value = tl.load(
                new_value_ptr + new_at * stride_vt + v[None, :],
                mask=real[:, None] & (v < VALUE_DIM)[None, :],
                other=0.0,
            )
            visible = real[None, :] & (t[None, :] <= position[:, None])
            peak, total, acc = attend_block(query, key, value, visible, peak, total, acc, scale_log2, softcap, DOT)
    saw = total > 0
    if new_key_ptr is not None:
        saw = saw & seeing  # queries that are padding see nothing
    out = tl.where(saw[:, None], acc / tl.where(saw, total, 1.0)[:, None], 0.0)
    if num_queries is None:
        at = ((row * NUM_HEADS + head) * Q_PER_KV + m).to(tl.int64)
    elif BLOCK_B == 0:
        at = (row.to(tl.int64) * (NUM_HEADS * Q_PER_KV) + query_head) * num_queries + position
    else:
        at = (start_query + position).to(tl.int64) * (NUM_HEADS * Q_PER_KV) + query_head
    at = at * num_splits + split
    tl.store(partial_ptr + at[:, None] * VALUE_DIM + v[None, :], out.to(partial_ptr.dtype.element_ty),
             mask=mask[:, None] & (v < VALUE_DIM)[None, :])  # fmt: skip
    tl.store(lse_ptr + at, tl.where(saw, peak + tl.log2(tl.where(saw, total, 1.0)), HIDDEN), mask=mask)


def strides_of(stored: Stored) -> tuple[int | None, ...]:
    """Of a pool, from block to block, head to head, token to token: keys', then values';
    None where rows have their own slots."""
    check(stored)
    if stored.block_table is None:
        return (None,) * 6
    return (*stored.key.stride()[:3], *stored.value.stride()[:3])


def line_strides(x: Tensor, starts: Tensor | None) -> tuple[int, ...]:
    """From row to row, head to head, token to token of what comes row by row, or in one line."""
    return x.stride()[:3] if starts is None else (0, x.stride(1), x.stride(0))


def append(
    key: Tensor,
    value: Tensor,
    counts: Sequence[int] | Tensor | None,
    stored: Stored,
    starts: Tensor | None = None,
) -> None:
    """Store new tokens behind what each row holds: the tensors are
    :func:`kvruntime.methods.full.reference.append`'s."""
    check(stored)
    key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (key, value))
    if counts is not None and not isinstance(counts, Tensor):
        counts = torch.tensor(counts, dtype=torch.int32).to(key.device, non_blocking=True)
    batch_size, heads, length = len(stored.lengths), key.shape[1], key.shape[2 if starts is None else 0]
    table = stored.block_table
    key_dim, value_dim = key.shape[-1], value.shape[-1]
    append_kernel[(triton.cdiv(length, 16), heads * (batch_size if starts is None else 1))](
        key, value, stored.key, stored.value, stored.lengths, None if starts is not None else counts, starts,
        None if table is None else table.contiguous(), *line_strides(key, starts), *line_strides(value, starts),
        *stored.key.stride()[:3], *stored.value.stride()[:3], length,
        None if table is None else table.shape[1], batch_size,
        NUM_HEADS=heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_T=16,
        BLOCK_D=triton.next_power_of_2(max(key_dim, value_dim)), PAGE=0 if table is None else stored.key.shape[2],
        BLOCK_B=0 if starts is None else lines.block_b(batch_size),
        enable_fp_fusion=True,
    )  # fmt: skip


def step(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stored: Stored,
    positions: Tensor,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> None:
    """The new token of every row to its place: :func:`kvruntime.methods.full.reference.step`, whose tensors these are.

    Channels lie contiguous.
    """
    batch_size, heads, _, key_dim = key.shape
    value_dim, table = value.shape[3], stored.block_table
    cos, sin = rotary if rotary is not None else (None, None)
    store_kernel[(batch_size * heads,)](
        query, key, value, cos, sin, stored.key, stored.value, stored.lengths, positions,
        None if table is None else table.contiguous(), *query.stride()[:2], *key.stride()[:2], *value.stride()[:2],
        *strides_of(stored), stored.key.shape[2], None if table is None else table.shape[1],
        NUM_HEADS=heads, Q_PER_KV=query.shape[1] // heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_Q=triton.next_power_of_2(query.shape[1] // heads), BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=triton.next_power_of_2(value_dim), ROTARY=rotary is not None,
        PAGE=0 if table is None else stored.key.shape[2], EARLY=(early := overlaps(key)), enable_fp_fusion=False,
        num_warps=1, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a program may have."""
    if device.type != "cuda":
        return SHARED_BYTES
    return int(torch.cuda.get_device_properties(device).shared_memory_per_block_optin)


def plan_tile(channels: int, element_size: int, room: int) -> tuple[int, int]:
    """Tokens a step of the loop, and programs that a multiprocessor holds at once.

    ``channels``: of key and value; ``room``: bytes of shared memory that a program may have.

    >>> plan_tile(256, 2, 227 << 10), plan_tile(128, 2, 227 << 10), plan_tile(256, 2, 99 << 10)
    ((128, 1), (128, 3), (64, 1))
    """
    under_way = (NUM_STAGES - 1) * channels * element_size
    tiles = TILES[element_size]
    tile = next((tile for tile in tiles if tile * under_way + BESIDE_BYTES <= room), tiles[-1])
    return tile, max(1, room // (tile * under_way + BESIDE_BYTES))


def attend(
    query: Tensor,
    stored: Stored,
    scale: float,
    fresh: Fresh | None = None,
    starts: Tensor | None = None,
    stepped: bool = False,
    num_tokens: int | None = None,
    scores: Scores = PLAIN,
) -> Tensor:
    """Attention over everything a layer stores: the tensors are :func:`kvruntime.methods.full.reference.attend`'s.

    ``num_tokens``: the most that a row will hold; it plans the splits (default: what is provided for).  Raises
    ``ValueError`` for more than ``MAX_Q_PER_KV`` query heads that share one key/value head,
    where each row has one query.
    """
    if scores.window is not None:
        raise ValueError(f"a window of {scores.window}: allowed are all tokens that are stored")
    key, value, lengths, table = stored
    batch_size, q_heads = len(lengths), query.shape[1]
    heads, page, key_dim = key.shape[1:]
    value_dim, q_per_kv = value.shape[3], q_heads // heads
    query = query if query.stride(-1) == 1 else query.contiguous()
    length = query.shape[2 if starts is None else 0]
    alone = starts is None and fresh is None and length == 1
    if alone and q_per_kv > MAX_Q_PER_KV:
        raise ValueError(f"{q_per_kv} query heads a key/value head: allowed are up to {MAX_Q_PER_KV}")
    num_blocks = None if table is None else table.shape[1]
    new_key = new_value = counts = None
    strides: tuple[int | None, ...] = (None,) * 6
    if fresh is not None:
        new_key, new_value = (x if x.stride(-1) == 1 else x.contiguous() for x in fresh[:2])
        counts = None if starts is not None else fresh[2]
        strides = (*line_strides(new_key, starts), *line_strides(new_value, starts))
    block_m = 16 if alone or length * q_per_kv <= 16 or max(key_dim, value_dim) > 128 else 32
    blocks, rows = 1 if alone else -(-length * q_per_kv // block_m), batch_size * heads
    out = query.new_empty(*query.shape[:-1], value_dim)
    if starts is not None:
        blocks, rows = lines.num_blocks(length, batch_size, block_m, q_per_kv), heads
    block_k, block_v = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    tile, a_multiprocessor = plan_tile(block_k + block_v, key.element_size(), shared_bytes(query.device))
    if table is not None and page % tile:
        tile = min(tile, POOL_TILE)
    sms = num_multiprocessors(query.device) if query.is_cuda else 1
    provided = page if num_blocks is None else page * num_blocks
    longest = max(1, provided if num_tokens is None else num_tokens)
    splits = plan_splits(rows * blocks, longest, tile, sms * a_multiprocessor)
    partial, lse = out, query.new_empty(*out.shape[:-1], splits, dtype=torch.float32)
    if splits > 1:
        partial = query.new_empty(*out.shape[:-1], splits, value_dim, dtype=torch.float32)
    dot = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}.get(query.dtype, tl.float16)
    attend_kernel[(splits, rows, blocks)](
        query, key, value, lengths, None if table is None else table.contiguous(), new_key, new_value, counts, starts,
        partial, lse, scores.sinks, scale * LOG2E, scores.softcap_log2, *line_strides(query, starts), *strides,
        *strides_of(stored), None if alone else length, page, num_blocks, batch_size, splits, NUM_HEADS=heads,
        Q_PER_KV=q_per_kv,
        KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_M=block_m, BLOCK_N=tile, BLOCK_K=block_k, BLOCK_V=block_v, DOT=dot,
        NUM_STAGES=NUM_STAGES, enable_fp_fusion=True, num_warps=4, MORE=int(stepped), PAGE=0 if table is None else page,
        BLOCK_B=0 if starts is None else lines.block_b(batch_size), EARLY=(early := overlaps(query)),
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(out.numel() // value_dim, triton.cdiv(value_dim, COMBINE_D))](
            partial, lse, out, splits, VALUE_DIM=value_dim, BLOCK_D=COMBINE_D, BLOCK_S=triton.next_power_of_2(splits),
            enable_fp_fusion=FUSED_MERGE, num_warps=4,
            EARLY=early, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out
