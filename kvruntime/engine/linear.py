"""Triton: a decode step's linear layer with norm, bias, activation and residual, up to four rows, in one launch::

    y = residual + activation(norm(x) W^T + bias)        x [M, K], W [N, K]

Such a product is a stream of W through the multiprocessors, a few microseconds long, so three things count.  W is read
once, 16 bytes a thread and several loads ahead.  ``x`` is small: every program normalizes it for itself rather than
wait for another launch.  And a program waits for the launch before it (which makes ``x`` and ``residual``) only once
its first loads of W are under way (sm_90 and later: programmatic dependent launch): W flows while the other ends.

Parallel over blocks of rows of W.  K lies across the threads, all of it at once up to ``WHOLE_K``: a thread keeps its
share of ``x`` in registers, and a program takes tile after tile of W.  A longer K goes in steps, one tile a program.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.engine import reference
from kvruntime.engine.reference import Norm
from kvruntime.kernels.launch import num_multiprocessors

MAX_ROWS = 4
WHOLE_K = 4096
STEP_K = 2048
OVERLAP = True
"""Whether launches overlap on devices that can (sm_90 and later)."""
NUM_SMS = 132
"""Multiprocessors of an H100: what a plan shares the work among where it is not told a device's."""


@triton.jit
def load_rows(weight_ptr, n, k, width, K: tl.constexpr):
    """``W[n, k]``, ``[BLOCK_N, BLOCK_K]``, zero outside."""
    at = n.to(tl.int64)[:, None] * K + k[None, :]
    wanted = (n < width)[:, None] & (k < K)[None, :]
    return tl.load(weight_ptr + at, mask=wanted, other=0.0, eviction_policy="evict_first")


@triton.jit
def load_row(x_ptr, k, wanted, K: tl.constexpr):
    """``wanted`` may be a plain bool, which the interpreter of Triton 3.9 would make an integer of."""
    return tl.load(x_ptr + k, mask=k < tl.where(wanted, K, 0), other=0.0)


@triton.jit
def mean_and_scale(x_ptr, k, wanted, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, STEPS: tl.constexpr,
                   NORM: tl.constexpr):  # fmt: skip
    """``(mean, 1 / deviation)`` of one row of x, in two passes; an RMS norm's mean is zero."""
    mean = 0.0
    if NORM == "layer":
        part = tl.zeros([BLOCK_K], tl.float32)
        for step in tl.static_range(STEPS):
            part += load_row(x_ptr, step * BLOCK_K + k, wanted, K).to(tl.float32)
        mean = tl.sum(part, 0) / K
    part = tl.zeros([BLOCK_K], tl.float32)
    for step in tl.static_range(STEPS):
        x = load_row(x_ptr, step * BLOCK_K + k, wanted, K).to(tl.float32)
        x = tl.where(step * BLOCK_K + k < K, x - mean, 0.0)
        part += x * x
    return mean, tl.rsqrt(tl.sum(part, 0) / K + eps)


@triton.jit
def normalized(x, mean, scale, norm_weight, norm_bias, NORM: tl.constexpr):
    """``x`` with the norm applied, rounded as the stock model rounds."""
    if NORM is None:
        return x
    dtype: tl.constexpr = x.dtype
    y = (x.to(tl.float32) - mean) * scale
    if NORM == "layer":
        return (y * norm_weight.to(tl.float32) + norm_bias.to(tl.float32)).to(dtype)
    return (norm_weight.to(tl.float32) * y.to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def products(w, x):
    """``w [BLOCK_N, BLOCK_K] * x [BLOCK_K]`` in float32."""
    return w.to(tl.float32) * x.to(tl.float32)[None, :]


@triton.jit
def logistic(z):
    return 1.0 / (1.0 + tl.exp(tl.minimum(-z, 80.0)))


@triton.jit
def activate(y, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    y = y.to(dtype)
    if ACTIVATION == "gelu":  # 0.5 y (1 + tanh z) = y logistic(2 z)
        y = y.to(tl.float32)
        y = (y * logistic(1.5957691216057308 * (y + 0.044715 * y * y * y))).to(dtype)
    elif ACTIVATION == "silu":
        y = y.to(tl.float32)
        y = (y * logistic(y)).to(dtype)
    return y


@triton.jit
def finish(out_ptr, residual_ptr, y, factor, n, row, width, num_rows, ACTIVATION: tl.constexpr):
    """One row of the result from its product: activation, gate and residual, each rounded, and the store."""
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    wanted = n < tl.where(row < num_rows, width, 0)
    y = activate(y, ACTIVATION, dtype)
    if ACTIVATION == "silu":
        y = (y.to(tl.float32) * factor.to(dtype).to(tl.float32)).to(dtype)
    if residual_ptr is not None:
        rest = tl.load(residual_ptr + row * width + n, mask=wanted, other=0.0)
        y = (rest.to(tl.float32) + y.to(tl.float32)).to(dtype)
    tl.store(out_ptr + row * width + n, y, mask=wanted)


@triton.jit
def finish_tile(out_ptr, residual_ptr, w, u, xs, bias, factor_bias, n, width, num_rows, ROWS: tl.constexpr,
                ACTIVATION: tl.constexpr):  # fmt: skip
    """The rows ``n`` of W (and, gated, their factors ``u``) times every row of x, whole K."""
    for row in tl.static_range(ROWS):
        y = tl.sum(products(w, xs[row]), 1)
        factor = y
        if ACTIVATION == "silu":
            factor = tl.sum(products(u, xs[row]), 1)
        finish(out_ptr, residual_ptr, y + bias, factor + factor_bias, n, row, width, num_rows, ACTIVATION)


@triton.jit
def load_bias(bias_ptr, n, width):
    return tl.load(bias_ptr + n, mask=n < width, other=0.0).to(tl.float32)


@triton.jit
def load_biases(bias_ptr, n, width, GATED: tl.constexpr):
    """Biases of the rows ``n`` and, gated, of their factors; zeros where there are none."""
    bias = tl.zeros(n.shape, tl.float32)
    factor_bias = bias
    if bias_ptr is not None:
        bias = load_bias(bias_ptr, n, width)
        if GATED:
            factor_bias = load_bias(bias_ptr + width, n, width)
    return bias, factor_bias


@triton.jit
def load_norm(norm_weight_ptr, norm_bias_ptr, k, K: tl.constexpr, NORM: tl.constexpr):
    """The norm's weight and bias at ``k``; where it has none, something in their place."""
    weight, bias = k, k
    if NORM is not None:
        weight = load_row(norm_weight_ptr, k, True, K)
        if NORM == "layer":
            bias = load_row(norm_bias_ptr, k, True, K)
    return weight, bias


@triton.jit(do_not_specialize=["width", "num_rows", "num_tiles"])
def linear_kernel(
    x_ptr, weight_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, residual_ptr, out_ptr, width, num_rows, num_tiles, eps,
    K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NORM: tl.constexpr,
    ACTIVATION: tl.constexpr, PERSISTENT: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``NORM``: None, "layer" or "rms".  A persistent program takes every ``num_programs``-th tile."""
    if EARLY:
        gdc_launch_dependents()
    STEPS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    GATED: tl.constexpr = ACTIVATION == "silu"
    k = tl.arange(0, BLOCK_K)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    factor_ptr = weight_ptr + tl.cast(width, tl.int64) * K
    w = load_rows(weight_ptr, n, k, width, K)  # [BLOCK_N, BLOCK_K]
    u = w
    if GATED:
        u = load_rows(factor_ptr, n, k, width, K)
    bias, factor_bias = load_biases(bias_ptr, n, width, GATED)
    norm_weight, norm_bias = load_norm(norm_weight_ptr, norm_bias_ptr, k, K, NORM)
    if EARLY:
        gdc_wait()
    means, scales = (), ()
    for row in tl.static_range(ROWS):
        mean, scale = 0.0, 0.0
        if NORM is not None:
            mean, scale = mean_and_scale(x_ptr + row * K, k, row < num_rows, eps, K, BLOCK_K, STEPS, NORM)
        means, scales = means + (mean,), scales + (scale,)
    if STEPS == 1:
        xs = ()
        for row in tl.static_range(ROWS):
            x = load_row(x_ptr + row * K, k, row < num_rows, K)
            xs = xs + (normalized(x, means[row], scales[row], norm_weight, norm_bias, NORM),)
        if PERSISTENT:
            programs = tl.num_programs(0)
            for tile in range(tl.program_id(0), num_tiles, programs):
                n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
                next_n = n + programs * BLOCK_N
                next_w = load_rows(weight_ptr, next_n, k, width, K)
                next_u = next_w
                if GATED:
                    next_u = load_rows(factor_ptr, next_n, k, width, K)
                next_bias, next_factor_bias = load_biases(bias_ptr, next_n, width, GATED)
                finish_tile(out_ptr, residual_ptr, w, u, xs, bias, factor_bias, n, width, num_rows, ROWS, ACTIVATION)
                w, u, bias, factor_bias = next_w, next_u, next_bias, next_factor_bias
        else:
            finish_tile(out_ptr, residual_ptr, w, u, xs, bias, factor_bias, n, width, num_rows, ROWS, ACTIVATION)
    else:
        sums, factor_sums = (), ()
        for _ in tl.static_range(ROWS):
            sums = sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
            factor_sums = factor_sums + (tl.zeros([BLOCK_N, BLOCK_K], tl.float32),)
        for step in tl.static_range(STEPS):
            at = step * BLOCK_K + k
            next_w, next_u = w, u
            if step + 1 < STEPS:
                next_w = load_rows(weight_ptr, n, at + BLOCK_K, width, K)
                next_u = next_w
                if GATED:
                    next_u = load_rows(factor_ptr, n, at + BLOCK_K, width, K)
            old_sums, old_factor_sums = sums, factor_sums
            sums, factor_sums = (), ()
            for row in tl.static_range(ROWS):
                x = load_row(x_ptr + row * K, at, row < num_rows, K)
                x = normalized(x, means[row], scales[row], norm_weight, norm_bias, NORM)
                sums = sums + (old_sums[row] + products(w, x),)
                if GATED:
                    factor_sums = factor_sums + (old_factor_sums[row] + products(u, x),)
            if step + 1 < STEPS:
                norm_weight, norm_bias = load_norm(norm_weight_ptr, norm_bias_ptr, at + BLOCK_K, K, NORM)
            w, u = next_w, next_u
        for row in tl.static_range(ROWS):
            y = tl.sum(sums[row], 1)
            factor = y
            if GATED:
                factor = tl.sum(factor_sums[row], 1)
            finish(out_ptr, residual_ptr, y + bias, factor + factor_bias, n, row, width, num_rows, ACTIVATION)


@dataclass(frozen=True)
class Plan:
    """How a product is launched."""

    block_n: int
    block_k: int
    num_warps: int
    num_programs: int
    num_tiles: int


@cache
def plan(width: int, k: int, rows: int, gated: bool, itemsize: int, num_sms: int = NUM_SMS) -> Plan:
    """Tiles of about eight 16-byte loads a thread, fewer where there would be less than four programs a multiprocessor.

    >>> plan(2304, 768, 1, False, 2)
    Plan(block_n=4, block_k=1024, num_warps=4, num_programs=576, num_tiles=576)
    """
    block_k = triton.next_power_of_2(k) if k <= WHOLE_K else STEP_K
    block_k = max(block_k, 32)
    num_warps = min(4 if rows == 1 else 8, max(1, block_k // 256))
    loads = max(1, block_k * itemsize // (512 * num_warps)) * (2 if gated else 1)
    block_n = max(1, 8 // loads)
    if k > WHOLE_K:  # every row has sums of its own
        block_n = max(1, block_n // rows)
    while block_n > 1 and -(-width // block_n) < 4 * num_sms:
        block_n //= 2
    num_tiles = -(-width // block_n)
    num_programs = num_tiles
    if k <= WHOLE_K and num_tiles > 8 * num_sms:
        num_programs = num_sms * (4 if num_warps <= 4 else 1)  # as many as the registers hold at once
    return Plan(block_n, block_k, num_warps, num_programs, num_tiles)


def multiprocessors(device: torch.device) -> int:
    """Of ``device``; elsewhere than on CUDA an H100's."""
    return num_multiprocessors(device) if device.type == "cuda" else NUM_SMS


def overlaps(device: torch.device) -> bool:
    """Whether launches on ``device`` may begin before the one before them has ended."""
    return OVERLAP and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    norm: Norm | None = None,
    activation: str | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + activation(norm(x) @ weight.T + bias)`` in one launch.

    ============ ================================ =====================================================
    x            ``[M, K]``, M from 1 to 4        contiguous, as all of these, and of one dtype
    weight       ``[N, K]``                       ``[2 N, K]`` for ``silu``: gate rows, then the others
    bias         ``[N]`` or None                  ``[2 N]`` for ``silu``
    norm         of width K or None
    activation   None, ``"gelu"``, ``"silu"``
    residual     ``[M, N]`` or None               added last
    returns      ``[M, N]``
    ============ ================================ =====================================================

    Raises ``ValueError`` for other shapes, dtypes, strides or numbers of rows.
    """
    width = reference.check(x, weight, bias, norm, activation, residual)
    num_rows, k = x.shape
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows, not 1 to {MAX_ROWS}")
    rows = triton.next_power_of_2(num_rows)
    chosen = plan(width, k, rows, activation == "silu", weight.element_size(), multiprocessors(x.device))
    early = overlaps(x.device)
    out = x.new_empty(num_rows, width)
    linear_kernel[(chosen.num_programs,)](
        x, weight, bias, None if norm is None else norm.weight, None if norm is None else norm.bias, residual, out,
        width, num_rows, chosen.num_tiles, 0.0 if norm is None else norm.eps,
        K=k, ROWS=rows, BLOCK_N=chosen.block_n, BLOCK_K=chosen.block_k, NORM=norm_kind(norm), ACTIVATION=activation,
        PERSISTENT=chosen.num_programs < chosen.num_tiles, EARLY=early,
        enable_fp_fusion=True, num_warps=chosen.num_warps, num_stages=1,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def norm_kind(norm: Norm | None) -> str | None:
    """The kernels' ``NORM``."""
    return None if norm is None else "rms" if norm.bias is None else "layer"
