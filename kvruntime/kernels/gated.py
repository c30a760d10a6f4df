"""Triton: the gated activation of a decode step's feed-forward layer in one launch, rounded as models do it."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit
def silu_product_kernel(gate_ptr, up_ptr, out_ptr, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0)
    up = tl.load(up_ptr + at, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    activated = (wide / (1.0 + tl.exp(-wide))).to(gate.dtype)
    tl.store(out_ptr + at, (activated.to(tl.float32) * up.to(tl.float32)).to(gate.dtype), mask=inside)


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` of equal shapes and types, the activation rounded to their type before the product."""
    gate, up = gate.contiguous(), up.contiguous()
    out = gate.new_empty(gate.shape)
    grid = (triton.cdiv(gate.numel(), BLOCK),)
    silu_product_kernel[grid](gate, up, out, gate.numel(), BLOCK=BLOCK, num_warps=4, enable_fp_fusion=False)
    return out
