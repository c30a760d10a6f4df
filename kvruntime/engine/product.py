"""Triton: products of a decode step's rows with a weight on the matrix units, where ``linear.py`` has too many rows::

    y = activation(x W^T + bias)        x [M, K], W [N, K];   or its parts over shares of K, in float32

Still a stream of W, only with enough rows that the tensor cores must multiply.  A program asks for its share of W to
come into the L2 cache before it waits for the launch that makes ``x`` (sm_90 and later); then it copies tiles ahead.
Where N alone would leave multiprocessors idle, K is split too and the parts are left for the norm that follows
(``norm.py``) to sum: in order, so that the result does not depend on timing.

Parallel over blocks of rows of W, blocks of rows of x, and shares of K.  On Hopper ``hopper.py`` takes what it can.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.engine import hopper, reference
from kvruntime.engine.linear import NUM_SMS, activate, load_biases, multiprocessors, overlaps

MAX_ROWS = 128
"""Beyond, cuBLAS."""
SHARED_BYTES = 96 * 1024
"""Shared memory for the tiles under way: two programs a multiprocessor on an H100, one on the smallest cards."""
LARGEST_BLOCK_M = 64
"""Rows of x a program; 32 keeps Triton from Hopper's warp-group instructions."""
LINE = tl.constexpr(128)
AHEAD = tl.constexpr(6)
"""Steps of W that a program asks for while it waits: more of a large W would only push each other out of the cache."""


@triton.jit
def prefetch(weight_ptr, n, first, width, K: tl.constexpr, SHARE: tl.constexpr, BLOCK_K: tl.constexpr):
    """Ask for the lines of ``W[n, first : first + SHARE]``, the first ``AHEAD`` steps, to come into the L2 cache."""
    STRIDE: tl.constexpr = LINE // (weight_ptr.dtype.element_ty.primitive_bitwidth // 8)
    STEPS: tl.constexpr = SHARE // BLOCK_K
    for step in tl.static_range(STEPS if STEPS < AHEAD else AHEAD):
        k = first + step * BLOCK_K + tl.arange(0, BLOCK_K // STRIDE) * STRIDE
        at = tl.minimum(n, width - 1).to(tl.int64)[:, None] * K + tl.minimum(k, K - 1)[None, :]
        tl.inline_asm_elementwise("prefetch.global.L2 [$1]; mov.b32 $0, 0;", "=r,l", [weight_ptr + at], dtype=tl.int32,
                                  is_pure=False, pack=1)  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def product_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, num_rows, width,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SHARE: tl.constexpr,
    SUMS: tl.constexpr, ACTIVATION: tl.constexpr, PARTIAL: tl.constexpr, STAGES: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``SHARE``: how much of K a program takes, in ``SUMS`` sums.  ``PARTIAL``: store float32, share by share."""
    if EARLY:
        gdc_launch_dependents()
    GATED: tl.constexpr = ACTIVATION == "silu"
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)  # programs that read the same rows of W are neighbours
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    first = tl.program_id(2) * SHARE
    k = tl.arange(0, BLOCK_K)
    factor_ptr = weight_ptr + tl.cast(width, tl.int64) * K
    bias, factor_bias = load_biases(bias_ptr, n, width, GATED)
    if EARLY:
        prefetch(weight_ptr, n, first, width, K, SHARE, BLOCK_K)
        if GATED:
            prefetch(factor_ptr, n, first, width, K, SHARE, BLOCK_K)
        gdc_wait()
    rows = n.to(tl.int64)[:, None] * K
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    factor = acc
    for _ in range(SUMS):
        part = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        factor_part = part
        for step in tl.range(0, SHARE // BLOCK_K // SUMS, num_stages=STAGES):
            at = first + step * BLOCK_K + k
            wanted = (m < num_rows)[:, None] & (at < K)[None, :]
            x = tl.load(x_ptr + m[:, None] * K + at[None, :], mask=wanted, other=0.0)
            wanted = (n < width)[:, None] & (at < K)[None, :]
            w = tl.load(weight_ptr + rows + at[None, :], mask=wanted, other=0.0)  # [BLOCK_N, BLOCK_K]
            part = tl.dot(x, tl.trans(w), part, input_precision="ieee")
            if GATED:
                u = tl.load(factor_ptr + rows + at[None, :], mask=wanted, other=0.0)
                factor_part = tl.dot(x, tl.trans(u), factor_part, input_precision="ieee")
        acc += part
        factor += factor_part
        first += SHARE // SUMS
    out_ptr += tl.program_id(2).to(tl.int64) * num_rows * width
    out_ptrs = out_ptr + m.to(tl.int64)[:, None] * width + n[None, :]
    wanted = (m < num_rows)[:, None] & (n < width)[None, :]
    if PARTIAL:
        tl.store(out_ptrs, acc, mask=wanted)
    else:
        dtype: tl.constexpr = out_ptr.dtype.element_ty
        y = activate(acc + bias[None, :], ACTIVATION, dtype)
        if GATED:
            y = (y.to(tl.float32) * (factor + factor_bias[None, :]).to(dtype).to(tl.float32)).to(dtype)
        tl.store(out_ptrs, y, mask=wanted)


@dataclass(frozen=True)
class Plan:
    """How a product is launched.

    ``share`` is a program's part of K, a multiple of ``block_k``; ``sums`` divides its steps.  In float32 one sum over
    all of a long K would err ten times as much as cuBLAS's; 16-bit numbers are rounded by far more than that.
    """

    block_m: int
    block_n: int
    block_k: int
    share: int
    sums: int
    stages: int
    num_warps: int


@cache
def plan(num_rows: int, width: int, k: int, gated: bool, partial: bool, itemsize: int, num_sms: int = NUM_SMS) -> Plan:
    """Tiles as wide as leave two programs a multiprocessor; where K may be split, about one program each.

    >>> plan(64, 768, 3072, False, True, 2)
    Plan(block_m=64, block_n=64, block_k=128, share=384, sums=1, stages=3, num_warps=4)
    """
    block_m = 16 if num_rows <= 16 else 32 if num_rows <= 32 else LARGEST_BLOCK_M
    blocks_m = -(-num_rows // block_m)
    narrowest = 64 if partial else 16 if block_m == 16 else 32
    block_n = 64 if gated else 128
    while block_n > narrowest and -(-width // block_n) * blocks_m < 2 * num_sms:
        block_n //= 2
    block_k = 64 if block_n == 128 or itemsize == 4 else 128
    while block_k > 16 and block_k >= 2 * k:
        block_k //= 2
    steps = -(-k // block_k)
    splits = max(1, min(steps, num_sms // (-(-width // block_n) * blocks_m))) if partial else 1
    share = -(-steps // splits) * block_k
    tiles = block_k * itemsize * (block_m + block_n * (2 if gated else 1))
    sums = gcd(share // block_k, 8) if itemsize == 4 else 1
    return Plan(block_m, block_n, block_k, share, sums, max(2, min(4, SHARED_BYTES // tiles)), 4 if block_n > 16 else 2)


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, partial: bool) -> Tensor:
    width = reference.check(x, weight, bias, None, activation, None)
    num_rows, k = x.shape
    if num_rows > MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows, not 1 to {MAX_ROWS}")
    if hopper.supports(x, weight):
        return hopper.launch(x, weight, bias, activation, partial)
    num_sms = multiprocessors(x.device)
    chosen = plan(num_rows, width, k, activation == "silu", partial, weight.element_size(), num_sms)
    splits = -(-k // chosen.share)
    early = overlaps(x.device)
    shape = (splits, num_rows, width) if partial else (num_rows, width)
    out = x.new_empty(shape, dtype=torch.float32 if partial else x.dtype)
    product_kernel[(-(-num_rows // chosen.block_m), -(-width // chosen.block_n), splits)](
        x, weight, bias, out, num_rows, width, K=k, BLOCK_M=chosen.block_m, BLOCK_N=chosen.block_n,
        BLOCK_K=chosen.block_k, SHARE=chosen.share, SUMS=chosen.sums, ACTIVATION=activation, PARTIAL=partial,
        STAGES=chosen.stages, EARLY=early, enable_fp_fusion=True, num_warps=chosen.num_warps,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """``activation(x @ weight.T + bias)`` in one launch.

    ============ ======================= ====================================================
    x            ``[M, K]``              M from 1 to 128; contiguous, as all, and of one dtype
    weight       ``[N, K]``              ``[2 N, K]`` for ``silu``: gate rows, then the others
    bias         ``[N]`` or None         ``[2 N]`` for ``silu``
    returns      ``[M, N]``
    ============ ======================= ====================================================
    """
    return launch(x, weight, bias, activation, False)


def parts(x: Tensor, weight: Tensor) -> Tensor:
    """``x @ weight.T`` in float32 as parts to be summed: ``[S, M, N]``, for :func:`kvruntime.engine.norm.add_norm`."""
    return launch(x, weight, None, None, True)
