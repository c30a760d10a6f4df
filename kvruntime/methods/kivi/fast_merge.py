"""Gluon and Triton: what splits found becomes a row's output, for :mod:`kvruntime.methods.kivi.fast`.

By the program that comes last, where splits are few, else by a kernel of its own (:func:`combine_kernel`), which also
rotates the values back.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels.hadamard import rotate_rows
from kvruntime.methods.kivi.fast_operands import HIDDEN
from kvruntime.methods.kivi.fast_plan import TILE, padded

barrier = getattr(gl, "barrier", None) or gl.thread_barrier  # Triton 3.7, before it
MAX_PARTS_AT_ONCE = tl.constexpr(256)
EXACT_UNITS = gl.constexpr(2)


@triton.jit
def units_of(packed, chunks):
    """Work of one head of a row, in tiles: chunks of exact slots first, each as much as ``EXACT_UNITS`` tiles."""
    return packed // TILE + EXACT_UNITS * chunks


@gluon.constexpr_function
def parts_shape(heads, dim):
    """``(parts, heads, dim)`` that a program merges at a time."""
    heads = 1 << (heads - 1).bit_length()
    return max(2, min(16, 4096 // (heads * dim))), heads, dim


@gluon.constexpr_function
def parts_layout(heads, dim):
    """``[parts, heads, dim]``: 16 bytes a lane along the channels, what lanes are left over heads, then parts."""
    channels = min(32, dim // 4)
    over = min(32 // channels, heads)
    return gl.BlockedLayout([1, 1, 4], [32 // channels // over, over, channels], [1, 1, 1], [2, 1, 0])


@gluon.jit
def merge_parts(partial_ptr, lse_ptr, arrivals_ptr, draws_ptr, out_ptr, block, first_query_head, num_heads, num_parts,
                HEADS: gl.constexpr, DIM: gl.constexpr):  # fmt: skip
    """What :func:`combine_kernel` does, by the last program of a block to come; it leaves the block's count at zero."""
    barrier()  # every lane's part is written before one counts it
    if gl.atomic_add(arrivals_ptr + block, 1, sem="acq_rel", scope="gpu") == num_parts - 1:
        gl.store(arrivals_ptr + block, 0)
        if draws_ptr is not None:
            gl.store(draws_ptr + block, 0)
        CHANNELS: gl.constexpr = padded(DIM)
        SHAPE: gl.constexpr = parts_shape(HEADS, CHANNELS)
        PARTS: gl.constexpr = SHAPE[0]
        PADDED: gl.constexpr = SHAPE[1]
        ALL: gl.constexpr = parts_layout(PADDED, CHANNELS)
        EACH: gl.constexpr = gl.SliceLayout(2, ALL)
        PER_HEAD: gl.constexpr = gl.SliceLayout(0, EACH)
        s = gl.arange(0, PARTS, layout=gl.SliceLayout(1, EACH))[:, None]
        n = gl.arange(0, PADDED, layout=PER_HEAD)
        d = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(1, ALL)))[None, None, :]
        peak = gl.full([PADDED], HIDDEN, gl.float32, PER_HEAD)
        total = gl.zeros([PADDED], gl.float32, PER_HEAD)
        out = gl.zeros([PADDED, CHANNELS], gl.float32, gl.SliceLayout(0, ALL))
        for begin in range(0, num_parts, PARTS):
            at, wanted = gl.broadcast(
                (block * num_parts + begin + s) * HEADS + n[None, :], (begin + s < num_parts) & (n < HEADS)[None, :]
            )
            lse = gl.load(lse_ptr + at, mask=wanted, other=HIDDEN, cache_modifier=".cg")
            at, wanted = gl.broadcast(at[:, :, None] * DIM + d, wanted[:, :, None])
            if CHANNELS > DIM:
                wanted = wanted & (d < DIM)
            part = gl.load(partial_ptr + at, mask=wanted, other=0.0, cache_modifier=".cg")
            new_peak = gl.maximum(peak, gl.max(lse, axis=0))
            lse, shift = gl.broadcast(lse, new_peak[None, :])
            weight = gl.where(lse > HIDDEN, gl.exp2(lse - shift), 0.0)
            alpha = gl.exp2(peak - new_peak)
            peak = new_peak
            total = total * alpha + gl.sum(weight, axis=0)
            part, weight = gl.broadcast(part, weight[:, :, None])
            out, alpha = gl.broadcast(
                out, gl.convert_layout(alpha, gl.SliceLayout(1, gl.SliceLayout(0, ALL)), assert_trivial=True)[:, None]
            )
            out = out * alpha + gl.sum(part * weight, axis=0)
        total = gl.convert_layout(gl.where(total > 0, total, 1.0), gl.SliceLayout(1, gl.SliceLayout(0, ALL)))[:, None]
        n = gl.arange(0, PADDED, layout=gl.SliceLayout(1, gl.SliceLayout(0, ALL)))[:, None]
        d = gl.arange(0, CHANNELS, layout=gl.SliceLayout(0, gl.SliceLayout(0, ALL)))[None, :]
        out, total = gl.broadcast(out, total)
        at, wanted = gl.broadcast((first_query_head + n) * DIM + d, (n < HEADS) & (n < num_heads))
        if CHANNELS > DIM:
            wanted = wanted & (d < DIM)
        gl.store(out_ptr + at, (out / total).to(out_ptr.dtype.element_ty), mask=wanted)


@triton.jit
def weighed_at_once(partial_ptr, lse_ptr, first, parts, d, HEADS: tl.constexpr, DIM: tl.constexpr,
                    BLOCK_S: tl.constexpr):  # fmt: skip
    """Parts merged, of which a program has all channels ``d``: all their weights are known before the first is read, so
    that threads have sums of their own until the end."""
    peak = tl.full([], HIDDEN, tl.float32)
    total = tl.zeros([], tl.float32)
    for begin in range(0, parts, MAX_PARTS_AT_ONCE):
        s = begin + tl.arange(0, MAX_PARTS_AT_ONCE)
        lse = tl.load(lse_ptr + first + s * HEADS, mask=s < parts, other=HIDDEN)
        new_peak = tl.maximum(peak, tl.max(lse, 0))
        total = total * tl.exp2(peak - new_peak) + tl.sum(tl.where(lse > HIDDEN, tl.exp2(lse - new_peak), 0.0), 0)
        peak = new_peak
    summed = tl.zeros([BLOCK_S, d.shape[0]], tl.float32)
    s = tl.arange(0, BLOCK_S)
    at = first + s * HEADS
    lse = tl.load(lse_ptr + at, mask=s < parts, other=HIDDEN)
    part = tl.load(partial_ptr + at[:, None] * DIM + d[None, :], mask=(s < parts)[:, None], other=0.0)
    for begin in range(0, parts, BLOCK_S):
        s = begin + BLOCK_S + tl.arange(0, BLOCK_S)
        at = first + s * HEADS
        next_lse = tl.load(lse_ptr + at, mask=s < parts, other=HIDDEN)
        next_part = tl.load(partial_ptr + at[:, None] * DIM + d[None, :], mask=(s < parts)[:, None], other=0.0)
        weight = tl.where(lse > HIDDEN, tl.exp2(lse - peak), 0.0)
        summed += part * weight[:, None]
        lse = next_lse
        part = next_part
    return tl.sum(summed, 0) / tl.where(total > 0, total, 1.0)


@triton.jit(do_not_specialize=["chunks", "batch_size", "num_splits", "num_queries"])
def combine_kernel(partial_ptr, lse_ptr, packed_ptr, draws_ptr, out_ptr, chunks, batch_size, num_splits, num_queries,
                   NUM_HEADS: tl.constexpr, Q_PER_KV: tl.constexpr, HEADS: tl.constexpr, DIM: tl.constexpr,
                   BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, EARLY: tl.constexpr,
                   ROTATION: tl.constexpr):  # fmt: skip
    """Merge one query head's parts: ``out = sum_s 2**(lse_s - max) out_s / sum_s 2**(lse_s - max)``; with ``ROTATION``,
    which ``BLOCK_D`` then is, rotated."""
    blocks = ((1 if num_queries is None else num_queries) * Q_PER_KV + HEADS - 1) // HEADS
    query_head = tl.program_id(0)
    if num_queries is None:
        member = query_head % Q_PER_KV
        block = query_head // Q_PER_KV * blocks + member // HEADS
    else:  # numbered as the columns are, key/value head by head; heads of one query lie side by side in the output
        group = query_head // (num_queries * Q_PER_KV)
        member = query_head % (num_queries * Q_PER_KV)
        block = group * blocks + member // HEADS
        query_head = (group // NUM_HEADS * num_queries + member // Q_PER_KV) * NUM_HEADS + group % NUM_HEADS
        query_head = query_head * Q_PER_KV + member % Q_PER_KV
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    if BLOCK_B == 0:
        slot = block * num_splits
        parts = num_splits
    else:  # the programs whose shares reach into this block
        b = tl.arange(0, BLOCK_B)
        units = units_of(tl.load(packed_ptr + b, mask=b < batch_size, other=0), chunks)
        units = tl.where(b < batch_size, units, 0)
        row = block // (NUM_HEADS * blocks)
        own = tl.sum(tl.where(b == row, units, 0), 0)
        start = tl.sum(tl.where(b < row, units, 0), 0) * (NUM_HEADS * blocks) + block % (NUM_HEADS * blocks) * own
        share = (tl.sum(units, 0) * (NUM_HEADS * blocks) + num_splits - 1) // num_splits
        slot = start // share + block
        parts = (start + own - 1) // share - start // share + 1
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    if draws_ptr is not None:  # left as they were found
        if (tl.program_id(1) == 0) & (member % HEADS == 0):
            tl.store(draws_ptr + block, 0)
    if ROTATION > 0:
        out = weighed_at_once(partial_ptr, lse_ptr, slot * HEADS + member % HEADS, parts, d, HEADS, DIM, BLOCK_S)
    else:
        peak = tl.full([], HIDDEN, tl.float32)
        total = tl.zeros([], tl.float32)
        out = tl.zeros([BLOCK_D], tl.float32)
        for begin in range(0, parts, BLOCK_S):
            s = begin + tl.arange(0, BLOCK_S)
            at = (slot + s) * HEADS + member % HEADS
            part = tl.load(partial_ptr + at[:, None] * DIM + d[None, :], mask=(s < parts)[:, None], other=0.0)
            lse = tl.load(lse_ptr + at, mask=s < parts, other=HIDDEN)
            new_peak = tl.maximum(peak, tl.max(lse, 0))
            weight = tl.where(lse > HIDDEN, tl.exp2(lse - new_peak), 0.0)
            alpha = tl.exp2(peak - new_peak)
            peak = new_peak
            total = total * alpha + tl.sum(weight, 0)
            out = out * alpha + tl.sum(part * weight[:, None], 0)
        out = out / tl.where(total > 0, total, 1.0)
    if ROTATION > 0:
        out = rotate_rows(out.reshape((1, BLOCK_D)), 1, BLOCK_D, ROTATION).reshape((BLOCK_D,))
    tl.store(out_ptr + query_head * DIM + d, out.to(out_ptr.dtype.element_ty))
