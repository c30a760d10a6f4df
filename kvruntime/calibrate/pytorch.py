"""What PyTorch's own kernels reach on a card: the part of a profile for engines that run these.

    read, copy   one reduction and one copy over a buffer far larger than L2
    weights      y[1, N] = x[1, N] W[N, N]^T over matrices that together exceed L2: the weight stream of a decode step
    products     A[N, N] B[N, N]
    layer        what a decoder layer's kernels take when its matrices weigh nothing
    attention    one query a sequence over keys and values [batch, kv heads, tokens, 128], rotated past L2

On CUDA every figure is timed inside a CUDA graph, so that the host does not count.  Medians over repeats.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from math import ceil, exp, log
from statistics import median, quantiles
from typing import Any

import torch
import torch.nn.functional as F

from kvruntime.bench.harness.timing import timed_passes
from kvsim.latency.attention_curve import Curve, Kernel
from kvsim.latency.constants import constants

Q_HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
MIN_REPEATS, MAX_REPEATS = 3, 50
CUDA_REPEATS, SETTLED = 2000, 1.0
CUDA_SHAPES = ((1, 512), (1, 8192), (1, 65536), (16, 2048), (64, 4096), (256, 512))
CPU_SHAPES = ((1, 128), (1, 2048), (4, 512), (4, 2048))
NUM_LAYERS = 8


@dataclass(frozen=True)
class Scale:
    """Sizes of what is measured, by device."""

    dtype: torch.dtype
    buffer_nbytes: int
    matrix: int
    product: int
    shapes: tuple[tuple[int, int], ...]


def scale_of(device: torch.device) -> Scale:
    """Sizes that exceed the caches, and fit into an eighth of the free memory."""
    if device.type != "cuda":
        return Scale(torch.float32, 128 << 20, 2048, 768, CPU_SHAPES)
    free = torch.cuda.mem_get_info(device)[0]
    if free < 2 << 30:
        raise ValueError(f"{free >> 20} MiB of {device} are free: calibrate needs 2048 MiB")
    nbytes = min(1 << 30, free // 8)
    shapes = tuple(shape for shape in CUDA_SHAPES if kv_nbytes(*shape, 2) <= free // 4)
    return Scale(torch.float16, nbytes, 8192, 8192, shapes)


def kv_nbytes(batch_size: int, num_tokens: int, itemsize: int) -> int:
    """Bytes of the keys and values of one measured shape."""
    return 2 * batch_size * num_tokens * KV_HEADS * HEAD_DIM * itemsize


class Clock:
    """Times a function by the median of its repeats, within a share of the time."""

    def __init__(self, device: torch.device, share: float) -> None:
        self.device, self.share = device, share

    def __call__(self, function: Callable[[], Any], inner: int = 1) -> list[float]:
        """Seconds of ``function`` divided by ``inner``, one number a repeat."""
        function()
        return [
            seconds / inner for seconds in (self._on_cuda if self.device.type == "cuda" else self._on_host)(function)
        ]

    def _on_host(self, function: Callable[[], Any]) -> list[float]:
        taken: list[float] = []
        end = time.perf_counter() + self.share
        while len(taken) < MIN_REPEATS or (len(taken) < MAX_REPEATS and time.perf_counter() < end):
            start = time.perf_counter()
            function()
            taken.append(time.perf_counter() - start)
        return taken

    def _on_cuda(self, function: Callable[[], Any]) -> list[float]:
        """Replays of a graph back to back, so that no launch from the host lies in a repeat; long enough (up to a
        second) that the clocks settle."""
        run = self._graph(function)
        one = min(timed_passes(run, MIN_REPEATS, warm=1))
        count = int(min(self.share, SETTLED) / max(one, 1e-7))
        return timed_passes(run, max(MIN_REPEATS, min(CUDA_REPEATS, count)), warm=2)

    def _graph(self, function: Callable[[], Any]) -> Callable[[], Any]:
        """``function`` captured once; a replay costs the host one launch."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        torch.cuda.synchronize(self.device)
        return graph.replay


def figure(taken: Sequence[float], amount: float | None = None) -> dict[str, Any]:
    """The median with its 10th and 90th percentile: seconds, or ``amount`` a second."""
    cuts = quantiles(taken, n=10, method="inclusive")
    low, value, high = cuts[0], median(taken), cuts[-1]
    if amount is not None:
        low, value, high = amount / high, amount / value, amount / low
    return {"value": value, "low": low, "high": high, "repeats": len(taken)}


@torch.inference_mode()
def read_bandwidth(clock: Clock, device: torch.device, scale: Scale) -> dict[str, Any]:
    """Bytes a second of a sum over one buffer."""
    buffer = torch.rand(scale.buffer_nbytes // 4, device=device)
    return figure(clock(lambda: buffer.sum()), buffer.nbytes)


@torch.inference_mode()
def copy_bandwidth(clock: Clock, device: torch.device, scale: Scale) -> dict[str, Any]:
    """Bytes a second of a copy, both ways counted."""
    source = torch.rand(scale.buffer_nbytes // 8, device=device)
    target = torch.empty_like(source)
    return figure(clock(lambda: target.copy_(source)), 2 * source.nbytes)


@torch.inference_mode()
def weight_bandwidth(clock: Clock, device: torch.device, scale: Scale) -> dict[str, Any]:
    """Bytes a second of matrices times one vector."""
    size = scale.matrix
    each = size * size * scale.dtype.itemsize
    matrices = [
        torch.randn(size, size, device=device, dtype=scale.dtype) / size
        for _ in range(max(2, scale.buffer_nbytes // each))
    ]
    vector = torch.randn(1, size, device=device, dtype=scale.dtype)

    def stream() -> None:
        for matrix in matrices:
            F.linear(vector, matrix)

    return figure(clock(stream), each * len(matrices))


@torch.inference_mode()
def flops(clock: Clock, device: torch.device, scale: Scale) -> dict[str, Any]:
    """Operations a second of one product of square matrices."""
    size = scale.product
    left, right = (torch.randn(size, size, device=device, dtype=scale.dtype) / size for _ in range(2))
    return figure(clock(lambda: left @ right), 2 * size**3)


@torch.inference_mode()
def layer_seconds(clock: Clock, device: torch.device, scale: Scale) -> dict[str, Any]:
    """Seconds of a decoder layer's kernels but attention, on matrices that weigh nothing."""
    size = 64
    square = torch.randn(size, size, device=device, dtype=scale.dtype) / size
    wide = torch.randn(4 * size, size, device=device, dtype=scale.dtype) / size
    narrow = torch.randn(size, 4 * size, device=device, dtype=scale.dtype) / size
    gain = torch.ones(size, device=device, dtype=scale.dtype)
    token = torch.randn(1, size, device=device, dtype=scale.dtype)

    def layers() -> torch.Tensor:
        hidden = token
        for _ in range(NUM_LAYERS):
            normed = F.rms_norm(hidden, (size,), gain)
            query, key, value = F.linear(normed, square), F.linear(normed, square), F.linear(normed, square)
            turned = query * gain + torch.cat((-query[:, size // 2 :], query[:, : size // 2]), -1) * gain
            hidden = hidden + F.linear(turned + key + value, square)
            normed = F.rms_norm(hidden, (size,), gain)
            hidden = hidden + F.linear(F.silu(F.linear(normed, wide)) * F.linear(normed, wide), narrow)
        return hidden

    return figure(clock(layers, NUM_LAYERS))


def figures(clock: Clock, device: torch.device, scale: Scale, say: Callable[[str], None]) -> dict[str, Any]:
    """Every figure of :data:`FIGURES` and ``attention``, the kernel that fits its rows."""
    found: dict[str, Any] = {}
    for name, measure in FIGURES.items():
        found[name] = measure(clock, device, scale)
        say(f"{name}: {found[name]['value']:.4g}")
    rows = [attention(clock, device, scale, *shape) for shape in scale.shapes]
    kernel = fit_kernel(rows, found["read_bandwidth"]["value"], device)
    say(f"attention: {kernel['bandwidth']:.4g} B/s, {kernel['fixed'] * 1e6:.1f} us a launch")
    return {**found, "attention": {**kernel, "rows": rows}}


FIGURES: dict[str, Callable[[Clock, torch.device, Scale], dict[str, Any]]] = {
    "read_bandwidth": read_bandwidth,
    "copy_bandwidth": copy_bandwidth,
    "weight_bandwidth": weight_bandwidth,
    "flops": flops,
    "layer_seconds": layer_seconds,
}


@torch.inference_mode()
def attention(clock: Clock, device: torch.device, scale: Scale, batch_size: int, num_tokens: int) -> dict[str, Any]:
    """Seconds of one layer's decode attention at one shape, its cache rotated past L2."""
    nbytes = kv_nbytes(batch_size, num_tokens, scale.dtype.itemsize)
    copies = max(1, ceil(scale.buffer_nbytes / 4 / nbytes))
    copies = min(copies, 64)
    shape = (batch_size, KV_HEADS, num_tokens, HEAD_DIM)
    caches = [tuple(torch.randn(shape, device=device, dtype=scale.dtype) for _ in range(2)) for _ in range(copies)]
    query = torch.randn(batch_size, Q_HEADS, 1, HEAD_DIM, device=device, dtype=scale.dtype)

    def attend() -> None:
        for key, value in caches:
            F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    found = figure(clock(attend, copies))
    return {"batch_size": batch_size, "num_tokens": num_tokens, "nbytes": nbytes, **found}


def fit_kernel(rows: Sequence[dict[str, Any]], read: float, device: torch.device) -> dict[str, float]:
    """``fixed`` and ``item`` seconds and the stream's ``bandwidth`` that fit the measured shapes best.

    Three numbers to a handful of rows, by relative error: a grid in logarithms, refined around its best point.
    ``low`` and ``high`` are the smallest and largest measured / fitted.
    """
    curve: Curve = constants().curve
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    quickest = min(row["value"] for row in rows)

    def ratios(point: Sequence[float]) -> list[float]:
        kernel = Kernel(exp(point[0]), exp(point[1]), 1.0, "", merges=False)
        return [
            row["value"]
            / curve.seconds(
                kernel, row["batch_size"] * KV_HEADS, row["num_tokens"], row["nbytes"] / exp(point[2]), num_sms
            )
            for row in rows
        ]

    best = [log(quickest / 2), log(quickest / 4), log(read)]
    reach = [3.0, 4.0, 2.0]
    for _ in range(12):
        axes = [[at + step * far for step in (-1, -0.5, 0, 0.5, 1)] for at, far in zip(best, reach, strict=True)]
        grid = [list(point) for point in product(*axes)]
        best = min(grid, key=lambda point: sum(log(ratio) ** 2 for ratio in ratios(point)))
        reach = [far * 0.6 for far in reach]
    spread = ratios(best)
    names = ("fixed", "item", "bandwidth")
    found = {name: exp(at) for name, at in zip(names, best, strict=True)}
    return {**found, "low": min(spread), "high": max(spread)}
