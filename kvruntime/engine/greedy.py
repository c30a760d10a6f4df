"""Triton: the likeliest token of each row, and the rows' positions counted on: the end of a decode step in one launch.

``token[b] = argmax_v logits[b, v]``, the first of equals; ``positions[b] += 1``.  One program a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_V = 8192


@triton.jit
def greedy_kernel(logits_ptr, tokens_ptr, positions_ptr, vocab_size, BLOCK_V: tl.constexpr):
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * vocab_size
    v = tl.arange(0, BLOCK_V)
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)
    where = tl.zeros([BLOCK_V], tl.int32)
    for first in range(0, vocab_size, BLOCK_V):
        logit = tl.load(logits_ptr + first + v, mask=first + v < vocab_size, other=float("-inf")).to(tl.float32)
        better = logit > best
        best = tl.where(better, logit, best)
        where = tl.where(better, first + v, where)
    first_best = tl.min(tl.where(best == tl.max(best, 0), where, 2147483647), 0)
    tl.store(tokens_ptr + row, tl.where(first_best < vocab_size, first_best, 0).to(tl.int64))
    tl.store(positions_ptr + row, tl.load(positions_ptr + row) + 1)


def greedy(logits: Tensor, tokens: Tensor, positions: Tensor) -> None:
    """``logits [batch_size, vocab_size]`` contiguous -> ``tokens [batch_size]`` int64; ``positions`` int32 grow by one.

    A row without a number (all NaN) gives token 0.
    """
    greedy_kernel[(logits.shape[0],)](
        logits, tokens, positions, logits.shape[1], BLOCK_V=BLOCK_V, enable_fp_fusion=True, num_warps=8
    )
