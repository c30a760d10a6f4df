"""One decode step of one layer's attention, timed: KIVI's through ``KiviLayer.attend``, the baseline's by PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvruntime.bench.harness.timing import Bench
from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.cache import KiviLayer
from kvsim.layout import LayerShape
from kvsim.methods import Full, Kivi

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

    def nbytes_read(self, method: Kivi | Full) -> int:
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


def filled_layer(method: Kivi, tokens: Tokens, room: int = 0) -> KiviLayer:
    """A layer that packed the shape's tokens itself; ``room``: tokens a row that it provides for besides."""
    shape = tokens.shape
    longest = max(shape.row_lengths)
    layer = KiviLayer(method, shape.layer, shape.batch_size, longest + room, tokens.device)
    step = max(1, min(CHUNK_TOKENS, CHUNK_ELEMENTS // (shape.batch_size * shape.num_kv_heads * shape.head_dim)))
    for done in range(0, longest, step):
        count = min(step, longest - done)
        counts = [min(max(length - done, 0), count) for length in shape.row_lengths]
        layer.append(*tokens.pair(count), None if min(counts) == count else counts)
    return layer


def filled_layers(bench: Bench, method: Kivi, tokens: Tokens, room: int = 0) -> list[KiviLayer]:
    """As many layers as exceed the L2 cache together."""
    first = filled_layer(method, tokens, room)
    return [first] + [filled_layer(method, tokens, room) for _ in range(bench.copies(first.nbytes) - 1)]


def measure_kivi(
    bench: Bench, shape: Shape, method: Kivi, *, splits: bool = False, portable: bool = False
) -> dict[str, Any]:
    """Seconds of ``KiviLayer.attend`` for one query a row, bytes it must read, and its error against float64.

    ``splits`` tries neighbours of the plan's number of splits too.  ``portable`` asks the plain Triton kernel.
    """
    dtype = getattr(torch, method.dtype)
    tokens = Tokens(bench, shape, dtype)
    layers = filled_layers(bench, method, tokens)
    query = tokens.draw(shape.num_q_heads, 1)
    row: dict[str, Any] = {"nbytes_read": shape.nbytes_read(method), "nbytes_held": layers[0].nbytes}
    row |= {"flops": shape.flops, "exact_tokens": layers[0].row_lengths[0] - layers[0].row_packed[0]}

    def calls(attend: Callable[[KiviLayer], Tensor]) -> list[Callable[[], Tensor]]:
        return [partial(attend, layer) for layer in layers]

    arrivals = torch.zeros(2 * query.shape[0] * query.shape[1], dtype=torch.int32, device=bench.device)

    def public(layer: KiviLayer) -> Tensor:
        return layer.attend(query, shape.scale, arrivals=arrivals)

    def plain(layer: KiviLayer) -> Tensor:
        from kvruntime.methods.kivi import attention

        return direct(attention, layer, query, shape.scale)

    way = plain if portable else public
    row["relative_error"] = relative_error(layers[0], query, way(layers[0]), shape.scale)
    timing = bench.timer(calls(way))
    row |= {"seconds": timing.spread, "bandwidth": row["nbytes_read"] / timing.seconds}
    row |= {"copies": timing.copies, "replays": timing.replays}
    fast = fast_kernel(layers[0], query)
    row["kernel"] = "reference" if bench.device.type == "cpu" else "portable" if portable or fast is None else "fast"
    if fast is None or portable:
        return row
    row["launch"] = {name.lower(): getattr(fast, name) for name in ("STAGES", "PROGRAMS_PER_SM") if hasattr(fast, name)}
    with planned(fast) as answers:
        public(layers[0])
    row["splits"] = answers[-1] if answers else None
    if splits and answers:

        def with_splits(number: int) -> list[Callable[[], Tensor]]:
            return calls(lambda layer: direct(fast, layer, query, shape.scale, num_splits=number, arrivals=arrivals))

        row["sweep"] = sweep(bench, row["splits"], with_splits)
    if shape.lengths:
        even = calls(lambda layer: direct(fast, layer, query, shape.scale, equal_shares=True))
        row["equal_shares"] = attempt(lambda: bench.timer(even).seconds)
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


def direct(kernels: Any, layer: KiviLayer, query: Tensor, scale: float, **options: Any) -> Tensor:
    """``attend`` of a kernel room on what a layer stores, as ``KiviLayer.attend`` calls it."""
    stores = [layer.tensors[name] for name in ("records", "exact_key", "exact_value")]
    method = layer.method
    return kernels.attend(
        query, *stores, *layer.tensors["lengths"], layer.record, method.sink_length, method.residual_length, scale,
        layer.tensors.get("key_params"), None, **options,
    )  # fmt: skip


def fast_kernel(layer: KiviLayer, query: Tensor) -> Any:
    """The tensor-core kernel's room where it takes this call, else None."""
    if not query.is_cuda:
        return None
    try:
        from kvruntime.methods.kivi import fast, fast_plan
    except (ImportError, AttributeError):  # a Triton whose Gluon language has moved on
        return None
    return fast if fast_plan.supports(layer.record, query) else None


@contextmanager
def planned(fast: Any) -> Iterator[list[int]]:
    """The answers of ``fast.plan_splits`` while it holds."""
    answers: list[int] = []
    real = fast.plan_splits

    def listening(*given: Any, **named: Any) -> int:
        answers.append(real(*given, **named))
        return answers[-1]

    fast.plan_splits = listening
    try:
        yield answers
    finally:
        fast.plan_splits = real


def relative_error(layer: KiviLayer, query: Tensor, out: Tensor, scale: float, row: int = 0, head: int = 0) -> float:
    """``|out - exact| / |exact|`` of one row and kv head: attention in float64 over the cache as it reads back."""
    method, tensors = layer.method, layer.tensors
    count = layer.row_packed[row] // layer.record.num_tokens
    params = tensors.get("key_params")
    frozen = None if params is None else (params[0, row, head], params[1, row, head])
    key, value = reference.unpack_records(tensors["records"][row, :count, head], layer.record, frozen)
    lengths, packed = (counts[row : row + 1] for counts in tensors["lengths"])
    slots = tensors["exact_key"].shape[2]
    held = reference.ring_positions(lengths, packed, method.sink_length, method.residual_length, slots)[0] >= 0
    key, value = (
        torch.cat([old.double(), tensors[name][row, head][held].double()])
        for old, name in ((key, "exact_key"), (value, "exact_value"))
    )
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
    """Seconds of the uncompressed engine's kernel (``kvruntime/methods/full/decode.py``) over the same cache."""
    from kvruntime.methods.full import decode

    positions = torch.full((shape.batch_size,), shape.num_tokens - 1, dtype=torch.int32, device=bench.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return decode.attend(query, key, value, positions, shape.scale, shape.num_tokens)

    return measure_plain(bench, shape, dtype, attend)


def measure_plain(
    bench: Bench, shape: Shape, dtype: str, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
) -> dict[str, Any]:
    """Seconds of ``attend(query, key, value)`` over an uncompressed cache, and the bytes it reads."""
    tokens = Tokens(bench, shape, getattr(torch, dtype))
    size = shape.nbytes_read(Full(dtype))
    stores = [tokens.pair(shape.num_tokens) for _ in range(bench.copies(size))]
    query = tokens.draw(shape.num_q_heads, 1)
    with torch.no_grad():
        timing = bench.timer([partial(attend, query, *pair) for pair in stores])
    row: dict[str, Any] = {"nbytes_read": size, "nbytes_held": size, "flops": shape.flops, "seconds": timing.spread}
    return row | {"bandwidth": size / timing.seconds, "copies": timing.copies, "replays": timing.replays}
