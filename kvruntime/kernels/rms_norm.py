"""Triton: root mean square normalization of a decode step's hidden states in one launch, rounded as models do it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, FROM_ONE: tl.constexpr
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    inside = k < K
    x = tl.load(x_ptr + row * K + k, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + k, mask=inside, other=0.0)
    wide = x.to(tl.float32)
    y = wide * tl.rsqrt(tl.sum(wide * wide, 0) / K + eps)
    if FROM_ONE:
        y = (y * (1.0 + weight.to(tl.float32))).to(x.dtype)
    else:
        y = (weight.to(tl.float32) * y.to(x.dtype).to(tl.float32)).to(x.dtype)
    tl.store(out_ptr + row * K + k, y, mask=inside)


def num_warps(block: int) -> int:
    return min(8, max(1, block // 512))


def rms_norm(x: Tensor, weight: Tensor, eps: float, from_one: bool = False) -> Tensor:
    """``x [..., K]`` over the root mean square of its last axis, times ``weight [K]`` of the same type.

    The mean and the quotient are float32.  The quotient is rounded to the type of ``x`` before ``weight`` multiplies
    it, as Llama does it; with ``from_one`` it is multiplied by ``1 + weight`` in float32, as Gemma does it.
    """
    x = x.contiguous()
    out = x.new_empty(x.shape)
    width = x.shape[-1]
    block = triton.next_power_of_2(width)
    rms_norm_kernel[(x.numel() // width,)](
        x, weight, out, eps, K=width, BLOCK_K=block, FROM_ONE=from_one, num_warps=num_warps(block),
        enable_fp_fusion=False,
    )  # fmt: skip
    return out
