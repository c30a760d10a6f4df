"""Gluon: the products of ``product.py`` on Hopper (sm_90), by its copy engine and its warp-group instructions.

A program computes 64 rows of W times every row of x over a share of K, from a ring of tiles in shared memory that the
copy engine fills: one thread asks, nobody computes addresses.  W is the first operand (64 rows an instruction), x the
second (8 to 128), so few rows of x cost few cycles and W is read once; the result is turned when it is stored.  A
program asks for a whole ring of W before it waits for the launch that makes ``x``.

Parallel over blocks of rows of W and shares of K.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from kvruntime.engine.linear import NUM_SMS, activate, multiprocessors, overlaps

load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # Triton 3.9, before it

BLOCK_N = 64
"""Rows of W a program, of each half where it is gated: what one warp group multiplies at once."""
BLOCK_K = 128
RING_BYTES = 200 << 10
"""Of shared memory for the tiles under way: one program a multiprocessor."""
NUM_WARPS = 4
SMALL = 5 << 19
"""Numbers of W up to which 33 to 64 rows of x are shared out to programs of 32: each reads all of its x, and few do."""


@gluon.constexpr_function
def product_layout(block_m):
    return gl.NVMMADistributedLayout([3, 0], [NUM_WARPS, 1], [16, block_m, 16])


@gluon.constexpr_function
def store_layout(width):
    """``[BLOCK_N, BLOCK_M]`` with ``width`` neighbours along N a thread."""
    return gl.BlockedLayout([width, 1], [BLOCK_N // width, width // 2], [1, NUM_WARPS], [0, 1])


@gluon.jit(do_not_specialize=["num_rows"])
def stream_kernel(
    x_desc, weight_desc, bias_ptr, out_ptr, num_rows, width,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_K: gl.constexpr, STEPS: gl.constexpr, STAGES: gl.constexpr,
    ACTIVATION: gl.constexpr, PARTIAL: gl.constexpr, EARLY: gl.constexpr,
):  # fmt: skip
    """16-bit numbers.  ``STEPS``: tiles of K a program.  ``PARTIAL``: store float32, share by share."""
    if EARLY:
        gdc_launch_dependents()
    GATED: gl.constexpr = ACTIVATION == "silu"
    dtype: gl.constexpr = weight_desc.dtype
    BYTES: gl.constexpr = ((2 if GATED else 1) * BLOCK_N + BLOCK_M) * BLOCK_K * 2
    first = gl.program_id(0) * BLOCK_N
    share = gl.program_id(1)
    row = gl.program_id(2) * BLOCK_M
    begin = share * (STEPS * BLOCK_K)
    tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    factor_tiles = tiles
    if GATED:
        factor_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], weight_desc.layout)
    x_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], x_desc.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(bars.index(stage), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.expect(bars.index(stage), BYTES)
        load(weight_desc, [first, begin + stage * BLOCK_K], bars.index(stage), tiles.index(stage))
        if GATED:
            load(weight_desc, [width + first, begin + stage * BLOCK_K], bars.index(stage), factor_tiles.index(stage))
    if EARLY:
        gdc_wait()
    for stage in gl.static_range(STAGES):
        load(x_desc, [row, begin + stage * BLOCK_K], bars.index(stage), x_tiles.index(stage))
    acc = gl.zeros([BLOCK_N, BLOCK_M], gl.float32, product_layout(BLOCK_M))
    factor = acc
    for step in range(STEPS):
        at = step % STAGES
        mbarrier.wait(bars.index(at), (step // STAGES) & 1)
        x = x_tiles.index(at).permute((1, 0))
        acc = hopper.warpgroup_mma(tiles.index(at), x, acc, is_async=True)
        if GATED:
            factor = hopper.warpgroup_mma(factor_tiles.index(at), x, factor, is_async=True)
            acc, factor = hopper.warpgroup_mma_wait(2, [acc, factor])
        else:
            acc = hopper.warpgroup_mma_wait(1, [acc])
        next_step = step - 1 + STAGES  # into the tile of the step before, whose product is done
        free = next_step % STAGES
        wanted = (step > 0) & (next_step < STEPS)
        k = begin + next_step * BLOCK_K
        mbarrier.expect(bars.index(free), BYTES, wanted)
        load(weight_desc, [first, k], bars.index(free), tiles.index(free), wanted)
        if GATED:
            load(weight_desc, [width + first, k], bars.index(free), factor_tiles.index(free), wanted)
        load(x_desc, [row, k], bars.index(free), x_tiles.index(free), wanted)
    if GATED:
        acc, factor = hopper.warpgroup_mma_wait(0, [acc, factor])
    else:
        acc = hopper.warpgroup_mma_wait(0, [acc])
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(bars.index(stage))
    out_dtype: gl.constexpr = out_ptr.dtype.element_ty
    LAYOUT: gl.constexpr = store_layout(4 if PARTIAL else 8)
    n = first + gl.arange(0, BLOCK_N, gl.SliceLayout(1, LAYOUT))
    m = row + gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))
    y = gl.convert_layout(acc, LAYOUT)
    if not PARTIAL:
        if bias_ptr is not None:
            y += gl.load(bias_ptr + n, n < width, 0.0).to(gl.float32)[:, None]
        y = activate(y, ACTIVATION, out_dtype)
        if GATED:
            other = gl.convert_layout(factor, LAYOUT)
            if bias_ptr is not None:
                other += gl.load(bias_ptr + width + n, n < width, 0.0).to(gl.float32)[:, None]
            y = (y.to(gl.float32) * other.to(out_dtype).to(gl.float32)).to(out_dtype)
    out_ptr += share.to(gl.int64) * num_rows * width
    place = m.to(gl.int64)[None, :] * width + n[:, None]
    gl.store(out_ptr + place, y, (m < num_rows)[None, :] & (n < width)[:, None])


@dataclass(frozen=True)
class Plan:
    """How a product is launched: rows of x, tiles of K a program, tiles under way, shares of K."""

    block_m: int
    steps: int
    stages: int
    splits: int


@cache
def plan(num_rows: int, width: int, k: int, gated: bool, partial: bool, num_sms: int = NUM_SMS) -> Plan:
    """Where K may be split, as many programs as run at once: one a multiprocessor.

    >>> plan(8, 4096, 4096, False, True)
    Plan(block_m=8, steps=16, stages=11, splits=2)
    """
    block_m = max(8, 1 << (num_rows - 1).bit_length())
    if block_m == 64 and width * k <= SMALL:
        block_m = 32
    steps = -(-k // BLOCK_K)
    if partial:
        programs = -(-width // BLOCK_N) * -(-num_rows // block_m)
        steps = -(-steps // max(1, min(steps, num_sms // programs)))
    tile = 2 * BLOCK_K * (BLOCK_N * (2 if gated else 1) + block_m)
    return Plan(block_m, steps, min(steps, RING_BYTES // tile), -(-k // (steps * BLOCK_K)))


def supports(x: Tensor, weight: Tensor) -> bool:
    """Whether the kernel takes them: 16-bit numbers on Hopper, at addresses that the copy engine reaches."""
    return (
        x.device.type == "cuda"
        and torch.cuda.get_device_capability(x.device)[0] == 9
        and x.element_size() == 2
        and x.shape[1] % 8 == 0
        and x.data_ptr() % 16 == 0
        and weight.data_ptr() % 16 == 0
    )


def tiles_of(tensor: Tensor, num_rows: int) -> TensorDescriptor:
    """``[num_rows, BLOCK_K]`` tiles of a matrix, for the copy engine."""
    block = [num_rows, BLOCK_K]
    dtype = gl.float16 if tensor.dtype == torch.float16 else gl.bfloat16
    return TensorDescriptor.from_tensor(tensor, block, gl.NVMMASharedLayout.get_default_for(block, dtype))


def launch(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, partial: bool) -> Tensor:
    """``product.product`` or ``product.parts`` of checked arguments that :func:`supports` takes."""
    num_rows, k = x.shape
    width = weight.shape[0] // (2 if activation == "silu" else 1)
    chosen = plan(num_rows, width, k, activation == "silu", partial, multiprocessors(x.device))
    early = overlaps(x.device)
    shape = (chosen.splits, num_rows, width) if partial else (num_rows, width)
    out = x.new_empty(shape, dtype=torch.float32 if partial else x.dtype)
    stream_kernel[(-(-width // BLOCK_N), chosen.splits, -(-num_rows // chosen.block_m))](
        tiles_of(x, chosen.block_m), tiles_of(weight, BLOCK_N), bias, out, num_rows, width,
        BLOCK_M=chosen.block_m, BLOCK_N=BLOCK_N, BLOCK_K=BLOCK_K, STEPS=chosen.steps, STAGES=chosen.stages,
        ACTIVATION=activation, PARTIAL=partial, EARLY=early, enable_fp_fusion=True, num_warps=NUM_WARPS,
        **({"launch_pdl": True} if early else {}),
    )  # fmt: skip
    return out
