"""Triton: rows that lie in one line, each beginning where ``starts [batch_size + 1]`` says."""

from __future__ import annotations

import triton
import triton.language as tl


def num_blocks(tokens: int, batch_size: int, size: int, each: int = 1) -> int:
    """Blocks of ``size`` that hold any ``batch_size`` rows of ``tokens`` tokens in all, ``each`` places a token: none
    holds two rows' (:func:`row_of` says whose)."""
    return tokens * each // size + batch_size


def block_b(batch_size: int) -> int:
    """Rows that are compared at once, as compile-time constant."""
    return max(32, int(triton.next_power_of_2(batch_size)))


@triton.jit
def row_of(block, starts_ptr, batch_size, SIZE: tl.constexpr, EACH: tl.constexpr, BLOCK_B: tl.constexpr):
    """``(row, which of its blocks, where it begins, its tokens)``;
    a row may have fewer blocks than are set aside for it."""
    b = tl.arange(0, BLOCK_B)
    start = tl.load(starts_ptr + b, mask=b < batch_size, other=0)
    first = tl.where(b < batch_size, start * EACH // SIZE + b, 2147483647)
    row = tl.sum((first <= block).to(tl.int32), 0) - 1
    first = tl.sum(tl.where(b == row, first, 0), 0)
    start = tl.sum(tl.where(b == row, start, 0), 0)
    return row, block - first, start, tl.load(starts_ptr + row + 1) - start


@triton.jit
def rows_of(token, starts_ptr, batch_size, BLOCK_B: tl.constexpr):
    """Of places ``token [n]`` in the line, whose they are; rows without tokens have none."""
    b = tl.arange(0, BLOCK_B)
    end = tl.load(starts_ptr + 1 + b, mask=b < batch_size, other=2147483647)
    row = tl.sum((end[None, :] <= token[:, None]).to(tl.int32), 1)
    return tl.minimum(row, batch_size - 1)
