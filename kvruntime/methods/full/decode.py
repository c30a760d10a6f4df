"""Triton: one decode step over an uncompressed cache whose lengths lie on the device (the kernels of :meth:`FullLayer.step`).

``store_kernel``: the new token to its slot, rotary embedding on the way; one program a row and head.  ``attend_kernel``:
``out = softmax(scale q k^T) v`` of one row and key/value head over one split of its tokens, the query heads that share the head
as one block of rows; the splits are merged by :func:`kvruntime.kernels.merge.combine_kernel`.  Nothing is planned by length, so
a CUDA graph of a step holds for any.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels.launch import num_multiprocessors, overlaps
from kvruntime.kernels.merge import COMBINE_D, FUSED_MERGE, HIDDEN, LOG2E, combine_kernel
from kvruntime.kernels.rotary import embedded_token

TILES = {2: (128, 64, 32, 16), 4: (16,)}
"""Tokens a step of the loop by bytes a number, the first that shared memory takes; more in float32 spill."""
NUM_STAGES = 3
"""One tile that is worked on and two under way, which lie in shared memory."""
SHARED_BYTES = 99 << 10
"""Shared memory of a program where no device says, that of sm_89."""
BESIDE_BYTES = 10 << 10
"""Of it beside the tiles: queries, weights and what a program reserves."""
MAX_SPLITS = 128
MAX_Q_PER_KV = 16


@triton.jit
def store_kernel(
    query_ptr, key_ptr, value_ptr, cos_ptr, sin_ptr, stored_key_ptr, stored_value_ptr, positions_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_vb, stride_vh, num_slots,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, ROTARY: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0) // NUM_HEADS
    head = tl.program_id(0) % NUM_HEADS
    position = tl.load(positions_ptr + row)
    slot = (row.to(tl.int64) * NUM_HEADS + head) * num_slots + position
    d = tl.arange(0, BLOCK_K)
    inside = d < KEY_DIM
    query_ptr += row.to(tl.int64) * stride_qb
    key_ptr += row.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    key, query, query_at, real = embedded_token(query_ptr, key_ptr, cos_ptr, sin_ptr, position, head, stride_qh, inside, inside, d,
                                                ROTARY, KEY_DIM, Q_PER_KV, BLOCK_Q)  # fmt: skip
    value_at = row.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    v = tl.arange(0, BLOCK_V)
    value = tl.load(value_ptr + value_at + v, mask=v < VALUE_DIM, other=0.0)
    tl.debug_barrier()  # all halves are read before one is written
    tl.store(query_at, query, mask=real)
    tl.store(stored_key_ptr + slot * KEY_DIM + d, key.to(stored_key_ptr.dtype.element_ty), mask=inside)
    tl.store(stored_value_ptr + slot * VALUE_DIM + v, value.to(stored_value_ptr.dtype.element_ty), mask=v < VALUE_DIM)


@triton.jit
def attend_kernel(
    query_ptr, key_ptr, value_ptr, positions_ptr, partial_ptr, lse_ptr, scale_log2, stride_qb, stride_qh, num_slots, num_splits,
    NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, DOT: tl.constexpr, NUM_STAGES: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    split = tl.program_id(0)
    row = tl.program_id(1) // NUM_HEADS
    head = tl.program_id(1) % NUM_HEADS
    length = tl.load(positions_ptr + row) + 1
    share = ((length + num_splits - 1) // num_splits + BLOCK_N - 1) // BLOCK_N * BLOCK_N
    start = split * share
    end = tl.minimum(start + share, length)
    base = (row.to(tl.int64) * NUM_HEADS + head) * num_slots
    m = tl.arange(0, BLOCK_M)
    k = tl.arange(0, BLOCK_K)
    v = tl.arange(0, BLOCK_V)
    at = row.to(tl.int64) * stride_qb + (head * Q_PER_KV + m)[:, None].to(tl.int64) * stride_qh + k[None, :]
    query = tl.load(query_ptr + at, mask=(m < Q_PER_KV)[:, None] & (k < KEY_DIM)[None, :], other=0.0).to(
        DOT
    )  # [BLOCK_M, BLOCK_K]
    peak = tl.full([BLOCK_M], -1.0e20, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    for begin in tl.range(start, end, BLOCK_N, num_stages=NUM_STAGES):
        n = begin + tl.arange(0, BLOCK_N)
        real = n < end
        key = tl.load(
            key_ptr + (base + n)[:, None] * KEY_DIM + k[None, :], mask=real[:, None] & (k < KEY_DIM)[None, :], other=0.0
        )
        value = tl.load(value_ptr + (base + n)[:, None] * VALUE_DIM + v[None, :], mask=real[:, None] & (v < VALUE_DIM)[None, :],
                        other=0.0)  # fmt: skip
        score = tl.dot(query, tl.trans(key.to(DOT)), input_precision="ieee") * scale_log2  # [BLOCK_M, BLOCK_N]
        score = tl.where(real[None, :], score, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(score, 1))
        weight = tl.exp2(score - new_peak[:, None])
        alpha = tl.exp2(peak - new_peak)
        total = total * alpha + tl.sum(weight, 1)
        acc = acc * alpha[:, None] + tl.dot(weight.to(DOT), value.to(DOT), input_precision="ieee")
        peak = new_peak
    saw = total > 0
    out = tl.where(saw[:, None], acc / tl.where(saw, total, 1.0)[:, None], 0.0)
    at = ((row * NUM_HEADS + head) * Q_PER_KV + m).to(tl.int64) * num_splits + split
    mask = m < Q_PER_KV
    tl.store(partial_ptr + at[:, None] * VALUE_DIM + v[None, :], out.to(partial_ptr.dtype.element_ty),
             mask=mask[:, None] & (v < VALUE_DIM)[None, :])  # fmt: skip
    tl.store(lse_ptr + at, tl.where(saw, peak + tl.log2(tl.where(saw, total, 1.0)), HIDDEN), mask=mask)


def store(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    stored_key: Tensor,
    stored_value: Tensor,
    positions: Tensor,
) -> None:
    """The new token of every row to slot ``positions[b]``.

    | tensor | shape |
    |---|---|
    | query | [batch_size, num_q_heads, 1, key_dim]; with ``rotary`` it is embedded in place |
    | key, value | [batch_size, num_kv_heads, 1, dim], channels contiguous |
    | rotary | (cos, sin), each [positions, key_dim]; None: already embedded |
    | stored_key, stored_value | [batch_size, num_kv_heads, slots, dim] |
    | positions | [batch_size] int32: tokens each row holds before |
    """
    batch_size, heads, _, key_dim = key.shape
    value_dim = value.shape[3]
    cos, sin = rotary if rotary is not None else (None, None)
    store_kernel[(batch_size * heads,)](
        query, key, value, cos, sin, stored_key, stored_value, positions,
        *query.stride()[:2], *key.stride()[:2], *value.stride()[:2], stored_key.shape[2],
        NUM_HEADS=heads, Q_PER_KV=query.shape[1] // heads, KEY_DIM=key_dim, VALUE_DIM=value_dim,
        BLOCK_Q=triton.next_power_of_2(query.shape[1] // heads), BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=triton.next_power_of_2(value_dim), ROTARY=rotary is not None,
        EARLY=(early := overlaps(key)), enable_fp_fusion=False, num_warps=1, **({"launch_pdl": True} if early else {}),
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


def plan_splits(programs: int, num_tokens: int, tile: int, at_once: int) -> int:
    """Splits of a row: those that end first, where ``at_once`` programs run and each costs a tile more than it has.

    >>> plan_splits(8, 131072, 128, 132), plan_splits(24, 20000, 128, 132), plan_splits(512, 4096, 128, 132)
    (16, 11, 1)
    """
    tiles = -(-num_tokens // tile)

    def end(splits: int) -> int:
        return -(-programs * splits // at_once) * (-(-tiles // splits) + 1)

    return min(range(1, min(tiles, MAX_SPLITS) + 1), key=end)


def attend(
    query: Tensor, stored_key: Tensor, stored_value: Tensor, positions: Tensor, scale: float, num_tokens: int
) -> Tensor:
    """Attention of ``query [batch_size, num_q_heads, 1, key_dim]`` over each row's first ``positions[b] + 1`` slots.

    ``num_tokens``: the most that a row will hold; it plans the splits.  Raises ``ValueError`` for more than
    ``MAX_Q_PER_KV`` query heads that share one key/value head.
    """
    batch_size, q_heads = query.shape[:2]
    heads, num_slots, key_dim = stored_key.shape[1:]
    value_dim, q_per_kv = stored_value.shape[3], q_heads // heads
    if q_per_kv > MAX_Q_PER_KV:
        raise ValueError(f"{q_per_kv} query heads a key/value head: allowed are up to {MAX_Q_PER_KV}")
    block_k, block_v = triton.next_power_of_2(key_dim), triton.next_power_of_2(value_dim)
    tile, a_multiprocessor = plan_tile(block_k + block_v, stored_key.element_size(), shared_bytes(query.device))
    sms = num_multiprocessors(query.device) if query.is_cuda else 1
    splits = plan_splits(batch_size * heads, num_tokens, tile, sms * a_multiprocessor)
    out = query.new_empty(batch_size, q_heads, 1, value_dim)
    partial = query.new_empty(batch_size * q_heads, splits, value_dim, dtype=torch.float32) if splits > 1 else out
    lse = query.new_empty(batch_size * q_heads, splits, dtype=torch.float32)
    dot = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16}.get(query.dtype, tl.float16)
    attend_kernel[(splits, batch_size * heads)](
        query, stored_key, stored_value, positions, partial, lse, scale * LOG2E, *query.stride()[:2], num_slots, splits,
        NUM_HEADS=heads, Q_PER_KV=q_per_kv, KEY_DIM=key_dim, VALUE_DIM=value_dim, BLOCK_M=16, BLOCK_N=tile,
        BLOCK_K=block_k, BLOCK_V=block_v, DOT=dot, NUM_STAGES=NUM_STAGES, enable_fp_fusion=True, num_warps=4,
        EARLY=(early := overlaps(query)), **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    if splits > 1:
        combine_kernel[(batch_size * q_heads, triton.cdiv(value_dim, COMBINE_D))](
            partial, lse, out, splits, VALUE_DIM=value_dim, BLOCK_D=COMBINE_D, BLOCK_S=triton.next_power_of_2(splits),
            enable_fp_fusion=FUSED_MERGE, num_warps=4,
            EARLY=early, **({"launch_pdl": True} if early else {}),
        )  # fmt: skip
    return out
