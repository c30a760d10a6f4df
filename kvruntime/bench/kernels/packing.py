"""Quantizing and storing, timed: a long prompt at once, one token, and the step that packs a record."""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvruntime.bench.harness.timing import Bench, Call
from kvruntime.bench.kernels.attention import Shape, Tokens, attempt, filled_layers
from kvruntime.methods.kivi import reference
from kvruntime.methods.kivi.cache import KiviLayer
from kvsim.methods import Full, Kivi


def measure_pack(bench: Bench, shape: Shape, method: Kivi, *, compiled: bool = True) -> dict[str, Any]:
    """Seconds to store a whole prompt in an empty layer; ``nbytes``: the prompt read and the cache written.

    ``eager_seconds``: the PyTorch reference on the same tokens; ``compiled_seconds``: :func:`lean_pack` under
    ``torch.compile``, which writes as many words in an order that asks for no shuffling.  A text instead of a figure
    says why there is none.
    """
    tokens = Tokens(bench, shape, getattr(torch, method.dtype))
    key, value = tokens.pair(shape.num_tokens)
    layer = KiviLayer(method, shape.layer, shape.batch_size, shape.num_tokens, bench.device)

    def store() -> None:
        layer.reset()
        layer.append(key, value)

    timing = bench.timer([store])
    size = shape.nbytes_read(Full(method.dtype)) + shape.nbytes_read(method)
    row: dict[str, Any] = {"seconds": timing.spread, "nbytes": size, "bandwidth": size / timing.seconds}
    old = [x[:, :, : layer.row_packed[0]] for x in (key, value)]
    eager = partial(reference.pack_records, old[0], old[1], layer.record)
    row["eager_seconds"] = attempt(lambda: bench.eager([eager]).seconds)
    if compiled:
        pack = torch.compile(lean_pack, dynamic=False)
        group, nbits = int(method.k_group), method.k_bits
        row["compiled_seconds"] = attempt(lambda: bench.eager([lambda: pack(*old, nbits, group)]).seconds)
    return row


def lean_pack(key: Tensor, value: Tensor, nbits: int, group: int) -> tuple[Tensor, ...]:
    """KIVI's arithmetic as few lines as it takes, for a compiler: words in natural order, nothing guarded.

    ``key``, ``value`` ``[batch_size, num_kv_heads, tokens, dim]``, whole groups; words hold neighbouring channels.
    """

    def quantized(x: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
        zero, high = x.amin(dim, keepdim=True), x.amax(dim, keepdim=True)
        scale = ((high.float() - zero.float()) / (2**nbits - 1)).half()
        codes = ((x.float() - zero.float()) / scale.float()).round().clamp(0, 2**nbits - 1).int()
        return codes, scale, zero

    def words(codes: Tensor) -> Tensor:
        shifts = torch.arange(0, 32, nbits, dtype=torch.int32, device=codes.device)
        return (codes.unflatten(-1, (-1, 32 // nbits)) << shifts).sum(-1, dtype=torch.int32)

    key_codes, key_scale, key_zero = quantized(key.unflatten(2, (-1, group)), 3)
    value_codes, value_scale, value_zero = quantized(value.unflatten(3, (-1, min(group, value.shape[3]))), 4)
    return words(key_codes.flatten(2, 3)), words(value_codes.flatten(3)), key_scale, key_zero, value_scale, value_zero


def measure_append(bench: Bench, shape: Shape, method: Kivi) -> dict[str, Any]:
    """Seconds to store one token a row where the ring has room (``append``) and where a record leaves it (``flush``).

    Each is one layer, as ``KiviLayer.append`` does it; the step that puts the layer back is timed alone and taken off.
    ``step_append``, ``step_flush``: the engine's kernel, whose plan lies on the device.  ``*_launches``: graph nodes.
    """
    if method.num_packed(shape.num_tokens) + method.residual_length != shape.num_tokens:
        raise ValueError(f"{shape.num_tokens} tokens do not fill the ring of {method.name}: allowed are whole records")
    row: dict[str, Any] = {}
    for name, num_tokens in (("append", shape.num_tokens - 1), ("flush", shape.num_tokens)):
        figures = time_appending(bench, replace(shape, num_tokens=num_tokens), method)
        row |= {f"{prefix}{name}_{what}": value for (prefix, what), value in figures.items()}
    return row


def time_appending(bench: Bench, shape: Shape, method: Kivi) -> dict[tuple[str, str], Any]:
    """Seconds and launches of one more token for layers that hold the shape's."""
    tokens = Tokens(bench, shape, getattr(torch, method.dtype))
    layers = filled_layers(bench, method, tokens, room=2 * method.record_length)
    key, value = tokens.pair(1)
    rewinds = [rewinder(layer) for layer in layers]
    alone = bench.timer(rewinds).seconds

    def store(layer: KiviLayer, rewind: Call) -> None:
        rewind()
        layer.append(key, value)

    timed = bench.timer([partial(store, *pair) for pair in zip(layers, rewinds, strict=True)]).seconds
    rewinds[0]()
    nodes = launches(bench, lambda: layers[0].append(key, value))
    step = attempt(lambda: time_step(bench, layers, tokens, rewinds) - alone)
    return {("", "seconds"): timed - alone, ("", "launches"): nodes, ("step_", "seconds"): step}


def rewinder(layer: KiviLayer) -> Call:
    """Puts the layer's lengths back to what they are now, on the device and here."""
    lengths, rows, packed = layer.tensors["lengths"].clone(), list(layer.row_lengths), list(layer.row_packed)

    def rewind() -> None:
        layer.tensors["lengths"].copy_(lengths)
        layer.row_lengths, layer.row_packed = list(rows), list(packed)

    return rewind


def time_step(bench: Bench, layers: list[KiviLayer], tokens: Tokens, rewinds: list[Call]) -> float:
    """Seconds of the engine's storing kernel, ``rewind`` included, rotary embedding not."""
    if bench.device.type != "cuda":
        raise ValueError("the engine's kernel runs on CUDA only")
    from kvruntime.methods.kivi.step import step

    shape = tokens.shape
    key, value = tokens.pair(1)
    query = tokens.draw(shape.num_q_heads, 1)
    ticket = torch.zeros(shape.batch_size, dtype=torch.int32, device=bench.device)

    positions = layers[0].tensors["lengths"][0].clone()

    def store(layer: KiviLayer, rewind: Call) -> None:
        rewind()
        names = ("records", "exact_key", "exact_value", "key_params")
        stores: list[Any] = [layer.tensors.get(name) for name in names]
        stores += [positions, layer.tensors["lengths"], ticket, layer.record]
        stores += [layer.method.sink_length, layer.method.residual_length]
        step(query, key, value, None, *stores)

    return bench.timer([partial(store, *pair) for pair in zip(layers, rewinds, strict=True)]).seconds


def launches(bench: Bench, call: Call) -> int | None:
    """Kernels, fills and copies that ``call`` puts on the device, as nodes of its CUDA graph; None where not known."""
    if bench.device.type != "cuda":
        return None
    try:
        graph = torch.cuda.CUDAGraph()
        graph.enable_debug_mode()
        with torch.cuda.graph(graph):
            call()
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "graph.dot"
            graph.debug_dump(str(path))
            return len(set(re.findall(r'"(graph_\d+_node_\d+)"', path.read_text(errors="replace")))) or None
    except Exception:
        return None
