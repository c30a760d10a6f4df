"""One decode step of one layer's attention, timed: a method's through its own layer, the baseline's by PyTorch.

What only one method has to measure is asked of its room (``kvruntime.methods.LAYERS``, ``measures``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvruntime.bench.harness.timing import Bench
from kvruntime.methods import Layer, make_layer, room_of
from kvsim.layout import LayerShape, Method
from kvsim.methods import Full

CHUNK_TOKENS = 8192
CHUNK_ELEMENTS = 1 << 27
BACKENDS = {"fp16-cudnn": "CUDNN_ATTENTION", "fp16-flash": "FLASH_ATTENTION"}
"""The baselines' names and PyTorch's: of cuDNN and flash attention the faster is what a method is compared with."""


@dataclass(frozen=True)
class Shape:
    """``model``'s heads over ``batch_size`` rows of ``num_tokens``; ``lengths``: rows of their own lengths instead."""

    model: str
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    batch_size: int
    num_tokens: int
    lengths: tuple[int, ...] | None = None

    @property
    def layer(self) -> LayerShape:
        return LayerShape(self.num_kv_heads, self.head_dim, self.head_dim)

    @property
    def row_lengths(self) -> list[int]:
        return list(self.lengths or [self.num_tokens] * self.batch_size)

    @property
    def scale(self) -> float:
        return 1 / math.sqrt(self.head_dim)

    @property
    def flops(self) -> int:
        """Of the two matrix products."""
        return 4 * self.num_q_heads * self.head_dim * sum(self.row_lengths)

    def nbytes_read(self, method: Method) -> int:
        """Bytes of the cache that one step must read."""
        rows = self.row_lengths
        if len(set(rows)) == 1:
            return sum(method.read_parts(self.layer, len(rows), rows[0]).values())
        return sum(sum(method.read_parts(self.layer, 1, length).values()) for length in rows)


class Tokens:
    """Random keys and values, never zero: keys have a few large channels and offsets, as models' keys do."""

    def __init__(self, bench: Bench, shape: Shape, dtype: torch.dtype) -> None:
        self.shape, self.dtype, self.device = shape, dtype, bench.device
        self.generator = bench.generator()
        channels = (1, shape.num_kv_heads, 1, shape.head_dim)
        large, moved = (torch.rand(channels, device=self.device, generator=self.generator) for _ in range(2))
        offset = torch.randn(channels, device=self.device, generator=self.generator)
        self.spread = torch.where(large > 0.95, 5.0, 1.0).to(dtype)
        self.offset = torch.where(moved > 0.9, 2 * offset, 0.0).to(dtype)

    def draw(self, heads: int, count: int) -> Tensor:
        """``[batch_size, heads, count, head_dim]``."""
        size = (self.shape.batch_size, heads, count, self.shape.head_dim)
        return torch.randn(size, device=self.device, dtype=self.dtype, generator=self.generator)

    def pair(self, count: int) -> tuple[Tensor, Tensor]:
        """Keys and values ``[batch_size, num_kv_heads, count, head_dim]``."""
        heads = self.shape.num_kv_heads
        return self.draw(heads, count).mul_(self.spread).add_(self.offset), self.draw(heads, count)


def dtype_of(method: Method) -> torch.dtype:
    """The type of the method's exact tokens; float16 where it does not say."""
    dtype: torch.dtype = getattr(torch, getattr(method, "dtype", "float16"))
    return dtype


def filled_layer(method: Method, tokens: Tokens, room: int = 0) -> Any:
    """A layer that stored the shape's tokens itself; ``room``: tokens a row that it provides for besides."""
    shape = tokens.shape
    longest = max(shape.row_lengths)
    layer = make_layer(method, shape.layer, shape.batch_size, longest + room, tokens.device)
    step = max(1, min(CHUNK_TOKENS, CHUNK_ELEMENTS // (shape.batch_size * shape.num_kv_heads * shape.head_dim)))
    for done in range(0, longest, step):
        count = min(step, longest - done)
        counts = [min(max(length - done, 0), count) for length in shape.row_lengths]
        layer.append(*tokens.pair(count), None if min(counts) == count else counts)
    return layer


def filled_layers(bench: Bench, method: Method, tokens: Tokens, room: int = 0) -> list[Any]:
    """As many layers as exceed the L2 cache together."""
    first = filled_layer(method, tokens, room)
    return [first] + [filled_layer(method, tokens, room) for _ in range(bench.copies(first.nbytes) - 1)]


def measure_attend(
    bench: Bench, shape: Shape, method: Method, *, splits: bool = False, portable: bool = False
) -> dict[str, Any]:
    """Seconds of the layer's ``attend`` for one query a row, bytes it must read, and its error against float64.

    ``splits`` tries neighbours of the plan's number of splits too.  ``portable`` asks the plain Triton kernel.  Both
    only of a method whose room measures them.
    """
    own = room_of(method).measures
    tokens = Tokens(bench, shape, dtype_of(method))
    layers = filled_layers(bench, method, tokens)
    query = tokens.draw(shape.num_q_heads, 1)
    row: dict[str, Any] = {"nbytes_read": shape.nbytes_read(method), "nbytes_held": layers[0].nbytes}
    row["flops"] = shape.flops

    def calls(attend: Callable[..., Tensor], *more: Any) -> list[Callable[[], Tensor]]:
        return [partial(attend, layer, query, shape.scale, *more) for layer in layers]

    scratch = own.scratch(layers[0], shape.num_q_heads) if own else None
    told = calls(own.portable if portable else own.attend, scratch) if own else calls(type(layers[0]).attend)
    row["relative_error"] = relative_error(layers[0], query, told[0](), shape.scale)
    timing = bench.timer(told)
    row |= {"seconds": timing.spread, "bandwidth": row["nbytes_read"] / timing.seconds}
    row |= {"copies": timing.copies, "replays": timing.replays}
    if own is None:
        return row | {"kernel": layers[0].kernel}
    row |= own.about(layers[0], query, portable)
    if splits and row.get("splits"):
        row["sweep"] = sweep(bench, row["splits"], lambda number: calls(own.with_splits, scratch, number))
    if shape.lengths and "splits" in row:
        row["equal_shares"] = attempt(lambda: bench.timer(calls(own.equal_shares)).seconds)
    return row


FACTORS = (0.5, 0.75, 1.25, 1.5, 2.0)


def sweep(bench: Bench, plan: int, calls: Callable[[int], Sequence[Callable[[], Any]]]) -> dict[str, Any]:
    """Seconds by number of splits, near the plan's."""
    tried = sorted({max(1, round(plan * factor)) for factor in FACTORS} - {plan})

    def one(number: int) -> float:
        return bench.timer(calls(number)).seconds

    return {str(number): attempt(partial(one, number)) for number in tried}


def attempt(measure: Callable[[], float]) -> float | str:
    """A figure, or why there is none, where the row has others to keep."""
    try:
        return measure()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def relative_error(layer: Layer, query: Tensor, out: Tensor, scale: float, row: int = 0, head: int = 0) -> float:
    """``|out - exact| / |exact|`` of one row and kv head: attention in float64 over the cache as it reads back."""
    key, value = (stored[head].double() for stored in layer.tokens(row))
    q_per_kv = query.shape[1] // layer.shape.num_kv_heads
    mine = slice(head * q_per_kv, (head + 1) * q_per_kv)
    exact = ((query[row, mine, 0].double() @ key.T) * scale).softmax(-1) @ value
    return float((out[row, mine, 0].double() - exact).norm() / exact.norm())


def measure_sdpa(bench: Bench, shape: Shape, backend: str, dtype: str) -> dict[str, Any]:
    """Seconds of ``scaled_dot_product_attention`` with one backend over an uncompressed cache of the same tokens."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    grouped = shape.num_q_heads != shape.num_kv_heads

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return scaled_dot_product_attention(query, key, value, scale=shape.scale, enable_gqa=grouped)

    with sdpa_kernel(getattr(SDPBackend, backend)):
        return measure_plain(bench, shape, dtype, attend)


def measure_full(bench: Bench, shape: Shape, dtype: str) -> dict[str, Any]:
    """Seconds of the uncompressed engine's kernel over the same cache; of ragged rows over even ones."""
    method, shape = Full(dtype), replace(shape, lengths=None)
    own = room_of(method).measures
    tokens = Tokens(bench, shape, dtype_of(method))
    layers = filled_layers(bench, method, tokens)
    query = tokens.draw(shape.num_q_heads, 1)
    scratch = own.scratch(layers[0], shape.num_q_heads)
    return time_plain(bench, shape, dtype, [partial(own.attend, each, query, shape.scale, scratch) for each in layers])


def measure_plain(
    bench: Bench, shape: Shape, dtype: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Seconds of ``attend(query, key, value)`` over an uncompressed cache, and the bytes it reads."""
    tokens = Tokens(bench, shape, getattr(torch, dtype))
    size = shape.nbytes_read(Full(dtype))
    stores = [tokens.pair(shape.num_tokens) for _ in range(bench.copies(size))]
    query = tokens.draw(shape.num_q_heads, 1)
    return time_plain(bench, shape, dtype, [partial(attend, query, *pair) for pair in stores])


def time_plain(bench: Bench, shape: Shape, dtype: str, calls: Sequence[Callable[[], Tensor]]) -> dict[str, Any]:
    """Seconds of one of ``calls``, each over a copy of an uncompressed cache, and the bytes it reads."""
    size = shape.nbytes_read(Full(dtype))
    with torch.no_grad():
        timing = bench.timer(calls)
    row: dict[str, Any] = {"nbytes_read": size, "nbytes_held": size, "flops": shape.flops, "seconds": timing.spread}
    return row | {"bandwidth": size / timing.seconds, "copies": timing.copies, "replays": timing.replays}
