"""Triton: rows times a normalised Hadamard matrix, by sums and differences in registers."""

from __future__ import annotations

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


@triton.constexpr_function
def log2(size):
    return size.bit_length() - 1


@triton.jit
def rotate_rows(x, N: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr):
    """float32 ``x [N, WIDTH]``, every ``SIZE`` channels times the normalised Hadamard matrix, which is its own inverse.

    Sums and differences in pairs 1, 2, 4, ... channels apart, as :func:`kvruntime.kernels.reference.rotated` adds.
    """
    second = tl.arange(0, 2)[None, None, :, None] == 1
    for i in tl.static_range(log2(SIZE)):
        pairs = tl.reshape(x, (N, WIDTH >> (i + 1), 2, 1 << i))
        plus = tl.sum(pairs, 2)[:, :, None, :]
        minus = tl.sum(tl.where(second, -pairs, pairs), 2)[:, :, None, :]
        x = tl.reshape(tl.where(second, minus, plus), (N, WIDTH))
    return x * SIZE**-0.5


@triton.jit
def sum_of_squares(x, N: tl.constexpr, WIDTH: tl.constexpr, NEIGHBOURS: tl.constexpr = False):
    """``[N]``: of float32 ``x [N, WIDTH]``, halves or neighbours added until one is left."""
    if INTERPRETED:
        x = x * x
    else:  # rounded before it is added: of a product that is not, every thread would have another sum
        x = tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    for i in tl.static_range(log2(WIDTH)):
        if NEIGHBOURS:
            x = tl.sum(tl.reshape(x, (N, WIDTH >> (i + 1), 2)), 2)
        else:
            x = tl.sum(tl.reshape(x, (N, 2, WIDTH >> (i + 1))), 1)
    return tl.reshape(x, (N,))


@triton.jit
def rotated_tokens(
    x, TYPE: tl.constexpr, N: tl.constexpr, WIDTH: tl.constexpr, SIZE: tl.constexpr, LIMIT: tl.constexpr
):
    """float32 ``x [N, WIDTH]`` rotated, clamped to +-``LIMIT``, as ``TYPE``; every NaN is one bit pattern."""
    x = rotate_rows(x, N, WIDTH, SIZE)
    real = x == x
    x = tl.minimum(tl.maximum(tl.where(real, x, 0.0), -LIMIT), LIMIT).to(TYPE)
    return tl.where(real, x, tl.full(x.shape, float("nan"), TYPE))


@triton.jit
def rotate_kernel(x_ptr, out_ptr, stride_b, stride_h, stride_t, num_tokens, NUM_HEADS: tl.constexpr, DIM: tl.constexpr,
                  SIZE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, LIMIT: tl.constexpr):  # fmt: skip
    """``BLOCK_T`` tokens of one row and head, in ``out_ptr``'s type and clamped, contiguous
    ``[rows, NUM_HEADS, num_tokens, DIM]``."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    row = (tl.program_id(1) // NUM_HEADS).to(tl.int64)
    head = (tl.program_id(1) % NUM_HEADS).to(tl.int64)
    d = tl.arange(0, BLOCK_D)
    mask = (t < num_tokens)[:, None] & (d < DIM)[None, :]
    at = row * stride_b + head * stride_h + t.to(tl.int64)[:, None] * stride_t + d[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    x = rotated_tokens(x, out_ptr.dtype.element_ty, BLOCK_T, BLOCK_D, SIZE, LIMIT)
    out = out_ptr + ((row * NUM_HEADS + head) * num_tokens + t[:, None]) * DIM + d[None, :]
    tl.store(out, x, mask=mask)
