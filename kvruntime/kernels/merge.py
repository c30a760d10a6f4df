"""Triton: the online softmax, and the kernel that merges splits."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.kernels.hadamard import rotate_rows

LOG2E = 1.4426950408889634
TWICE_LOG2E = tl.constexpr(2 * LOG2E)

HIDDEN = tl.constexpr(-1.0e30)
COMBINE_D = 32
FUSED_MERGE = False
"""Whether a merge adds products that are not rounded: threads that hold one sum would each leave a product of its own
as it is, end apart in the last bit, and write that to one place of shared memory on the way out, a race."""


@triton.jit
def scaled(score, scale_log2, softcap):
    """Scores in powers of two: times ``scale_log2``, and with ``softcap``, in powers of two too,
    ``softcap * tanh(score / softcap)``."""
    score = score * scale_log2
    if softcap is not None:
        score = softcap - 2 * softcap / (1 + tl.exp2(score * (TWICE_LOG2E / softcap)))
    return score


@triton.jit
def sink_logits(sinks_ptr, query_head, mask, split):
    """``(peak, total)`` that the online softmax of query heads begins with: a sink is a token of no value, which the
    first split sees."""
    sink = tl.load(sinks_ptr + query_head, mask=mask, other=0.0).to(tl.float32) * (TWICE_LOG2E / 2)
    return tl.where(split == 0, sink, HIDDEN), tl.where(split == 0, tl.full(sink.shape, 1.0, tl.float32), 0.0)


@triton.jit
def softmax_step(score, visible, peak, total):
    """``(weights, rescale, peak, total)`` after a block of scores, in powers of two."""
    score = tl.where(visible, score, HIDDEN)
    new_peak = tl.maximum(peak, tl.max(score, 1))
    alpha = tl.exp2(peak - new_peak)
    weight = tl.where(visible, tl.exp2(score - new_peak[:, None]), 0.0)
    return weight, alpha, new_peak, total * alpha + tl.sum(weight, 1)


@triton.jit
def combine_kernel(partial_ptr, lse_ptr, out_ptr, num_splits, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
                   BLOCK_S: tl.constexpr, EARLY: tl.constexpr = False, ROTATION: tl.constexpr = 0,
                   signs_ptr=None):  # fmt: skip
    """Merge the splits of one query row: ``out = sum_s 2**(lse_s - max) out_s / sum_s 2**(lse_s - max)``.  With
    ``ROTATION``, which ``BLOCK_D`` then is, that is rotated (:func:`kvruntime.kernels.hadamard.rotate_rows`), and
    multiplied by ``signs_ptr``'s where there are some."""
    if EARLY:
        gdc_wait()
        gdc_launch_dependents()
    row = tl.program_id(0).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + row * num_splits + s, mask=s < num_splits, other=HIDDEN)
    weight = tl.where(lse > HIDDEN, tl.exp2(lse - tl.max(lse, 0)), 0.0)
    total = tl.sum(weight, 0)
    mask = (weight > 0)[:, None] & (d < VALUE_DIM)[None, :]
    part = tl.load(partial_ptr + (row * num_splits + s)[:, None] * VALUE_DIM + d[None, :], mask=mask, other=0.0)
    out = tl.sum(part * weight[:, None], 0) / tl.where(total > 0, total, 1.0)
    if ROTATION > 0:
        out = tl.reshape(rotate_rows(tl.reshape(out, (1, BLOCK_D)), 1, BLOCK_D, ROTATION), (BLOCK_D,))
    if signs_ptr is not None:
        out *= tl.load(signs_ptr + d, mask=d < VALUE_DIM, other=0).to(tl.float32)
    tl.store(out_ptr + row * VALUE_DIM + d, out.to(out_ptr.dtype.element_ty), mask=d < VALUE_DIM)
