"""Triton: what stands between a decode step's products when they are too many rows to do it themselves::

    embed      hidden = table[token] + position_table[position]
    add_norm   hidden' = hidden + (sum_s partial_s + bias);  normalized = norm(hidden')

The parts are those of a product whose K was split (``product.py``): summing them here costs no launch of its own.
Parallel over rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.engine.linear import load_norm, norm_kind, normalized, overlaps
from kvruntime.engine.reference import Norm


@triton.jit
def embed_kernel(tokens_ptr, positions_ptr, table_ptr, position_table_ptr, out_ptr, K: tl.constexpr,
                 BLOCK_K: tl.constexpr, EARLY: tl.constexpr):  # fmt: skip
    if EARLY:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    token = tl.load(tokens_ptr + row).to(tl.int64)
    x = tl.load(table_ptr + token * K + k, mask=k < K, other=0.0)
    if position_table_ptr is not None:
        position = tl.load(positions_ptr + row).to(tl.int64)
        y = tl.load(position_table_ptr + position * K + k, mask=k < K, other=0.0)
        x = (x.to(tl.float32) + y.to(tl.float32)).to(x.dtype)
    tl.store(out_ptr + row * K + k, x, mask=k < K)


@triton.jit(do_not_specialize=["num_rows"])
def add_norm_kernel(
    hidden_ptr, partial_ptr, bias_ptr, norm_weight_ptr, norm_bias_ptr, sum_ptr, out_ptr, num_rows, eps,
    K: tl.constexpr, BLOCK_K: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """``PARTS`` 0: nothing is added, and no sum stored."""
    if EARLY:
        gdc_launch_dependents()
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    norm_weight, norm_bias = load_norm(norm_weight_ptr, norm_bias_ptr, k, K, NORM)
    bias = tl.zeros([BLOCK_K], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + k, mask=inside, other=0.0).to(tl.float32)
    if EARLY:
        gdc_wait()
    hidden = tl.load(hidden_ptr + row * K + k, mask=inside, other=0.0)
    if PARTS > 0:
        product = tl.zeros([BLOCK_K], tl.float32)
        for part in tl.static_range(PARTS):
            product += tl.load(partial_ptr + (part * num_rows + row) * K + k, mask=inside, other=0.0)
        product = (product + bias).to(hidden.dtype).to(tl.float32)
        hidden = (hidden.to(tl.float32) + product).to(hidden.dtype)
        tl.store(sum_ptr + row * K + k, hidden, mask=inside)
    x = hidden.to(tl.float32)
    mean = 0.0
    if NORM == "layer":
        mean = tl.sum(x, 0) / K
        x = tl.where(inside, x - mean, 0.0)
    scale = tl.rsqrt(tl.sum(x * x, 0) / K + eps)
    y = normalized(hidden, mean, scale, norm_weight, norm_bias, NORM)
    tl.store(out_ptr + row * K + k, y, mask=inside)


def embed(tokens: Tensor, positions: Tensor, table: Tensor, position_table: Tensor | None = None) -> Tensor:
    """One launch for the hidden states that a step begins with.

    ============== ============================================
    tokens         ``[M]`` int64, each below V
    positions      ``[M]`` int32, each below P
    table          ``[V, K]`` contiguous
    position_table ``[P, K]`` contiguous and of its dtype, or None
    returns        ``[M, K]``
    ============== ============================================
    """
    tokens, positions = tokens.contiguous(), positions.contiguous()
    num_rows, k = tokens.shape[0], table.shape[1]
    early = overlaps(table.device)
    block_k = min(1024, triton.next_power_of_2(k))
    out = table.new_empty(num_rows, k)
    embed_kernel[(num_rows, -(-k // block_k))](
        tokens, positions, table, position_table, out, K=k, BLOCK_K=block_k, EARLY=early,
        enable_fp_fusion=True, num_warps=4, **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out


def num_warps(k: int) -> int:
    """Eight elements a thread, as far as sixteen warps reach."""
    return min(16, max(1, triton.next_power_of_2(k) // 256))


def add_norm(hidden: Tensor, partial: Tensor | None, bias: Tensor | None, norm: Norm) -> tuple[Tensor, Tensor]:
    """The residual stream after a product, and its norm, in one launch.

    ============== ==============================================================
    hidden         ``[M, K]`` contiguous
    partial        ``[S, M, K]`` float32 contiguous, or None: nothing is added
    bias           ``[K]`` or None
    norm           of width K
    returns        the sum ``[M, K]`` (``hidden`` itself where nothing is added)
                   and the normalized sum ``[M, K]``, in ``hidden``'s dtype
    ============== ==============================================================
    """
    num_rows, k = hidden.shape
    if partial is not None and (partial.shape[1:] != hidden.shape or partial.dtype != torch.float32):
        raise ValueError(f"partial {tuple(partial.shape)} {partial.dtype} is not [S, {num_rows}, {k}] float32")
    early = overlaps(hidden.device)
    block_k = max(128, triton.next_power_of_2(k))
    total = hidden if partial is None else torch.empty_like(hidden)
    out = torch.empty_like(hidden)
    add_norm_kernel[(num_rows,)](
        hidden, partial, bias, norm.weight, norm.bias, total, out, num_rows, norm.eps,
        K=k, BLOCK_K=block_k, PARTS=0 if partial is None else partial.shape[0], NORM=norm_kind(norm), EARLY=early,
        enable_fp_fusion=True, num_warps=num_warps(k), **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return total, out
